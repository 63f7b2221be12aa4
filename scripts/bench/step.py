"""Time one training step on four or two emulated nodes under every method and torch's own hooks, and how far that is from the floor.

python scripts/bench/step.py                                        all cells that are not stored yet: hours; Ctrl-C keeps what is done
python scripts/bench/step.py --clusters 50mbit --models 1m --methods dense,ef_sign,torch_ddp
python scripts/bench/step.py --only '*-5m-torch_*' --redo           again, whatever is stored
python scripts/bench/step.py --table | --markdown                   show what is stored, and measure nothing
python scripts/bench/step.py --race                                 the race: 12 minutes; --quick: a look in two, stored apart
python scripts/bench/step.py --page                                 write the race, its figure, and two nodes' steps into docs/steps.md

A cell is one cluster, model and method: a few warm-up steps, 12 steady ones, and 20 with communication switched off. The
cells of one cluster run one after the other on the same emulated network. They are stored in scripts/bench/results/step.jsonl.
In the race every method and peer trains the same GPT for the same seconds; see step_race.py for who runs, and with which options.

floor   the bytes that the kernel counted on the busiest interface, in the direction with more of them, over the link's rate
ratio   step / max(compute, floor): 1 is a step that hides all communication behind the computation, or the other way round.
        The shaper lets up to max(16 KiB, 2 ms) of a link's rate pass at once, so a ratio can be a few percent below 1
x DDP   the step over torch DDP's, of the same cluster and model

If there are as many cores as nodes, each rank keeps to one of them: on two cores, these are the clusters two-50mbit and so on.
Otherwise ranks share the cores: compute is several times what it would be on a machine per rank, also where a method's
arithmetic runs beside it, so unshaped ratios are harsher than on real nodes. Compare ratios within one table, never
milliseconds of two machines. What other programs used of the cores is stored with each cell, and told.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import step_race
from command import DOCS, main, matching, names, new_parser, only_shows, present
from emulated import Entry, measure_all, start
from step_results import PEERS, outcome, overview, report
from store import RESULTS, Store

from commopt.cluster.emulate import Emulation
from commopt.cluster.run import Job
from commopt.errors import ConfigError
from commopt.record.words import seconds_text

if TYPE_CHECKING:
    from commopt.report.document import RunResult

STORED, PAGE = RESULTS / "step.jsonl", DOCS / "steps.md"
PROGRAM = Path(__file__).parent / "step_ranks.py"

STEADY_STEPS, FREEZE_STEP, LONGEST_WARMUP = 12, 4, 100
SETTLED = 3  # no step before is counted as steady
RATES = {"50mbit": "50mbit", "100mbit": "100mbit", "1gbit": "1gbit", "unshaped": None}
CLUSTERS: Mapping[str, tuple[int, str | None]] = {  # nodes, rate
    **{name: (4, rate) for name, rate in RATES.items()},
    **{f"two-{name}": (2, rate) for name, rate in RATES.items()},
}
MODELS: Mapping[str, Mapping[str, int]] = {
    "1m": {"layers": 5, "width": 128},
    "5m": {"layers": 6, "width": 256},
    "25m": {"layers": 8, "width": 512},
}
SIZES = {"heads": 4, "context": 64, "batch": 4, "seed": 1}
RACE_CLUSTER = "two-50mbit"  # where each rank has a core: four on two cores would be slowed down by each other, and not by the link
BUCKET_MB = 1  # small enough that a compressed method's exchange overlaps with backward

OPTIMIZER: Mapping[str, Any] = {"name": "adam", "lr": 1e-3}
SGD: Mapping[str, Any] = {"name": "sgd", "lr": 0.01}
# What brings a method into its steady phase soon, or makes it comparable with a peer; others run as they are.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "onebit_adam": {"freeze_step": FREEZE_STEP},
    "onebit_lamb": {"freeze_step": FREEZE_STEP},
    "deepspeed_onebit_adam": {"freeze_step": FREEZE_STEP},
    "grace_top_k": {"compress_ratio": 0.01},
    "zero_one_adam": {"var_freeze_step": FREEZE_STEP, "local_step_clipper": 1},  # every step communicates
    "powersgd": {"rank": 1},
    "qsgd": {"levels": 7},  # 4 bits
    "threshold": {"threshold": 0.005},
}
# Adam applies what the others and the peers average, so that their arithmetic is the same; these refuse it.
OPTIMIZERS: Mapping[str, Mapping[str, Any]] = {"dgc": SGD, "signum": SGD}


@dataclass(frozen=True)
class Cell:
    """What is measured: one method on one cluster and model, in a race of so many seconds if it has them. Peers are methods too."""

    cluster: str
    model: str
    method: str
    seconds: float | None = None

    @property
    def name(self) -> str:
        race = f"race-{self.seconds:g}s-" if self.seconds else ""
        return f"{race}{self.cluster}-{self.model}-{self.method}"


# ---- what to measure -------------------------------------------------------------------------------------------------


def all_methods() -> list[str]:
    """commopt's methods that exchange in every step, as they are registered, and the peers."""
    from commopt.methods import METHODS

    return [*(name for name, method in METHODS.items() if method.kind != "outer"), *PEERS]


