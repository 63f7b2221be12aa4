"""What it costs to synchronise: NoLoCo's figure 5 simulated, and a pair's swap, a tree and Gloo's ring timed on emulated nodes.

python scripts/bench_sync.py                          simulate figure 5: half a minute; also shows what was measured before
python scripts/bench_sync.py --quick                  a look in seconds: fewer runs and nodes, and nothing is stored
python scripts/bench_sync.py --measure                time the exchanges that are not stored yet, on 4 and 8 nodes: minutes
python scripts/bench_sync.py --measure --only '8-*' --redo
python scripts/bench_sync.py --table | --page         draw what is stored, or write docs/synchronisation.md and its figure

Simulated: message and step times are drawn, and nodes wait for each other as a tree, a barrier or a pair makes them wait.
Measured: Gloo between network namespaces with shaped links, all exchanges in turn within one run; ratios are what counts.
A cell is stored in scripts/results/sync/ with its settings, and made again only if those have changed.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench_step import cpu_seconds
from step_results import stored
from sync_results import Sheet, draw_figure, sheets
from sync_simulation import POINTS, points, settings

from commopt.cluster.emulate import Emulation, end_on_signals, end_with_parent, enter
from commopt.cluster.run import Tick, run_job
from commopt.cluster.spec import ClusterSpec, Emulate
from commopt.errors import CommoptError, ConfigError
from commopt.record.words import seconds_text

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "sync"
PROGRAM = HERE / "sync_exchange.py"
PAGE = HERE.parent / "docs" / "synchronisation.md"
BEGIN, END = "<!-- written by bench_sync.py --page -->", "<!-- end -->"
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

    made: dict[str, Any] = {"schema": 1, "settings": given, **{part: [] for part in POINTS}}
    wanted = points(given)
    for part, arguments in track(wanted, "simulating", console=Console(stderr=True), transient=True):
        made[part].append(POINTS[part](**arguments))
    return made


# ---- measuring: inside the namespaces of one cluster -----------------------------------------------------------------


def measure(cell: Cell, cluster: ClusterSpec, emulation: Emulation) -> dict[str, Any]:
    """Run one cell. Raises CommoptError where it fails, with what a rank said."""

    def give_up(tick: Tick) -> None:
        if tick.elapsed_s > LONGEST_S:
            raise CommoptError(f"{cell.name}: not done after {seconds_text(LONGEST_S)}")

    before, start_s = cpu_seconds(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-sync-") as scratch:
        out = Path(scratch, "seconds.json")
        words = ["--elements", str(cell.elements), "--repeats", str(cell.repeats), "--out", str(out)]
        words += ["--mean-s", str(cell.mean_s), "--spread", str(cell.spread)]
        job = run_job(
            cluster, [str(PROGRAM), *words], emulation=emulation, log_dir=Path(scratch, "log"), on_tick=give_up
        )
        if job.failure is not None:
            raise CommoptError(f"{cell.name}: {job.failure}\n{job.failure.message}".rstrip())
        ranks = json.loads(out.read_text())
    after, wall_s = cpu_seconds(), time.monotonic() - start_s
    for rank in ranks:
        rank["seconds"] = {name: [round(s, 6) for s in seconds] for name, seconds in rank["seconds"].items()}
    return {
        "schema": 1,
        "name": cell.name,
        "settings": asdict(cell),
        "ranks": ranks,
        "wall_s": round(wall_s, 1),
        "others_cores": None if before is None or after is None else round(max(0.0, after - before) / wall_s, 3),
        "load_average": round(os.getloadavg()[0], 2),
        "congestion_control": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
    }


def run_plan(plan_file: Path) -> None:
    """Measure the cells of one number of nodes; runs this command again in namespaces of its own, and exits as that does."""
    plan = json.loads(plan_file.read_text())
    cells = [Cell(**fields) for fields in plan["cells"]]
    cluster = cluster_of(cells[0])
    emulation = enter(cluster, emulate=Emulate.NETNS)
    for cell in cells:
        print(f"{cell.name} ...", end=" ", flush=True)
        result = measure(cell, cluster, emulation)
        print(seconds_text(result["wall_s"]), flush=True)
        store(result, Path(plan["folder"]), cell.name)


def cluster_of(cell: Cell) -> ClusterSpec:
    """Nodes of one slot each, on links of the cell's rate."""
    return ClusterSpec.model_validate(
        {"name": f"sync-{cell.nodes}-{cell.rate}", "nodes": cell.nodes, "links": {"rate": cell.rate}}
    )


