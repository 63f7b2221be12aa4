"""How much of a link each exchange of a TorchGroup uses, beside Gloo's own collectives, on emulated nodes.

python scripts/bench/wire.py                              measure the cells that are not stored yet: minutes
python scripts/bench/wire.py --only '4-*' --redo
python scripts/bench/wire.py --table | --markdown         show what is stored, and measure nothing

The fraction is a rank's payload bytes over the link's rate and the seconds of the slowest rank, as a median over repeats that
take the operations in turn. Segment headers take 5 to 7 % of a link, so 0.93 to 0.95 is all there is; short messages get more,
as a shaper lets 16 KiB pass at once. Cells are stored in scripts/bench/results/wire.jsonl with the load of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from command import Report, main, matching, new_parser, only_shows, present
from emulated import Entry, finish, measure_missing, start
from sheets import Sheet
from store import RESULTS, Store

from commopt.cluster.emulate import Emulation
from commopt.plan.links import parse_rate

STORED = RESULTS / "wire.jsonl"
PROGRAM = Path(__file__).parent / "wire_ranks.py"
LONGEST_S = 300.0  # of a cell


@dataclass(frozen=True)
class Cell:
    """What is measured: all operations among so many nodes. sizes: bytes that each rank sends."""

    nodes: int
    rate: str
    sizes: tuple[int, ...] = (100_000, 1_000_000, 4_000_000)
    repeats: int = 5

    @property
    def name(self) -> str:
        return f"{self.nodes}-{self.rate}"


CELLS = [Cell(nodes, rate) for rate in ("50mbit", "200mbit") for nodes in (2, 4)]


def measure(entry: Entry, emulation: Emulation) -> dict[str, Any]:
    """Run one cell. Raises CommoptError if it fails, with what a rank said."""
    settings = entry["settings"]
    with tempfile.TemporaryDirectory(prefix="bench-wire-") as scratch:
        out = Path(scratch, "seconds.json")
        words = ["--sizes", json.dumps(settings["sizes"]), "--repeats", str(settings["repeats"]), "--out", str(out)]
        finish(entry, [str(PROGRAM), *words], emulation, Path(scratch, "log"), LONGEST_S)
        return {"seconds": json.loads(out.read_text()), "load_average": round(os.getloadavg()[0], 2)}


def report(cells: list[dict[str, Any]]) -> Report:
    """A row for each operation and size of the stored cells."""
    rows = []
    for cell in cells:
        settings, seconds = cell["settings"], cell["seconds"]
        for key in [key for key in seconds if key.endswith("|commopt")]:
            operation, nbytes, _ = key.split("|")
            at_rate_s = int(nbytes) / parse_rate(settings["rate"])
            both = [seconds[f"{operation}|{nbytes}|{whose}"] for whose in ("gloo", "commopt")]
            found = [f"{at_rate_s / median(taken):.2f}" for taken in both] + [f"{at_rate_s / min(both[1]):.2f}"]
            rows.append([settings["rate"], str(settings["nodes"]), operation, f"{int(nbytes) / 1e6:g} MB", *found])
    headings = ("rate", "nodes", "operation", "sent by a rank", "Gloo's own", "commopt", "commopt, best")
    sheet = Sheet("fraction of the link's rate, as payload", headings, rows, left=("rate", "operation"))
    loads = ", ".join(f"{cell['name']}: {cell['load_average']:g}" for cell in cells)
    return Report([sheet] if rows else [], [f"load average of the machine: {loads}"])


def parser() -> argparse.ArgumentParser:
    made, what = new_parser(__doc__, STORED, f"patterns of {', '.join(cell.name for cell in CELLS)}")
    what.add_argument("--run-plan", type=Path, help=argparse.SUPPRESS)
    return made


def run(args: argparse.Namespace) -> None:
    """Do what the command line says. Raises ConfigError for a mistake in it, before anything is started."""
    cells, file = matching(args.only, CELLS), args.results or STORED
    if not only_shows(args):
        entries = (
            {
                "name": cell.name,
                "cluster": {"name": f"wire-{cell.name}", "nodes": cell.nodes, "links": {"rate": cell.rate}},
                "settings": asdict(cell),
            }
            for cell in cells
        )
        measure_missing(entries, file, redo=args.redo)
    store = Store(file)
    present(report([found for cell in cells if (found := store.get(cell.name)) is not None]), args)


if __name__ == "__main__":
    main(parser(), lambda args: start(args, run, measure, lambda result: f"load {result['load_average']:g}"))