def makeable(methods: Iterable[str]) -> list[str]:
    """The methods that can be made with what is known here about their options; says which ones cannot."""
    found = []
    for method in methods:
        try:
            settings_of(Cell(next(iter(CLUSTERS)), next(iter(MODELS)), method))
        except ConfigError as error:
            print(f"left out: {error}", flush=True)
        else:
            found.append(method)
    return found


def settings_of(cell: Cell) -> dict[str, Any]:
    """The options, optimizer, sizes and steps of a cell; one that is stored with others is measured again."""
    if cell.seconds:
        buckets = {} if cell.method in PEERS else {"bucket-mb": BUCKET_MB}
        return {**step_race.settings_of(cell.method, cell.seconds), **MODELS[cell.model], **SIZES, **buckets}
    settings = {"options": OPTIONS.get(cell.method, {}), "optimizer": OPTIMIZERS.get(cell.method, OPTIMIZER)}
    sizes: dict[str, Any] = {**MODELS[cell.model], **SIZES}
    warmup = 0
    if cell.method not in PEERS:
        import torch
        from building import build

        try:  # on a model of no consequence
            warmup = build({"method": cell.method, **settings}, torch.nn.Linear(2, 2))[0].warmup_steps
        except ConfigError as error:
            raise ConfigError(f"{error}; look at OPTIONS and OPTIMIZERS in {Path(__file__).name}") from None
        sizes["bucket-mb"] = BUCKET_MB  # peers keep torch's own sizes
    if warmup > LONGEST_WARMUP:
        raise ConfigError(
            f"method {cell.method}: is steady after {warmup} steps only; give it OPTIONS in {Path(__file__).name}"
        )
    return {**settings, "steps": max(SETTLED, warmup) + STEADY_STEPS, **sizes}


def cluster_of(name: str) -> dict[str, Any]:
    """The specification of a cluster."""
    nodes, rate = CLUSTERS[name]
    return {"name": f"{nodes}-{rate or 'unshaped'}", "nodes": nodes, "links": {"rate": rate}}


def program_words(cell: Cell, settings: Mapping[str, Any]) -> list[str]:
    """The program of the ranks and its arguments."""
    return [str(PROGRAM), cell.method, json.dumps(settings)]


# ---- measuring: inside the namespaces of one cluster -----------------------------------------------------------------


class StalledError(Exception):
    """No rank got on."""


class Watchdog:
    """For a `Job`'s on_tick: raises StalledError when no rank has recorded anything for so many seconds."""

    def __init__(self, records: Path, limit_s: float) -> None:
        self._records, self._limit_s = records, limit_s
        self._seen_bytes, self._seen_at_s = 0, 0.0

    def __call__(self, elapsed_s: float) -> None:
        recorded = sum(file.stat().st_size for file in self._records.glob("*.jsonl"))
        if recorded != self._seen_bytes:
            self._seen_bytes, self._seen_at_s = recorded, elapsed_s
        elif elapsed_s - self._seen_at_s > self._limit_s:
            raise StalledError(f"no rank got on for {seconds_text(self._limit_s)}")


