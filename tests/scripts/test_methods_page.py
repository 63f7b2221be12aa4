"""docs/methods.md says what the methods say."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from script import module


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    yield from module("write_methods_page")


@pytest.fixture(autouse=True)
def check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["write_methods_page.py", "--check"])


def test_the_page_is_up_to_date(script: ModuleType) -> None:
    script.main()


def test_a_page_that_is_out_of_date_is_noticed(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "methods.md"
    monkeypatch.setattr(script, "PAGE", page)
    said = f"^{page} is out of date; run scripts/write_methods_page.py$"
    with pytest.raises(SystemExit, match=said):
        script.main()
    assert not page.exists()
    page.write_text(script.render() + "more", encoding="utf-8")
    with pytest.raises(SystemExit, match=said):
        script.main()
