"""Synthetic runs, written line by line as ranks would write them."""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from commopt.plan.links import wire_bytes
from commopt.report.document import Cluster, Environment, Node, Results, RunResult
from commopt.report.results import assemble, collect

EPOCH_S = 1_800_000_000.0
Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """How one method behaves: the steps of dense and full messages for `warmup` steps, then its own."""

    method: str
    step_s: float
    payload_bytes: float
    warmup: int = 0
    final_loss: float = 2.374
    compute_s: float = 0.095
    steps: int = 300
    ranks: int = 4
    seed: int = 0

    def loss(self, step: int, noise: random.Random) -> float:
        return self.final_loss + 3.2 * math.exp(-step / 38) + 0.25 * math.exp(-step / 200) + noise.gauss(0, 0.035)


DENSE = Plan("dense", 1.24, 6.1e6)
FP16 = Plan("fp16", 0.65, 3.05e6, final_loss=2.375, seed=1)
ONEBIT = Plan("onebit_adam", 0.131, 0.19e6, warmup=24, final_loss=2.379, compute_s=0.097, seed=2)


def traffic(plan: Plan, rank: int, calls: int) -> dict[str, Any]:
    """A `Traffic.as_dict()` after `calls` steps."""
    nbytes = plan.payload_bytes * calls
    row = {"method": plan.method, "operation": "all_reduce", "bucket": "bucket0", "calls": calls, "bytes": nbytes}
    by_peer = {str((rank + 1) % plan.ranks): nbytes} if plan.ranks > 1 else {}
    return {"payload_bytes": nbytes, "by_peer": by_peer, "by_operation": [row]}


def lines(plan: Plan, rank: int, *, nic: bool = True, overcount: float = 1.012) -> Lines:
    """The lines of one rank of a finished run."""
    noise, shared = random.Random(f"{plan.seed} {rank}"), random.Random(plan.seed)
    tx_bytes = wire_bytes(plan.payload_bytes * (plan.steps - plan.warmup)) * overcount * (plan.ranks > 1)
    at_s, out = 0.0, []

    def say(kind: str, **fields: Any) -> None:
        out.append({"kind": kind, "at_s": at_s, **fields})

    place = {"world_size": plan.ranks, "node": f"node{rank}", "mtu": 1500}
    options = {"warmup": plan.warmup} if plan.warmup else {}
    what = {"method": plan.method, "options": options, "parameters": 1_016_000, "steps": plan.steps}
    say("start", **place, **what, epoch_s=EPOCH_S, resumed_at=0)
    for step in range(plan.steps):
        steady = step >= plan.warmup
        if step == plan.warmup:
            say("counters", name="begin", traffic=traffic(plan, rank, 0), nic_tx_bytes=0 if nic else None)
        seconds = (plan.step_s if steady else DENSE.step_s) * shared.gauss(1, 0.02)
        wait_s = max(0.0, (seconds - plan.compute_s * 1.08) * noise.gauss(1, 0.01))
        at_s += seconds
        loss = plan.loss(step, shared) + noise.gauss(0, 0.02)
        say("step", step=step, loss=loss, seconds=seconds, wait_s=wait_s, tokens=4096, steady=steady)
        if (step + 1) % 100 == 0 or step + 1 == plan.steps:
            say("validation", step=step, loss=plan.loss(step, random.Random(1)) + 0.03, tokens=65536)
    end = traffic(plan, rank, plan.steps - plan.warmup)
    say("counters", name="end", traffic=end, nic_tx_bytes=round(tx_bytes) if nic else None)
    say("compute", seconds=[plan.compute_s * noise.gauss(1, 0.02) for _ in range(10)])
    say("end")
    return out


Edit = Callable[[int, Lines], Lines]


def change(kind: str, fields: Callable[[int, dict[str, Any]], dict[str, Any]]) -> Edit:
    """An edit of the lines of one kind; `fields` returns the changed fields of a rank's line."""
    return lambda rank, lines: [{**line, **fields(rank, line)} if line["kind"] == kind else line for line in lines]


def write_run(folder: Path, plan: Plan, *, edit: Edit | None = None, **how: Any) -> Path:
    """Write a run's files; `edit` may change a rank's lines before that, and drops the rank by returning none."""
    return write_lines(folder, [lines(plan, rank, **how) for rank in range(plan.ranks)], edit)


def write_lines(folder: Path, of_ranks: Sequence[Lines], edit: Edit | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for rank, written in enumerate(of_ranks):
        if kept := edit(rank, written) if edit else written:
            (folder / f"rank{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    return folder


def run_of(folder: Path, plan: Plan, **how: Any) -> RunResult:
    return collect(write_run(folder / plan.method, plan, **how))


def short(plan: Plan, steps: int = 40) -> Plan:
    """The same plan with fewer steps, for quick tests."""
    return replace(plan, steps=steps, warmup=min(plan.warmup, steps // 4))


CLUSTER = Cluster(
    name="four-50mbit",
    nodes=[Node(name=f"node{i}", ranks=1, rate="50mbit", delay="1ms") for i in range(4)],
    emulation="netns",
)
ENVIRONMENT = Environment(python="3.11.7", torch="2.13.0", commopt="0.1.0", cpu_count=2, platform="Linux 6.1 x86_64")


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def results_of(runs: Sequence[RunResult], cluster: Cluster = CLUSTER) -> Results:
    return assemble(runs, cluster, environment=ENVIRONMENT)