def measure(entry: Entry, emulation: Emulation, *, timeout_s: float) -> dict[str, Any]:
    """Run one cell. Whatever happens to its ranks is a result too."""
    from commopt.cli.training import is_independent
    from commopt.record.lines import RankRecord, rank_files
    from commopt.report.document import Environment
    from commopt.report.results import collect
    from commopt.report.table import event_texts

    cell, failure, details = Cell(**entry["cell"]), None, ""
    nodes, rate = CLUSTERS[cell.cluster]
    with tempfile.TemporaryDirectory(prefix="bench-step-") as scratch:
        records = Path(scratch, "record")
        try:
            job = Job(
                program_words(cell, entry["settings"]),
                emulation=emulation,
                env={"COMMOPT_RECORD": str(records)},
                log_dir=Path(scratch, "log"),
                on_tick=Watchdog(records, timeout_s),
                independent=cell.method not in PEERS and is_independent(cell.method),
            ).run()
        except StalledError as error:
            failure = str(error)
        else:
            if job.failure is not None:
                failure, details = str(job.failure).splitlines()[0], job.failure.message
                if not details and (said := last_words(Path(scratch, "log"))):
                    failure, details = said[0], "\n".join([failure, *said])
        run = collect(records, method=cell.method, failure=failure, ranks_here=range(nodes))
        ranks = {record.rank: record for record in map(RankRecord.read, rank_files(records))}
    known = ("status", "parameters", "window_steps", "step_s", "step_mean_s", "compute_s", "nic_over_model")
    return {
        **asdict(cell),
        **{name: getattr(run, name) for name in known},
        "nodes": nodes,
        "rate": rate,
        "failure": failure or run.failure,
        "details": details.splitlines()[-20:],
        "wait_share": None if cell.method in PEERS else run.wait_share,
        "interface_bytes": interface_bytes(ranks),
        "payload_bytes": run.payload_bytes_per_step,
        "events": event_texts(run),
        **({"steps": run.steps, "curve": curve_of(run)} if cell.seconds else {}),
        "environment": Environment.here().model_dump(),
    }


def curve_of(run: RunResult) -> list[tuple[float, float | None]]:
    """(seconds of training, loss) of each look in a race."""
    looks = [(round(one.seconds, 2), one.loss) for one in run.validations]
    return [(seconds, None if loss is None else round(loss, 4)) for seconds, loss in looks]


def last_words(log_dir: Path) -> list[str]:
    """What C++ said before it aborted: first what no other rank's end explains."""
    lines = [
        line.strip() for log in sorted(log_dir.glob("*.log")) for line in log.read_text(errors="replace").splitlines()
    ]
    whats = dict.fromkeys(line.partition("what():")[2].strip() for line in lines if "what():" in line)
    aborts = dict.fromkeys(line for line in lines if line.startswith("terminate called"))
    return sorted(whats, key=lambda text: "closed by peer" in text or "reset by peer" in text) or list(aborts)


def interface_bytes(ranks: Mapping[int, Any]) -> dict[str, dict[str, float | None]]:
    """Bytes per step of the window that each node sent and received, by the kernel's count; empty without a whole window."""
    counted: dict[str, dict[str, float | None]] = {}
    for record in ranks.values():
        begin, end = record.counters.get("begin"), record.counters.get("end")
        if not record.start or begin is None or end is None or end.steps <= begin.steps:
            return {}
        readings = {
            "sent": (begin.nic_tx_bytes, end.nic_tx_bytes),
            "received": (begin.traffic.get("nic_rx_bytes"), end.traffic.get("nic_rx_bytes")),
        }
        counted[str(record.start["node"])] = {
            key: None if None in (first, last) else (last - first) / (end.steps - begin.steps)
            for key, (first, last) in readings.items()
        }
    sent, received = (sum(one[key] or 0.0 for one in counted.values()) for key in ("sent", "received"))
    for one in counted.values():  # an interface that receives counts one header for several segments
        one["received"] = one["received"] and one["received"] * sent / received
    return counted


# ---- the sweep -------------------------------------------------------------------------------------------------------


def sweep(cells: Sequence[Cell], file: Path, *, redo: bool = False, timeout_s: float = 120.0) -> None:
    """Measure the cells that are not stored. Raises ConfigError for a bad option."""
    store = Store(file, ["*"] if redo else ())
    wanted = [(cell, settings) for cell in cells if store.get(cell.name, settings := settings_of(cell)) is None]
    todo: list[Entry] = [
        {
            "name": cell.name,
            "cell": asdict(cell),
            "cluster": cluster_of(cell.cluster),
            "settings": settings,
        }
        for cell, settings in wanted
    ]
    kept = f", {len(cells) - len(todo)} are stored already (--redo measures them again)" * (len(todo) < len(cells))
    print(f"{len(todo)} cells to measure{kept}", flush=True)
    measure_all(todo, file, timeout_s=timeout_s)


