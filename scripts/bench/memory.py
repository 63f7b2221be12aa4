"""How much memory a rank of a large model takes under several methods, beside what the docs say, on two emulated nodes.

python scripts/bench/memory.py                              measure the cells that are not stored yet: minutes
python scripts/bench/memory.py --only '*-124m-*' --redo     two ranks of 124 M parameters take up to 8 GB, of 350 M up to 21 GB
python scripts/bench/memory.py --table | --markdown         show what is stored, and measure nothing

Each rank trains a GPT of launch/train.py for a few steps on 32 bytes each, so that activations take next to nothing. Its peak is
the most memory that the process has had (ru_maxrss), less what it had once torch and commopt were imported.

formula   bytes per parameter: 4 of the parameter, 4 of its gradient, 4 of DDP's buckets (none if gradients are views of them) or of
          an outer method's copy of what it exchanges, and the state of optimizer and method, as in docs/finetuning.md for two
          machines
process   what a rank of a small model takes: torch's and Gloo's own memory, and compiled kernels. The ratio leaves it out
step      the mean of the last two, in which an outer method has one round

Both ranks share this machine's cores. A cell that leaves the machine less than half a GiB ends with an error. Cells are stored in
scripts/bench/results/step.jsonl.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command import Report, main, matching, new_parser, only_shows, present
from emulated import Entry, finish, measure_missing, start
from sheets import Sheet
from store import RESULTS, Store

from commopt.cluster.emulate import Emulation
from commopt.errors import CommoptError

STORED = RESULTS / "step.jsonl"
PROGRAM = Path(__file__).parent / "memory_ranks.py"
LONGEST_S = 900.0  # of a cell
NODES, CLOSE = 2, 1.15
LEAST_BYTES = 1 << 29  # that are left for other programs
MODELS: Mapping[str, Mapping[str, int]] = {
    "small": {"layers": 1, "heads": 2, "width": 64},  # what a process takes in any case
    "124m": {"layers": 13, "heads": 8, "width": 888},
    "350m": {"layers": 28, "heads": 16, "width": 1024},
}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "dense": {},
    "ef_sign": {},
    "onebit_adam": {"freeze_step": 1},
    "powersgd": {},
    "diloco": {"every": 2, "timeout_s": 120},  # half a GB each way, on a machine that others use
}


@dataclass(frozen=True)
class Cell:
    """What is measured: one method and model. has_views: whether DDP's gradients are views of its buckets."""

    model: str
    method: str
    has_views: bool = False

    @property
    def name(self) -> str:
        return f"memory-{self.model}-{self.method}{'-views' * self.has_views}"

    @property
    def settings(self) -> dict[str, Any]:
        optimizer = {"name": "adamw", "lr": 1e-4}
        sizes = {
            **MODELS[self.model],
            "context": 32,
            "batch": 1,
            "steps": 4 if self.method == "diloco" else 3,
            "seed": 1,
        }
        method = {"method": self.method, "options": dict(METHODS[self.method]), "optimizer": optimizer}
        return {**method, **sizes, "bucket_views": self.has_views}


CELLS = [
    Cell(model, method, has_views)
    for model in MODELS
    for method in METHODS
    for has_views in (False, True)
    if (has_views and model == "124m" and method == "ef_sign")
    or has_views == (model == "350m" and method != "diloco")  # two ranks of 350 M may take all of a machine
]


def formula(settings: Mapping[str, Any]) -> float:
    """Bytes per parameter that the docs promise."""
    from commopt.methods import build

    sys.path.append(str(Path(__file__).parents[1]))
    tables = importlib.import_module("site_tables")

    method = build(settings["method"], **settings["options"])
    copies = 0.0 if settings["bucket_views"] else 4.0
    on_gpu, on_host = tables.state_bytes(method, tables.ADAMW, machines=NODES)
    return float(8.0 + copies + on_gpu + on_host)


def check_room(name: str, free_bytes: int) -> None:
    """Raise CommoptError if a cell takes the memory that other programs need."""
    if free_bytes < LEAST_BYTES:
        raise CommoptError(
            f"{name}: ended, as it left {free_bytes / 1e9:.2f} GB of this machine's memory; end other programs, or measure a smaller model"
        )


