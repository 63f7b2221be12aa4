"""Outer rounds and faults in tables and words: what each method's rounds cost, and what each fault cost."""

from __future__ import annotations

from commopt.record.words import megabytes, milliseconds, seconds_text, spread_text, times_text
from commopt.report.columns import NOTHING, Column, cells_of
from commopt.report.document import Fault, FaultCost, Results, RunResult

STOPPED = 2.0  # a stop of fewer median steps is called none
ROUND_COLUMNS = (
    Column(("outer", "rounds"), "the method; a number where it ran more than once", lambda run, _: run.name),
    Column(("", "rounds"), "outer rounds of the rank that made most", lambda run, _: run.rounds and run.rounds.rounds),
    Column(
        ("", "missed"),
        "rounds in which a scheduled peer's message did not come in time, so that a rank went on without it; over all ranks",
        lambda run, _: run.rounds and run.rounds.missed,
    ),
    Column(
        ("blocked", "ms/round"),
        "milliseconds that training stood still for a round, mean over rounds and ranks",
        lambda run, _: run.rounds and run.rounds.blocked_s,
        milliseconds,
    ),
    Column(
        ("worst", "rank"),
        "the same of the rank with the largest mean",
        lambda run, _: run.rounds and run.rounds.blocked_worst_s,
        milliseconds,
    ),
    Column(
        ("blocked", "%"),
        "share of the steps' time that they stood still for rounds",
        lambda run, _: run.rounds and run.rounds.blocked_share,
        "{:.1%}".format,
    ),
    Column(
        ("exchange", "s"),
        "seconds from a round's start to its last message, mean; more than it blocks, where training goes on meanwhile",
        lambda run, _: run.rounds and run.rounds.exchange_s,
        "{:.2f}".format,
    ),
    Column(
        ("sent", "MB/step"),
        "megabytes (10^6) that a rank sent in rounds, over all its optimizer steps",
        lambda run, _: run.rounds and run.rounds.bytes_per_step,
        megabytes,
    ),
    Column(
        ("spread", "at end"),
        "how far apart the replicas were in the last round: root mean square over replicas of ||x_i - mean|| / ||mean||, "
        "as the ranks estimate it",
        lambda run, _: run.rounds and run.rounds.spread_end,
        spread_text,
    ),
)

FAULT_COLUMNS = (
    ("at step", "the step that the fault was planned for: it came when the furthest rank had done so many"),
    ("second", "when it began, since the first rank's start"),
    ("fault", "what was done to which nodes"),
    (
        "survivors' longest stop",
        "the longest time between two steps of a rank that went on, up to the next fault, and how many of its median steps "
        "that is; none if it is less than two; ranks that the fault was done to do not count, except those of a cut",
    ),
    ("rounds missed", "outer rounds without a scheduled peer in that time, and by which ranks"),
    ("stepped again", "of a restart: after how long the returned rank ended a step again, and which"),
)


def round_cells(results: Results) -> list[list[str]]:
    """One row per run that has outer rounds, one text per column."""
    return cells_of(ROUND_COLUMNS, [run for run in results.runs if run.rounds is not None], results.dense)


def fault_cells(run: RunResult) -> list[list[str]]:
    """One row per fault, one text per column."""
    return [
        [
            str(fault.at_step),
            f"{fault.at_s:.1f}",
            fault_text(fault),
            stop_text(fault.cost) or NOTHING,
            missed_text(fault.cost),
            back_text(fault) or NOTHING,
        ]
        for fault in run.faults
    ]


def fault_lines(results: Results) -> list[str]:
    """`noloco, fault at step 120: node2 killed; longest stop 3.1 s (rank 0, 31 steps' time)`."""
    return [
        f"{run.name}, fault at step {fault.at_step}: {fault_text(fault)}; {cost_text(fault)}"
        for run in results.runs
        for fault in run.faults
    ]


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