def sweep(cells: Sequence[Cell], folder: Path) -> None:
    """Measure the cells, in one process for each cluster. On Ctrl-C the process ends what it has started, and then this does."""
    for key in dict.fromkeys((cell.nodes, cell.rate) for cell in cells):
        own = [asdict(cell) for cell in cells if (cell.nodes, cell.rate) == key]
        with tempfile.TemporaryDirectory(prefix="bench-sync-") as scratch:
            plan_file = Path(scratch, "plan.json")
            plan_file.write_text(json.dumps({"cells": own, "folder": str(folder)}))
            child = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), "--run-plan", str(plan_file)],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=end_with_parent(signal.SIGTERM),
            )
            try:
                code = child.wait()
            finally:
                if child.poll() is None:
                    child.terminate()
                    child.wait()
        if code != 0:
            raise SystemExit(code)


def store(result: Mapping[str, Any], folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{name}.json.new"
    unfinished.write_text(json.dumps(result) + "\n")
    unfinished.replace(folder / f"{name}.json")


# ---- the command line ------------------------------------------------------------------------------------------------


def known(folder: Path, cells: Sequence[Cell]) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """What is stored: the simulation, and the cells."""
    return stored("simulation", folder), [found for cell in cells if (found := stored(cell.name, folder)) is not None]


def with_tables(page: str, made: Sequence[Sheet]) -> str:
    """The page with the tables between its two marks. Raises ConfigError where it has none."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ConfigError(f"{PAGE}: the lines {BEGIN!r} and {END!r} are missing; write them where the tables belong")
    tables = "\n\n".join(sheet.markdown() for sheet in made)
    return f"{before}{begin}\n{tables}\n{end}{after}"


def chosen_cells(only: str | None) -> list[Cell]:
    """The cells that a comma-separated list of patterns names. Raises ConfigError if there is none."""
    patterns = ["*"] if only is None else [pattern.strip() for pattern in only.split(",")]
    cells = [cell for cell in CELLS if any(fnmatch.fnmatchcase(cell.name, pattern) for pattern in patterns)]
    if not cells:
        raise ConfigError(f"--only {only}: matches none of {', '.join(cell.name for cell in CELLS)}")
    return cells


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", metavar="PATTERN,...", help=f"with --measure: of {', '.join(c.name for c in CELLS)}")
    made.add_argument("--redo", action="store_true", help="simulate or measure again, whatever is stored")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the simulation and the cells there")
    made.add_argument("--results", type=Path, metavar="DIR", default=RESULTS, help="where both are stored")
    what = made.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="simulate with fewer runs and nodes, and store nothing")
    what.add_argument("--measure", action="store_true", help="time exchanges on emulated nodes")
    what.add_argument("--table", action="store_true", help="only draw what is stored")
    what.add_argument("--page", action="store_true", help="only write what is stored into docs/")
    what.add_argument("--run-plan", type=Path, help=argparse.SUPPRESS)
    return made


def run(args: argparse.Namespace) -> None:
    """Do what the command line says. Raises ConfigError for a mistake in it, before anything is started."""
    if args.redo and (args.quick or args.table or args.page):
        raise ConfigError("--redo: has no effect with --quick, --table or --page; leave it out")
    if args.only is not None and not args.measure:
        raise ConfigError("--only: chooses what to measure; add --measure, or leave it out")
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise ConfigError(f"--json {args.json}: there is no folder {args.json.resolve().parent}; make it")
    folder, chosen = args.results.resolve(), chosen_cells(args.only)
    simulation, cells = known(folder, CELLS)
    wanted = settings(quick=args.quick, seed=SEED)
    if args.quick:
        simulation, cells = simulate(wanted), []
    elif args.measure:
        by_name = {cell["name"]: cell["settings"] for cell in cells}
        sweep([cell for cell in chosen if args.redo or by_name.get(cell.name) != asdict(cell)], folder)
        simulation, cells = known(folder, CELLS)
    elif not args.table and not args.page and (args.redo or simulation is None or simulation["settings"] != wanted):
        simulation = simulate(wanted)
        store(simulation, folder, "simulation")
    if args.json is not None:
        args.json.write_text(json.dumps({"schema": 1, "simulation": simulation, "cells": cells}, indent=1) + "\n")
    if args.page:
        write_page(simulation, cells)
    else:
        show(sheets(simulation, cells))


def write_page(simulation: Mapping[str, Any] | None, cells: Sequence[Mapping[str, Any]]) -> None:
    if simulation is None:
        raise ConfigError("--page: nothing is simulated yet; run this without it first")
    draw_figure(simulation, PAGE.with_suffix(".png"))
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), sheets(simulation, cells)), encoding="utf-8")
    print(f"written into {PAGE} and {PAGE.with_suffix('.png')}")


def show(made: Sequence[Sheet]) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    for sheet in made:
        console.print(sheet.rich(), "", sep="\n")
    if not made:
        print("nothing is stored yet; run this without --table")


def main() -> None:
    args = parser().parse_args()
    try:
        if args.run_plan is not None:
            run_plan(args.run_plan)
        else:
            end_on_signals()
            run(args)
    except CommoptError as error:
        print("\n".join(f"bench_sync: {line}" for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        print("bench_sync: interrupted; the next run goes on after the cells that are stored", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
