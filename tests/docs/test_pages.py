"""Every page does what it says: each of its blocks runs in a fresh folder, as it would for a reader."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from blocks import GENERATED, PAGE_LIMIT_S, ROOT, links, read_blocks, run_page

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "launch").rglob("*.md")])
MOST_NOT_EXECUTED = 12  # of all pages together; each says why

_GENERATED = {("docs", name) for name in GENERATED}


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.timeout(PAGE_LIMIT_S + 40)
@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_the_blocks_of_a_page_do_what_they_say(page: Path, tmp_path: Path) -> None:
    run_page(page, tmp_path / "page")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=_name)
def test_links_lead_to_files_that_exist(page: Path) -> None:
    own = [target for target in links(page) if not re.match(r"https?:|mailto:|#", target)]
    files = [page.parent / target.partition("#")[0] for target in own]
    gone = [file for file in files if not file.exists() and (file.parent.name, file.name) not in _GENERATED]
    assert not gone
    if page.parent.name == "docs":
        assert re.findall(r"\[[\w-]+\.md\]\(", page.read_text(encoding="utf-8")) == []  # a link's text is a title


def test_few_blocks_are_not_executed() -> None:
    skipped = Counter(
        f"{_name(page)}: {block.reason}" for page in PAGES for block in read_blocks(page) if block.reason is not None
    )
    assert skipped.total() <= MOST_NOT_EXECUTED, "\n".join(skipped)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_a_python_block_can_be_pasted_alone(page: Path, tmp_path: Path) -> None:
    for block in read_blocks(page):
        if block.language == "python":
            (tmp_path / f"line{block.line}.py").write_text(block.code, encoding="utf-8")
    words = ["ruff", "check", "--isolated", "--quiet", "--select", "F821", "--output-format", "concise", str(tmp_path)]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")
