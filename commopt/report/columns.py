"""Columns of a table, and rows of texts set in plain characters or for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from commopt.report.document import RunResult

if TYPE_CHECKING:
    from rich.table import Table

NOTHING = "-"


@dataclass(frozen=True)
class Column:
    """One column: its heading, what it means, its value for a run beside dense (None for nothing), and how that is written."""

    heading: tuple[str, str]
    meaning: str
    value: Callable[[RunResult, RunResult | None], Any]
    text: Callable[[Any], str] = str


def cells_of(columns: Sequence[Column], runs: Sequence[RunResult], dense: RunResult | None) -> list[list[str]]:
    """One row per run, one text per column; `-` where there is nothing to say."""
    values = [[(column, column.value(run, dense)) for column in columns] for run in runs]
    return [[NOTHING if value is None else column.text(value) for column, value in row] for row in values]


def aligned(columns: Sequence[Column], cells: Sequence[Sequence[str]]) -> str:
    """The rows under their headings in plain characters, for files and pipes."""
    rows = [[column.heading[line] for column in columns] for line in (0, 1)] + [list(row) for row in cells]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    lines = [
        "  ".join([row[0].ljust(widths[0])] + [text.rjust(w) for text, w in zip(row[1:], widths[1:], strict=True)])
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in [*lines[:2], "-" * len(lines[0]), *lines[2:]])


def rich_rows(columns: Sequence[Column], cells: Sequence[Sequence[str]]) -> Table:
    """The rows for a terminal; the word failed is red."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    for index, column in enumerate(columns):
        table.add_column("\n".join(column.heading), justify="left" if index == 0 else "right", overflow="fold")
    styles = {NOTHING: "dim", "failed": "bold red"}
    for name, *texts in cells:
        table.add_row(Text(name, "bold"), *(Text(text, styles.get(text, "")) for text in texts))
    return table
