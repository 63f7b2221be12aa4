"""Predict steps on emulated clusters from a probe, measure the same steps, and compare.

python scripts/bench/plan.py                            all cells that are not stored yet: an hour; Ctrl-C keeps what is done
python scripts/bench/plan.py --only '2x1-*' --redo
python scripts/bench/plan.py --table | --page           show what is stored, or write it into docs/planning.md

A cell is a cluster and a model. First `commopt probe` runs there, with the model's script; then the same script trains
some steps under each of eight methods. What `commopt advise` would predict from the probe is compared with the median step. Nothing
is fitted to what is measured. All ranks share this machine's cores, and so they do while it is probed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command import DOCS, Report, main, matching, new_parser, only_shows, present
from sheets import Sheet, figure, judged
from store import RESULTS, Store

from commopt.advise.advice import Cluster, advise
from commopt.advise.measured import at_rate, profiles_in, settings_of
from commopt.cluster.spec import load_cluster
from commopt.errors import LaunchError
from commopt.plan.probe import Probe
from commopt.plan.profile import profiles
from commopt.record.words import seconds_text
from commopt.report import drawing

STORED, PAGE = RESULTS / "step.jsonl", DOCS / "planning.md"
PROGRAM = Path(__file__).with_name("plan_ranks.py")
METHODS = ("dense", "fp16", "two_way(int8)", "two_way(4bit)", "loco", "ef_sign", "onebit_adam", "powersgd")
MODELS: Mapping[str, Mapping[str, int]] = {"1m": {"layers": 5, "width": 128}, "300k": {"layers": 3, "width": 80}}
CLUSTERS = (  # machines, slots, rate
    *((2, 1, rate) for rate in ("20mbit", "100mbit", "1gbit")),
    *((3, 1, rate) for rate in ("50mbit", "500mbit")),
    *((4, 1, rate) for rate in ("20mbit", "200mbit")),
    (6, 1, "100mbit"),
    *((2, 2, rate) for rate in ("50mbit", "1gbit")),
    (3, 2, "200mbit"),
    (4, 2, "100mbit"),
)
MEDIAN, MOST, NEAR, CELLS = 0.15, 0.35, 1.10, 22  # the targets: errors, and how often the method named is near the best
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Cell:
    machines: int
    slots: int
    rate: str
    model: str

    @property
    def name(self) -> str:
        return f"plan-{self.machines}x{self.slots}-{self.rate}-{self.model}"

    def settings(self) -> dict[str, Any]:
        return {"methods": list(METHODS), **MODELS[self.model]}

    def yaml(self) -> str:
        name = f"{self.machines}x{self.slots}-{self.rate}"
        return f"name: {name}\nnodes: {self.machines}\nslots: {self.slots}\nlinks:\n  rate: {self.rate}\n"


def all_cells() -> list[Cell]:
    return [Cell(*cluster, model) for cluster in CLUSTERS for model in MODELS]


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(cell: Cell) -> dict[str, Any]:
    """The probe's file, the measured steps by method, and how long both took. Raises LaunchError if a command fails."""
    sizes = [word for key, value in MODELS[cell.model].items() for word in (f"--{key}", str(value))]
    names = ",".join(METHODS)
    with tempfile.TemporaryDirectory(prefix="bench-plan-") as scratch:
        cluster, probe, steps = (Path(scratch, name) for name in ("cluster.yaml", "probe.json", "steps.json"))
        cluster.write_text(cell.yaml())
        begun_s = time.monotonic()
        call("probe", str(cluster), "--out", str(probe), "--methods", names, "--", str(PROGRAM), *sizes)
        probed_s = time.monotonic() - begun_s
        call("launch", str(cluster), "--", str(PROGRAM), "--methods", names, "--out", str(steps), *sizes)
        found = {"probe": json.loads(probe.read_text()), "measured": json.loads(steps.read_text())}
    return {**found, "probe_s": round(probed_s, 1)}


