"""docs/methods.md says what the methods say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from script import SCRIPTS, module

script = module("write_methods_page", SCRIPTS)


@pytest.fixture(autouse=True)
def check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["write_methods_page.py", "--check"])


def test_the_page_is_up_to_date() -> None:
    script.main()


def test_a_page_that_is_out_of_date_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "methods.md"
    monkeypatch.setattr(script, "PAGE", page)
    said = f"^{page} is out of date; run scripts/write_methods_page.py$"
    with pytest.raises(SystemExit, match=said):
        script.main()
    assert not page.exists()
    page.write_text(script.render() + "more", encoding="utf-8")
    with pytest.raises(SystemExit, match=said):
        script.main()
