"""Tables of results, for the terminal and for a page of the documentation, and the frame of a figure."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from commopt.errors import ConfigError
from commopt.report import drawing


@dataclass(frozen=True)
class Sheet:
    """A table in words. left: headings of columns that are aligned to the left."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str | Text]]
    left: Collection[str] = ()

    def markdown(self) -> str:
        alignment = ["---" if heading in self.left else "---:" for heading in self.headings]
        headings = [heading.replace("\n", " ") for heading in self.headings]
        lines = [f"| {' | '.join(map(str, row))} |" for row in (headings, alignment, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *lines])

    def rich(self) -> Table:
        made = Table(title=self.title, title_justify="left", title_style="bold", box=None)
        for heading in self.headings:
            made.add_column(heading, justify="left" if heading in self.left else "right", overflow="fold")
        for row in self.rows:
            made.add_row(*row)
        return made


def judged(words: str, is_met: bool | None) -> Text:
    """What is said of a target, in the colour of the verdict."""
    return Text(words, {True: "green", False: "red", None: ""}[is_met])


def markdown(sheets: Sequence[Sheet], remarks: Iterable[str]) -> str:
    return "\n\n".join([*(sheet.markdown() for sheet in sheets), "\n".join(f"- {line}" for line in remarks)]).rstrip(
        "\n"
    )


def show(sheets: Sequence[Sheet], lines: Iterable[str]) -> None:
    console = wide_console()
    for sheet in sheets:
        console.print(sheet.rich(), "", sep="\n")
    for line in lines:
        console.print(line, markup=False)


def wide_console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 180, highlight=False)


def with_tables(page: str, text: str, program: str) -> str:
    """The page with the text between the two marks of a program, such as step.py. Raises ConfigError if it has none."""
    before, begin, rest = page.partition(f"<!-- written by scripts/bench/{program} ")
    mark, line_end, rest = rest.partition("\n")
    _, end, after = rest.partition("<!-- end -->")
    if not end:
        raise ConfigError(
            f"the lines '<!-- written by scripts/bench/{program} ...' and '<!-- end -->' are missing from the page"
        )
    return f"{before}{begin}{mark}{line_end}{text}\n{end}{after}"


@contextmanager
def figure(file: Path, title: str, height_in: float, panels: int) -> Iterator[Sequence[Any]]:
    """So many panels to draw into, one below the other, in the style of the report; written into the file in the end."""
    made, frames = drawing.new_figure(title, height_in, [1.0] * panels)
    yield frames
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(drawing.png(made))
