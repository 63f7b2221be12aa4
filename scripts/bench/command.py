"""What the benchmarks' command lines have in common: options, checks, and how results are shown."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sheets import Sheet, markdown, show, with_tables

from commopt.errors import CommoptError, ConfigError, did_you_mean

DOCS = Path(__file__).parents[2] / "docs"


class Named(Protocol):
    @property
    def name(self) -> str: ...


Cell = TypeVar("Cell", bound=Named)


@dataclass(frozen=True)
class Report:
    """What there is to show. draw: writes the figure."""

    sheets: Sequence[Sheet]
    remarks: Sequence[str] = ()
    draw: Callable[[Path], None] | None = None


def new_parser(
    doc: str | None, results: Path, only: str, page: Path | None = None
) -> tuple[argparse.ArgumentParser, Any]:
    """A parser with the options of all benchmarks, and its group of options that exclude each other."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", metavar="NAME,...", help=only)
    made.add_argument("--redo", action="store_true", help="make cells again that are stored")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write what is shown there, as one JSON object")
    made.add_argument("--results", type=Path, metavar="FILE", help=f"where cells are stored; {results.name} by default")
    made.set_defaults(page=False, figure=None, program=f"{results.stem}.py")
    what = made.add_mutually_exclusive_group()
    what.add_argument("--table", action="store_true", help="only show the tables of stored cells")
    what.add_argument("--markdown", action="store_true", help="only print those tables as Markdown")
    if page is not None:
        what.add_argument("--page", action="store_true", help="only write the tables and the figure into docs/")
        image = page.with_suffix(".png")
        what.add_argument("--figure", nargs="?", type=Path, const=image, metavar="FILE", help="only draw the figure")
    return made, what


def only_shows(args: argparse.Namespace) -> bool:
    """Whether to show what is stored, and to make nothing. Raises ConfigError for what is wrong in any benchmark."""
    shown = next((name for name in ("table", "markdown", "page", "figure") if getattr(args, name)), None)
    if shown and args.redo:
        raise ConfigError(f"--redo: has no effect with --{shown}; leave one of them out")
    if getattr(args, "jobs", 1) < 1:
        raise ConfigError(f"--jobs {args.jobs}: write a number from 1")
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise ConfigError(f"--json {args.json}: folder {args.json.resolve().parent} does not exist; create it")
    return shown is not None


def base_name(method: str) -> str:
    """The registered name in `two_way(sign, int8)`."""
    return method.partition("(")[0]


def names(option: str, text: str | None, known: Iterable[str]) -> list[str]:
    """The names in NAME,NAME,...; all that are known without. Raises ConfigError for one that is unknown or repeated."""
    every = list(known)
    if text is None:
        return every
    given = [name.replace(" ", "") for name in re.split(r",(?![^(]*\))", text)]  # two_way(sign,int8) is one name
    for k, name in enumerate(given):
        if base_name(name) not in every:
            hint = did_you_mean(name, every) or f"; there are {', '.join(every)}"
            raise ConfigError(f"{option}: unknown name {name!r}{hint}")
        if name in given[:k]:
            raise ConfigError(f"{option}: duplicate name {name!r}")
    return given


def matching(only: str | None, cells: Sequence[Cell]) -> list[Cell]:
    """The cells whose names match one of the patterns in PATTERN,... Raises ConfigError if there is none."""
    patterns = ["*"] if only is None else [pattern.strip() for pattern in only.split(",")]
    found = [cell for cell in cells if any(fnmatchcase(cell.name, pattern) for pattern in patterns)]
    if not found:
        raise ConfigError(f"--only {only}: matches no cell; a cell is named like {cells[0].name}")
    return found


def present(report: Report, args: argparse.Namespace, page: Path | None = None, notices: Iterable[str] = ()) -> None:
    """Print, draw or write the report as the command line says. notices: printed with the tables, and not on pages."""
    if not report.sheets:
        print(
            "nothing is stored yet that can be shown; run this without --table, --markdown, --page and --figure first"
        )
        return
    image = args.figure or (
        page.with_suffix(".png") if page is not None and args.page and args.figure is None else None
    )
    if image is not None:
        if report.draw is None:
            raise ConfigError(f"{image}: nothing is stored yet that can be drawn")
        report.draw(image)
        print(f"drawn into {image}")
    if args.markdown:
        print(markdown(report.sheets, report.remarks))
    elif args.page and page is not None:
        text = markdown(report.sheets, report.remarks)
        page.write_text(with_tables(page.read_text(encoding="utf-8"), text, args.program), encoding="utf-8")
        print(f"written into {page}")
    elif image is None:
        show(report.sheets, [*notices, *report.remarks])
    if args.json is not None:
        tables = [
            {"title": s.title, "headings": s.headings, "rows": [list(map(str, r)) for r in s.rows]}
            for s in report.sheets
        ]
        args.json.write_text(json.dumps({"schema": 1, "tables": tables, "remarks": report.remarks}, indent=1) + "\n")


def main(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int | None]) -> None:
    """Do what the command line says. Exits with 2 for a mistake in it, with 1 for what failed."""
    try:
        code = run(parser.parse_args())
    except CommoptError as error:
        print("\n".join(f"{parser.prog}: {line}" for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; the next run goes on after the cells that are stored", file=sys.stderr)
        sys.exit(130)
    sys.exit(code)