def free_bytes() -> int:
    """What programs can still allocate on this machine."""
    (found,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    return 1024 * int(found.split()[1])


def measure(entry: Entry, emulation: Emulation) -> dict[str, Any]:
    """Run one cell. Raises CommoptError if it fails, with what a rank said."""
    settings = entry["settings"]
    with tempfile.TemporaryDirectory(prefix="bench-memory-") as scratch:
        words = [str(PROGRAM), "--settings", json.dumps(settings), "--out", scratch]
        is_outer = settings["method"] == "diloco"
        finish(
            entry,
            words,
            emulation,
            Path(scratch, "log"),
            LONGEST_S,
            independent=is_outer,
            check=lambda: check_room(entry["name"], free_bytes()),
        )
        ranks = [json.loads(Path(scratch, f"rank{rank}.json").read_text()) for rank in range(NODES)]
    worst = max(ranks, key=lambda rank: int(rank["most_bytes"][-1]))
    return {**worst, "formula": round(formula(settings), 3)}


def per_parameter(cell: Mapping[str, Any], process_bytes: float) -> list[float]:
    """Bytes per parameter beside the process itself: the most until it was attached, and until the end of each step."""
    return [(nbytes - process_bytes) / cell["parameters"] for nbytes in cell["most_bytes"]]


def report(cells: Sequence[Mapping[str, Any]]) -> Report:
    """A row for each large model's stored cell whose small one is stored, too."""
    small = {cell["settings"]["method"]: cell for cell in cells if cell["name"].startswith("memory-small-")}
    rows = []
    for cell in cells:
        settings = cell["settings"]
        if cell["name"].startswith("memory-small-") or settings["method"] not in small:
            continue
        process_bytes = small[settings["method"]]["most_bytes"][-1]
        most = per_parameter(cell, process_bytes)
        ratio = most[-1] / cell["formula"]
        rows.append(
            [
                f"`{settings['method']}`{', views' * settings['bucket_views']}",
                f"{cell['parameters'] / 1e6:.0f}",
                f"{cell['most_bytes'][-1] / 1e9:.2f}",
                f"{process_bytes / 1e9:.2f}",
                f"{most[1]:.1f}",
                f"{most[-1]:.1f}",
                f"{cell['formula']:.1f}",
                f"{ratio:.2f}{' *' * (ratio > CLOSE)}",
                f"{sum(cell['seconds'][-2:]) / 2:.1f}",
            ]
        )
    headings = ("method", "M parameters", "peak, GB", "process, GB", "step 1", "peak", "formula", "ratio", "s per step")
    sheet = Sheet(
        f"Peak memory of one of {NODES} ranks, in all and in bytes per parameter", headings, rows, ("method",)
    )
    return Report([sheet] if rows else [], [f"* more than {CLOSE - 1:.0%} above the formula"])


def parser() -> argparse.ArgumentParser:
    made, what = new_parser(__doc__, STORED, f"patterns of {', '.join(cell.name for cell in CELLS)}")
    what.add_argument("--run-plan", type=Path, help=argparse.SUPPRESS)
    return made


def run(args: argparse.Namespace) -> None:
    """Do what the command line says. Raises ConfigError for a mistake in it, before anything is started."""
    cells, file = matching(args.only, CELLS), args.results or STORED
    if not only_shows(args):
        cluster = {"name": "memory-2", "nodes": NODES, "links": {"rate": None}}
        entries = ({"name": cell.name, "cluster": cluster, "settings": cell.settings} for cell in cells)
        measure_missing(entries, file, redo=args.redo)
    store = Store(file)
    present(report([found for cell in cells if (found := store.get(cell.name)) is not None]), args)


def outcome(result: Mapping[str, Any]) -> str:
    return f"{result['most_bytes'][-1] / result['parameters']:.1f} bytes per parameter of {result['formula']:.1f}"


if __name__ == "__main__":
    main(parser(), lambda args: start(args, run, measure, outcome))