def call(*words: str) -> None:
    """Run a command of commopt. Raises LaunchError with the end of what it said if it fails or takes too long."""
    command = [sys.executable, "-m", "commopt", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{' '.join(words[:2])}: took more than {TIMEOUT_S:g} s") from None
    if done.returncode:
        raise LaunchError(f"{' '.join(words[:2])}: {(done.stderr or done.stdout).strip()[-2000:]}")


# ---- comparing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """One cell: predicted and measured seconds by method, and the method that is named."""

    cell: Cell
    predicted: Mapping[str, float]
    measured: Mapping[str, float]
    named: str

    @property
    def errors(self) -> dict[str, float]:
        return {name: self.predicted[name] / step_s - 1 for name, step_s in self.measured.items()}

    @property
    def best(self) -> str:
        return min(self.measured, key=lambda name: self.measured[name])

    @property
    def over_best(self) -> float:
        """The step of the method named over the best one."""
        return self.measured[self.named] / self.measured[self.best]


def compared(cell: Cell, found: Mapping[str, Any]) -> Compared:
    """What `advise` makes of the stored probe, beside what was measured."""
    probe = Probe.model_validate(found["probe"])
    assert probe.script is not None
    with tempfile.TemporaryDirectory() as scratch:
        (file := Path(scratch, "cluster.yaml")).write_text(cell.yaml())
        spec = load_cluster(file)
    settings = settings_of(probe, probe.script.compute_s, tuple(probe.script.buckets), overlap=probe.script.overlap)
    known = profiles_in(probe, [profiles()[name] for name in METHODS])
    advice = advise(
        Cluster(spec.name, spec.link_model(), spec.slots, is_gpu=False),
        known,
        settings,
        named=METHODS,
        at_rate=at_rate(probe, settings["likely"]),
    )
    return Compared(cell, {row.name: row.likely.step_s for row in advice.rows}, found["measured"], advice.best.name)


def report(every: Sequence[Compared]) -> Report:
    """A row per cell, and how the targets stand."""
    if not every:
        return Report([])
    rows: list[list[Any]] = []
    for one in every:
        errors = [abs(error) for error in one.errors.values()]
        worst = max(one.errors, key=lambda name: abs(one.errors[name]))
        rows.append(
            [
                f"{one.cell.machines} x {one.cell.slots}, {one.cell.rate}, {one.cell.model}",
                seconds_text(one.measured["dense"]),
                seconds_text(one.predicted["dense"]),
                f"{statistics.median(errors):.0%}",
                judged(f"{one.errors[worst]:+.0%} `{worst}`", max(errors) <= MOST),
                f"`{one.named}`",
                f"`{one.best}`",
                judged(f"{one.over_best:.2f}", one.over_best <= NEAR),
            ]
        )
    headings = (
        "cluster, model",
        "dense",
        "predicted",
        "median error",
        "largest",
        "named",
        "fastest",
        "named over fastest",
    )
    sheet = Sheet(
        "Predicted steps against measured ones", headings, rows, left=("cluster, model", "largest", "named", "fastest")
    )
    return Report([sheet], remarks(every), lambda file: draw(every, file))


def remarks(every: Sequence[Compared]) -> list[str]:
    """The targets, in sentences."""
    errors = sorted(abs(error) for one in every for error in one.errors.values())
    near = sum(one.over_best <= NEAR for one in every)
    within = sum(error <= MOST for error in errors)
    return [
        f"{len(errors)} steps in {len(every)} cells: the median error is {statistics.median(errors):.1%} (target {MEDIAN:.0%}), the "
        f"largest {errors[-1]:.0%} (target {MOST:.0%}), {within} are within {MOST:.0%}",
        f"the method named is within 10 % of the fastest in {near} of {len(every)} cells (target {CELLS} of 24)",
    ]


def draw(every: Sequence[Compared], file: Path) -> None:
    """Predicted against measured, a mark for each step."""
    chosen = drawing.colours([(name, name.partition("(")[0]) for name in METHODS])
    with figure(file, "Predicted and measured steps", 7.2, 1) as (axes,):
        axes.set_xscale("log")
        axes.set_yscale("log")
        ends = [s for one in every for s in (*one.measured.values(), *one.predicted.values())]
        line = [min(ends) / 1.3, max(ends) * 1.3]
        axes.fill_between(
            line, [x * (1 - MOST) for x in line], [x * (1 + MOST) for x in line], color=drawing.FAINT, lw=0, alpha=0.5
        )
        axes.fill_between(
            line, [x * (1 - MEDIAN) for x in line], [x * (1 + MEDIAN) for x in line], color=drawing.FAINT, lw=0
        )
        axes.plot(line, line, color=drawing.QUIET, lw=1)
        for name in METHODS:
            pairs = [(one.measured[name], one.predicted[name]) for one in every]
            axes.plot(
                *zip(*pairs, strict=True), "o", ms=5, mfc=drawing.mix(chosen[name], 0.7), mec=chosen[name], label=name
            )
        axes.set_xlim(*line)
        axes.set_ylim(*line)
        axes.set_xlabel("measured; bands: 15 and 35 %")
        axes.set_ylabel("predicted")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g} s" if value >= 1 else f"{1e3 * value:g} ms")
        axes.legend(loc="upper left", frameon=False)


# ---- the command line ------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    made, _ = new_parser(__doc__, STORED, "only cells whose names match a pattern, such as 'plan-2x1-*'", PAGE)
    made.set_defaults(program="plan.py")  # whose cells are stored beside those of step.py
    return made


def run(args: argparse.Namespace) -> None:
    """Do what the command line says. Raises ConfigError for a mistake in it, before anything is measured."""
    shows, cells = only_shows(args), matching(args.only, all_cells())
    store = Store(args.results or STORED, ["plan-*"] if args.redo else ())
    try:
        for k, cell in enumerate(cells, start=1):
            if shows or store.get(cell.name, cell.settings()) is not None:
                continue
            print(f"[{k}/{len(cells)}] {cell.name} ...", end=" ", flush=True)
            begun_s = time.monotonic()
            try:
                store.put(cell.name, cell.settings(), measure(cell))
            except LaunchError as error:
                print(f"failed: {error}", flush=True)
                continue
            one = compared(cell, store.get(cell.name) or {})
            errors = [abs(error) for error in one.errors.values()]
            said = f"median error {statistics.median(errors):.0%}, at most {max(errors):.0%}, {one.named} {one.over_best:.2f}"
            print(f"{said}; took {seconds_text(time.monotonic() - begun_s)}", flush=True)
    finally:
        found = [(cell, store.get(cell.name)) for cell in cells]
        present(report([compared(cell, one) for cell, one in found if one is not None]), args, PAGE)


if __name__ == "__main__":
    main(parser(), run)
