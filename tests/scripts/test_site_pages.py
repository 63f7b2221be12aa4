"""The pages of the site that are written from the code."""

from __future__ import annotations

import re

import pytest
from script import SCRIPTS, module

from commopt.methods import METHODS
from commopt.run.checks import table

script = module("site_pages", SCRIPTS)


@pytest.fixture(scope="module")
def methods_page() -> str:
    return str(script.methods_page())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_row_and_a_section(methods_page: str, name: str) -> None:
    assert f"| [`{name}`](#{name}) | {METHODS[name].kind} |" in methods_page
    assert f"\n## {name}\n" in methods_page


def test_equations_stand_where_the_text_introduces_them(methods_page: str) -> None:
    section = methods_page.partition("## onebit_adam\n")[2].partition("\n## ")[0]
    warmup, frozen = section.index("v <- b2 v"), section.index("m <- C(mean C(m_i))")
    assert section.index("Adam on the exact mean gradient") < warmup < section.index("then v stays") < frozen


def test_options_and_their_defaults_are_the_declared_ones(methods_page: str) -> None:
    section = methods_page.partition("## loco\n")[2].partition("\n## ")[0]
    assert "`bits=4`, `block_size=256`, `beta=0.8`, `residual_bits=8`, `reset_every=1024`, `seed=0`" in section
    assert "\n- `block_size`: elements per scale" in section  # in the docstring it shares a line with bits


@pytest.mark.parametrize(("name", "expected"), [("dense", 0), ("ef_sign", 5), ("onebit_adam", 13), ("noloco", 8)])
def test_bytes_of_state_come_from_the_declaration(methods_page: str, name: str, expected: float) -> None:
    (row,) = re.findall(rf"^\| \[`{name}`\].*$", methods_page, flags=re.MULTILINE)
    assert float(row.split("|")[-2]) == expected


def test_a_docstring_without_a_part_is_an_error() -> None:
    class Nothing:
        """Does nothing.

        Nobody, arXiv:0000.00000.
        """

    with pytest.raises(ValueError, match="no line that begins with 'Sends'"):
        script.read_docstring(Nothing)


def test_every_refusal_has_a_row() -> None:
    rows = [line for line in script.refusals_page().splitlines() if line.startswith("| ")]
    assert len(rows) == len(table()) + len(script.FRAMEWORKS)
    assert not [row for row in rows if row.startswith("| ...")]