# ---- the command line ------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    made, what = new_parser(__doc__, STORED, "only cells whose names match a pattern, such as '50mbit-*-torch_*'", PAGE)
    made.add_argument(
        "--race", action="store_true", help=f"equal time for all; without options on {RACE_CLUSTER}, with model 1m"
    )
    made.add_argument("--quick", action="store_true", help="a race of four for a few seconds each; stored apart")
    made.add_argument("--seconds", type=float, metavar="S", help=f"of each in a race; {step_race.SECONDS:g} by default")
    made.add_argument("--clusters", metavar="NAME,...", help=f"of {', '.join(CLUSTERS)}; all by default")
    made.add_argument("--models", metavar="NAME,...", help=f"of {', '.join(MODELS)}; all by default")
    made.add_argument("--methods", metavar="NAME,...", help=f"commopt's methods and {', '.join(PEERS)}; all by default")
    made.add_argument(
        "--timeout", type=float, metavar="SECONDS", default=120.0, help="end a cell whose ranks all stall"
    )
    what.add_argument("--run-plan", type=Path, help=argparse.SUPPRESS)
    return made


def run(args: argparse.Namespace) -> None:
    """Do what the command line says. Raises ConfigError for a mistake in it, before anything is started."""
    shows = only_shows(args)
    is_race = args.race or args.quick or args.page or args.figure is not None
    if not args.timeout > 0:
        raise ConfigError(f"--timeout {args.timeout}: write a number of seconds above 0")
    if args.seconds is not None and not (is_race and args.seconds > 0):
        raise ConfigError(f"--seconds {args.seconds}: write a number above 0, with --race")
    file = args.results or (RESULTS / "step-quick.jsonl" if args.quick else STORED)
    cells = matching(args.only, race_cells(args, shows=shows) if is_race else step_cells(args, file, shows=shows))
    try:
        if not shows:
            sweep(cells, file, redo=args.redo, timeout_s=args.timeout)
    finally:
        store = Store(file)
        found = [one for cell in cells if (one := store.get(cell.name)) is not None]
        shown = step_race.report(found) if is_race else report(found)
        if is_race and (args.page or args.markdown):  # what is on the page
            cells = [cell for cell in step_cells(args, file, shows=True) if CLUSTERS[cell.cluster][0] == 2]
            steps = overview([one for cell in cells if (one := store.get(cell.name)) is not None])
            shown = replace(shown, sheets=[*shown.sheets, *steps])
        present(shown, args, PAGE)


def step_cells(args: argparse.Namespace, file: Path, *, shows: bool) -> list[Cell]:
    """The cells that are timed for a few steps."""
    clusters, models = names("--clusters", args.clusters, CLUSTERS), names("--models", args.models, MODELS)
    methods = names("--methods", args.methods, all_methods())
    if args.methods is None and shows:  # cells of names with codecs, such as two_way(sign,int8), are shown too
        methods += dict.fromkeys(re.split(r"-\d+m-", name)[-1] for name in sorted(Store(file).names) if "(" in name)
    elif args.methods is None:  # one that has just been added does not keep the others from a sweep
        methods = makeable(methods)
    return [Cell(cluster, model, method) for cluster in clusters for model in models for method in methods]


def race_cells(args: argparse.Namespace, *, shows: bool) -> list[Cell]:
    """The cells of the race; without a package that is not installed, if it is not asked for."""
    from commopt.methods import METHODS

    seconds = args.seconds or (step_race.QUICK_SECONDS if args.quick else step_race.SECONDS)
    clusters, models = (
        names("--clusters", args.clusters or RACE_CLUSTER, CLUSTERS),
        names("--models", args.models or "1m", MODELS),
    )
    methods = names("--methods", args.methods, [*PEERS, *METHODS])
    if args.methods is None:
        methods = list(step_race.QUICK if args.quick else step_race.OPTIONS)
        if not shows and "decent_dp" in methods and importlib.util.find_spec("decent_dp") is None:
            print("left out: decent_dp is not installed; pip install decent-dp", flush=True)
            methods.remove("decent_dp")
    return [Cell(cluster, model, method, seconds) for cluster in clusters for model in models for method in methods]


if __name__ == "__main__":
    main(parser(), lambda args: start(args, run, measure, outcome))
