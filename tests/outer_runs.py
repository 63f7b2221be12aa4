"""Runs with outer rounds and faults, written line by line as ranks and the launcher would write them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from synthetic_runs import EPOCH_S, Edit, Lines, write_lines

from commopt.report.document import RunResult
from commopt.report.results import collect

FINAL_LOSS = 2.4


@dataclass(frozen=True)
class Absence:
    """A rank is killed after `after` steps, and resumes at step `resumed_at`, `back_s` seconds after the first start."""

    after: int
    back_s: float | None = None
    resumed_at: int = 0


@dataclass(frozen=True)
class OuterPlan:
    """Replicas that average in pairs every `every` steps; `stops` are extra seconds in the step (rank, step)."""

    method: str = "noloco"
    ranks: int = 4
    steps: int = 60
    every: int = 10
    step_s: float = 0.1
    start_s: float = 0.0  # rank r starts r times this later
    stops: Mapping[tuple[int, int], float] = field(default_factory=dict)
    missed: Sequence[tuple[int, int]] = ()  # (rank, round)
    absences: Mapping[int, Absence] = field(default_factory=dict)


def outer_lines(plan: OuterPlan, rank: int) -> Lines:
    """What one rank writes; each start has a clock of its own."""
    absence = plan.absences.get(rank)
    first_s = rank * plan.start_s
    if absence is None:
        return _one_start(plan, rank, first_s, 0, plan.steps)
    lines = _one_start(plan, rank, first_s, 0, absence.after)
    if absence.back_s is not None:
        lines += _one_start(plan, rank, absence.back_s, absence.resumed_at, plan.steps)
    return lines


def _one_start(plan: OuterPlan, rank: int, start_s: float, begin: int, end: int) -> Lines:
    at_s, out = 0.0, []

    def say(kind: str, **fields: Any) -> None:
        out.append({"kind": kind, "at_s": round(at_s, 6), **fields})

    place = {"world_size": plan.ranks, "node": f"node{rank}", "mtu": 1500}
    what = {"method": plan.method, "options": {"every": plan.every}, "parameters": 1_016_000, "steps": plan.steps}
    say("start", **place, **what, epoch_s=EPOCH_S + start_s, resumed_at=begin)
    for step in range(begin, end):
        seconds = plan.step_s + plan.stops.get((rank, step), 0.0)
        at_s += seconds
        loss = FINAL_LOSS + 3.2 * math.exp(-step / 38)
        say("step", step=step, loss=loss, seconds=seconds, wait_s=0.0, tokens=4096, steady=step >= 3)
        if (step + 1) % plan.every == 0:
            number = (step + 1) // plan.every - 1
            missed = (rank, number) in plan.missed
            partner = (rank + 1 + number % max(1, plan.ranks - 1)) % plan.ranks
            spread = None if missed else 0.002 + 0.05 * math.exp(-step / 60)
            who = {"members": [rank] if missed else sorted({rank, partner}), "missed": missed}
            costs = {"blocked_s": 0.01, "exchange_s": 0.5 if missed else 0.2, "nbytes": 4e6}
            say("round", step=step + 1, round=number, **who, **costs, spread=spread)
    if end == plan.steps:
        say("validation", step=plan.steps, loss=FINAL_LOSS + 0.01 * rank, tokens=65536)
        say("end")
    return out


def fault(kind: str, nodes: Sequence[str], *, at_step: int, at_s: float, phase: str = "begin", **fields: Any) -> Any:
    """One line of the launcher's `faults.jsonl`, `at_s` seconds after the first rank's start."""
    when = {"epoch_s": EPOCH_S + at_s, "at_step": at_step, "phase": phase}
    return {"for_s": None, "factor": None, **fields, **when, "kind": kind, "nodes": list(nodes)}


def write_outer(folder: Path, plan: OuterPlan, faults: Sequence[Any] = (), edit: Edit | None = None) -> Path:
    """Write the ranks' files, and the launcher's if there are faults; `edit` may change a rank's lines before that."""
    write_lines(folder, [outer_lines(plan, rank) for rank in range(plan.ranks)], edit)
    if faults:
        (folder / "faults.jsonl").write_text("".join(json.dumps(line) + "\n" for line in faults))
    return folder


def outer_run(
    folder: Path, plan: OuterPlan, faults: Sequence[Any] = (), *, edit: Edit | None = None, failure: str | None = None
) -> RunResult:
    return collect(write_outer(folder / plan.method, plan, faults, edit), failure=failure)


STORM = OuterPlan(
    steps=300,
    start_s=0.3,
    stops={(0, 121): 3.1, (1, 129): 1.4, (0, 169): 2.0, (1, 169): 2.0, **{(3, step): 0.4 for step in range(180, 196)}},
    missed=[(0, 12), (1, 12), (0, 16), (1, 17), (1, 19)],
    absences={2: Absence(after=121, back_s=29.5, resumed_at=218)},
)
STORM_FAULTS = [
    fault("kill", ["node2"], at_step=120, at_s=12.4),
    fault("cut", ["node0", "node1"], at_step=150, at_s=18.1, for_s=4),
    fault("cut", ["node0", "node1"], at_step=150, at_s=22.1, for_s=4, phase="end"),
    fault("slow", ["node3"], at_step=180, at_s=22.4, factor=5),
    fault("restart", ["node2"], at_step=195, at_s=26.2),
    fault("slow", ["node3"], at_step=180, at_s=26.3, factor=5, phase="end"),
]
