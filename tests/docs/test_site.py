"""The documentation's site can be built without a network, and without a page that leads nowhere."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from blocks import GENERATED, ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    words = ["-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(ROOT / "mkdocs.yml"), "-d", str(folder)]
    done = subprocess.run(["python", *words], capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_is_built_without_a_warning(site: Path) -> None:
    assert "Train over slow links" in (site / "index.html").read_text(encoding="utf-8")


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    loads = re.compile(
        r'<(?:script|img|iframe)[^>]*\ssrc="https?:|<link[^>]*rel="(?:stylesheet|preconnect)"[^>]*href="https?:'
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    assert [page.name for page in pages if loads.search(page.read_text(encoding="utf-8"))] == []


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = re.findall(r"[\w-]+\.md", str(config["nav"]))
    written = [page.name for page in (ROOT / "docs").glob("*.md")]
    assert sorted(listed) == sorted([*written, *GENERATED])
