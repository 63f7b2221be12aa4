"""The table of what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import commopt
from commopt.errors import AttachError
from commopt.run.checks import Refusal, refuse, table

SOURCES = "\n".join(path.read_text(encoding="utf-8") for path in Path(commopt.__file__).parent.rglob("*.py"))


def test_no_fact_is_listed_twice() -> None:
    text = (Path(commopt.__file__).parent / "run" / "refusals.yaml").read_text(encoding="utf-8")
    facts = re.findall(r"^  (?! )(.+):$", text, flags=re.MULTILINE)
    assert len(facts) == len(set(facts)) == len(table())


@pytest.mark.parametrize("one", table().values(), ids=lambda one: one.fact)
def test_every_row_is_a_sentence_that_some_framework_can_report(one: Refusal) -> None:
    text = one.text("dgc", "a detail")
    assert re.fullmatch(r".+: .+; .+", text)
    assert "{method}" not in text
    assert "{detail}" not in text
    assert not text.endswith(".")
    assert SOURCES.count(f'"{one.fact}"') >= 1


def test_the_first_fact_that_holds_is_raised_for_methods_that_it_concerns() -> None:
    facts = {"plain scaler": True, "overlap without backward": "a plain model"}
    with pytest.raises(AttachError, match="grad_scaler on several ranks"):
        refuse(facts, "dgc", "gradient")
    with pytest.raises(AttachError, match="overlap=True with a plain model"):
        refuse(facts, "noloco", "outer")
    refuse({"plain scaler": False, "overlap without backward": ""}, "dgc", "gradient")
