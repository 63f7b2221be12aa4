"""Columns of a table, and rows of texts set in plain characters or for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TextIO

from commopt.record.words import megabytes, milliseconds
from commopt.report.results import RunResult

if TYPE_CHECKING:
    from rich.table import Table

NOTHING = "-"


@dataclass(frozen=True)
class Column:
    """One column: its heading, what it means, and its cell for a run beside dense (None for nothing)."""

    heading: tuple[str, str]
    meaning: str
    cell: Callable[[RunResult, RunResult | None], str | None]


def percent(share: float | None) -> str | None:
    """A share in whole percent, if it is known."""
    return None if share is None else f"{share * 100:.0f}%"


def ms(seconds: float | None) -> str | None:
    """Seconds as milliseconds, if they are known."""
    return None if seconds is None else milliseconds(seconds)


def mb(nbytes: float | None) -> str | None:
    """Bytes as megabytes, if they are known."""
    return None if nbytes is None else megabytes(nbytes)


def cells_of(columns: Sequence[Column], runs: Sequence[RunResult], dense: RunResult | None) -> list[list[str]]:
    """One row per run, one text per column; `-` where there is nothing to say."""
    return [[column.cell(run, dense) or NOTHING for column in columns] for run in runs]


def aligned(columns: Sequence[Column], cells: Sequence[Sequence[str]], _: Sequence[bool] | None = None) -> str:
    """The rows under their headings in plain characters, for files and pipes."""
    rows = [[column.heading[line] for column in columns] for line in (0, 1)] + [list(row) for row in cells]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    lines = [
        "  ".join([row[0].ljust(widths[0])] + [text.rjust(w) for text, w in zip(row[1:], widths[1:], strict=True)])
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in [*lines[:2], "-" * len(lines[0]), *lines[2:]])


def rich_rows(
    columns: Sequence[Column], cells: Sequence[Sequence[str]], is_last_bad: Sequence[bool] | None = None
) -> Table:
    """The rows for a terminal; the last cell is red where `is_last_bad` says so."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    for index, column in enumerate(columns):
        table.add_column("\n".join(column.heading), justify="left" if index == 0 else "right", overflow="fold")
    for row, is_bad in zip(cells, is_last_bad or [False] * len(cells), strict=True):
        styles = ["bold"] + ["" if text != NOTHING else "dim" for text in row[1:]]
        styles[-1] = "bold red" if is_bad else styles[-1]
        table.add_row(*(Text(text, style) for text, style in zip(row, styles, strict=True)))
    return table


def terminal(stream: TextIO) -> Callable[..., None]:
    """Writes tables and lines to a terminal."""
    from rich.console import Console

    return partial(Console(file=stream).print, markup=False, highlight=False)
