"""Every method's options: what is said of a value that is out of range, and of options that contradict each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from commopt import build
from commopt.errors import ConfigError

WRONG = yaml.safe_load(Path(__file__).with_name("bad_options.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "options", "said"), WRONG, ids=[f"{name}-{options}" for name, options, _ in WRONG])
def test_a_wrong_option_is_refused_in_words_that_name_the_fix(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(name, **options)
    assert str(caught.value).removeprefix(f"method {name.partition('(')[0]}: ") == said
