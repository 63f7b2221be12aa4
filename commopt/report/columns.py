"""Columns of a table, and its rows as texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from commopt.report.document import DocumentPart, Rounds, RunResult

if TYPE_CHECKING:
    from rich.table import Table

NOTHING = "-"
AS_MS, AS_MEGABYTES = ("seconds", "milliseconds"), ("bytes", "megabytes (10^6)")


@dataclass(frozen=True)
class Column:
    """One column: its heading, what it means, its value for a run beside dense (None for nothing), and how that is written."""

    heading: tuple[str, str]
    meaning: str
    value: Callable[[RunResult, RunResult | None], Any]
    text: Callable[[Any], str] = str


def column_of(
    heading: tuple[str, str], field: str, text: Callable[[Any], str] = str, units: tuple[str, str] = ("", "")
) -> Column:
    """The column of a field of a run or of its rounds, which means what the document says of it.

    units: the field's, and what the column has instead.
    """
    model = Rounds if field.startswith("rounds.") else RunResult
    meaning = described(model, field.rpartition(".")[2]).replace(*units, 1)
    return Column(heading, meaning, lambda run, _: attrgetter(field)(run), text)


def described(model: type[DocumentPart], field: str) -> str:
    """What the document says of a field, without when it is null."""
    return (model.model_fields[field].description or "").partition("; null ")[0]


def cells_of(columns: Sequence[Column], runs: Sequence[RunResult], dense: RunResult | None) -> list[list[str]]:
    """One row per run, one text per column; `-` where there is nothing to say."""
    values = [[(column, column.value(run, dense)) for column in columns] for run in runs]
    return [[NOTHING if value is None else column.text(value) for column, value in row] for row in values]


def table_of(columns: Sequence[Column], cells: Sequence[Sequence[str]], gap: int = 1) -> Table:
    """The rows under their headings, so many spaces apart; in a terminal, the word failed is red."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="dim")
    for index, column in enumerate(columns):
        table.add_column("\n".join(column.heading), justify="left" if index == 0 else "right", overflow="fold")
    styles = {NOTHING: "dim", "failed": "bold red"}
    for name, *texts in cells:
        table.add_row(Text(name, "bold"), *(Text(text, styles.get(text, "")) for text in texts))
    return table
