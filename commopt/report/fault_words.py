"""A fault, and what it cost, in a few words."""

from __future__ import annotations

from commopt.record.words import seconds_text, times_text
from commopt.report.document import Fault, FaultCost

STOPPED = 2.0  # a stop of fewer median steps is called none


def fault_text(fault: Fault) -> str:
    """`node2 killed`, `node0 cut from node1, 20 s`, `node3 slowed 5.0x`."""
    nodes = " and ".join(fault.nodes)
    for_text = "" if fault.for_s is None else f" for {seconds_text(fault.for_s)}"
    if fault.kind == "cut" and len(fault.nodes) == 2:
        return f"{fault.nodes[0]} cut from {fault.nodes[1]}{for_text}"
    if fault.kind == "slow" and fault.factor is not None:
        return f"{nodes} slowed {times_text(fault.factor)}{for_text}"
    words = {"kill": "killed", "restart": "started again", "hang": "hung"}
    return f"{nodes} {words.get(fault.kind, fault.kind)}{for_text}"


def stop_text(cost: FaultCost) -> str | None:
    """`3.1 s (rank 0, 31 steps' time)`, or `none` where no survivor stood still; None where there was no survivor."""
    if cost.longest_stop_s is None:
        return None
    if not cost.median_step_s or cost.longest_stop_s < STOPPED * cost.median_step_s:
        return "none" if cost.median_step_s else seconds_text(cost.longest_stop_s)
    steps = cost.longest_stop_s / cost.median_step_s
    return f"{seconds_text(cost.longest_stop_s)} (rank {cost.stopped_rank}, {steps:.0f} steps' time)"


def missed_text(cost: FaultCost) -> str:
    """`3 (rank 0: 2, rank 1: 1)`, or `0`."""
    total = sum(each.rounds for each in cost.missed)
    who = ", ".join(f"rank {each.rank}: {each.rounds}" for each in cost.missed)
    return f"{total} ({who})" if total else "0"


def back_text(fault: Fault) -> str | None:
    """`4.2 s, step 182`, or `never`; None where the fault is not a restart."""
    if fault.kind != "restart":
        return None
    if fault.cost.back_after_s is None:
        return "never"
    return f"{seconds_text(fault.cost.back_after_s)}, step {fault.cost.back_at_step}"


def cost_text(fault: Fault) -> str:
    """`longest stop 3.1 s (rank 0, 31 steps' time); 3 rounds missed (...)`."""
    stop, back = stop_text(fault.cost), back_text(fault)
    missed = missed_text(fault.cost)
    parts = [
        None if stop is None else "no stop" if stop == "none" else f"longest stop {stop}",
        None if missed == "0" else f"rounds missed: {missed}",
        None if back is None else "never stepped again" if back == "never" else f"stepped again after {back}",
    ]
    return "; ".join(part for part in parts if part) or "nobody left to see it"
