"""What it costs to synchronise: NoLoCo's figure 5 simulated, and a pair's swap, a tree and Gloo's ring timed on emulated nodes.

python scripts/bench/sync.py                          simulate figure 5: about a minute; also shows what was measured before
python scripts/bench/sync.py --quick                  a look in seconds: fewer runs and nodes, and nothing is stored
python scripts/bench/sync.py --measure                time the exchanges that are not stored yet, on 4 and 8 nodes: minutes
python scripts/bench/sync.py --measure --only '8-*' --redo
python scripts/bench/sync.py --table | --page         draw what is stored, or write docs/synchronisation.md and its figure

Simulated: message and step times are drawn, and nodes wait for each other as a tree, a barrier or a pair makes them wait.
Measured: Gloo between network namespaces with shaped links, all exchanges in turn within one run; ratios are what counts.
A cell is stored in scripts/bench/results/sync.jsonl with its settings, and made again only if those have changed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from command import DOCS, main, matching, new_parser, only_shows, present
from emulated import Entry, finish, measure_missing, start
from store import RESULTS, Store
from sync_results import report
from sync_simulation import POINTS, points, settings

from commopt.cluster.emulate import Emulation
from commopt.errors import ConfigError

STORED = RESULTS / "sync.jsonl"
PROGRAM = Path(__file__).parent / "sync_exchange.py"
PAGE = DOCS / "synchronisation.md"
SEED = 1
LONGEST_S = 400.0  # of a cell


@dataclass(frozen=True)
class Cell:
    """What is measured: the exchanges among so many nodes; with mean_s, messages take times that are drawn."""

    nodes: int
    elements: int  # of a message: float32, and float64 with mean_s
    repeats: int
    rate: str = "50mbit"
    mean_s: float = 0.0
    spread: float = 0.0

    @property
    def name(self) -> str:
        what = f"delayed-{self.spread:g}" if self.mean_s else f"{4 * self.elements // 1000}kB"
        return f"{self.nodes}-{what}"


CELLS = [
    *(Cell(nodes, elements, 30) for nodes in (4, 8) for elements in (62_500, 500_000)),
    *(Cell(nodes, 512, 150, mean_s=0.03, spread=spread) for nodes in (4, 8) for spread in (0.0, 1.0)),
]


# ---- simulating ------------------------------------------------------------------------------------------------------


def simulate(given: dict[str, Any]) -> dict[str, Any]:
    """Every point of figure 5 under these settings."""
    from rich.console import Console
    from rich.progress import track

    made: dict[str, Any] = {"schema": 1, **{part: [] for part in POINTS}}
    wanted = points(given)
    for part, arguments in track(wanted, "simulating", console=Console(stderr=True), transient=True):
        made[part].append(POINTS[part](**arguments))
    return made


# ---- measuring: inside the namespaces of one cluster -----------------------------------------------------------------


def measure(entry: Entry, emulation: Emulation) -> dict[str, Any]:
    """Run one cell. Raises CommoptError if it fails, with what a rank said."""
    cell = Cell(**entry["cell"])
    with tempfile.TemporaryDirectory(prefix="bench-sync-") as scratch:
        out = Path(scratch, "seconds.json")
        words = ["--elements", str(cell.elements), "--repeats", str(cell.repeats), "--out", str(out)]
        words += ["--mean-s", str(cell.mean_s), "--spread", str(cell.spread)]
        finish(entry, [str(PROGRAM), *words], emulation, Path(scratch, "log"), LONGEST_S)
        ranks = json.loads(out.read_text())
    for rank in ranks:
        rank["seconds"] = {name: [round(s, 6) for s in seconds] for name, seconds in rank["seconds"].items()}
    return {
        "ranks": ranks,
        "load_average": round(os.getloadavg()[0], 2),
        "congestion_control": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
    }


def sweep(cells: list[Cell], file: Path, *, redo: bool) -> None:
    """Measure the cells that are not stored."""
    entries = (
        {
            "name": cell.name,
            "cell": asdict(cell),
            "cluster": {"name": f"sync-{cell.nodes}-{cell.rate}", "nodes": cell.nodes, "links": {"rate": cell.rate}},
            "settings": asdict(cell),
        }
        for cell in cells
    )
    measure_missing(entries, file, redo=redo)


# ---- the command line ------------------------------------------------------------------------------------------------


def known(file: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """What is stored: the simulation, and the cells."""
    store = Store(file)
    return store.get("simulation"), [found for cell in CELLS if (found := store.get(cell.name)) is not None]


def parser() -> argparse.ArgumentParser:
    made, what = new_parser(__doc__, STORED, f"with --measure: patterns of {', '.join(c.name for c in CELLS)}", PAGE)
    what.add_argument("--quick", action="store_true", help="simulate with fewer runs and nodes, and store nothing")
    what.add_argument("--measure", action="store_true", help="time exchanges on emulated nodes")
    what.add_argument("--run-plan", type=Path, help=argparse.SUPPRESS)
    return made


def run(args: argparse.Namespace) -> None:
    """Do what the command line says. Raises ConfigError for a mistake in it, before anything is started."""
    shows = only_shows(args)
    if args.redo and args.quick:
        raise ConfigError("--redo: has no effect with --quick; leave one of them out")
    if args.only is not None and not args.measure:
        raise ConfigError("--only: chooses what to measure; add --measure, or leave it out")
    file, chosen = args.results or STORED, matching(args.only, CELLS)
    wanted = settings(quick=args.quick, seed=SEED)
    if args.quick:
        present(report({"settings": wanted, **simulate(wanted)}, []), args)
        return
    if args.measure:
        sweep(chosen, file, redo=args.redo)
    elif not shows:
        store = Store(file, ["simulation"] if args.redo else ())
        if store.get("simulation", wanted) is None:
            store.put("simulation", wanted, simulate(wanted))
    present(report(*known(file)), args, PAGE)


if __name__ == "__main__":
    main(parser(), lambda args: start(args, run, measure, lambda result: f"{len(result['ranks'])} ranks"))
