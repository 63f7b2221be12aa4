"""Tables of pages that are computed: what a page shows is what the code says."""

from __future__ import annotations

import pytest
from script import SCRIPTS, module

script = module("site_tables", SCRIPTS)


@pytest.mark.parametrize(
    ("page", "name"), [(page, make.__name__) for page, tables in script.TABLES.items() for make in tables]
)
def test_a_page_shows_the_table_that_the_code_computes(page: str, name: str) -> None:
    table = getattr(script, name)()
    assert f"\n\n{table}\n" in (SCRIPTS.parent / "docs" / f"{page}.md").read_text(encoding="utf-8"), table
