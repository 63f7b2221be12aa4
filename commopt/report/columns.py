"""The columns of a table, and the text of its cells."""

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
    """One column: its heading, its meaning, its value for a run and the dense run (None if there is none), and that value as text."""

    heading: tuple[str, str]
    meaning: str
    value: Callable[[RunResult, RunResult | None], Any]
    text: Callable[[Any], str] = str


def column_of(
    heading: tuple[str, str], field: str, text: Callable[[Any], str] = str, units: tuple[str, str] = ("", "")
) -> Column:
    """The column for a field of a run, or of its rounds (`rounds.missed`); its meaning is the field's description.

    units: the unit in that description, and the column's unit to replace it.
    """
    model = Rounds if field.startswith("rounds.") else RunResult
    meaning = described(model, field.rpartition(".")[2]).replace(*units, 1)
    return Column(heading, meaning, lambda run, _: attrgetter(field)(run), text)


def described(model: type[DocumentPart], field: str) -> str:
    """The description of a field in the results document, without the part on null."""
    return (model.model_fields[field].description or "").partition("; null ")[0]


def cells_of(columns: Sequence[Column], runs: Sequence[RunResult], dense: RunResult | None) -> list[list[str]]:
    """One row per run, one text per column; `-` for a value of None."""
    values = [[(column, column.value(run, dense)) for column in columns] for run in runs]
    return [[NOTHING if value is None else column.text(value) for column, value in row] for row in values]


def table_of(columns: Sequence[Column], cells: Sequence[Sequence[str]], gap: int = 1) -> Table:
    """The rows under their headings, with `gap` spaces between columns; in a terminal, the word failed is red."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="dim")
    for index, column in enumerate(columns):
        table.add_column("\n".join(column.heading), justify="left" if index == 0 else "right", overflow="fold")
    styles = {NOTHING: "dim", "failed": "bold red"}
    for name, *texts in cells:
        table.add_row(Text(name, "bold"), *(Text(text, styles.get(text, "")) for text in texts))
    return table
