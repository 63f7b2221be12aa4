"""Outer rounds and faults in tables and words: what each method's rounds cost, and what each fault cost."""

from __future__ import annotations

import math

from commopt.record.words import megabytes, milliseconds, seconds_text, spread_text
from commopt.report.columns import AS_MEGABYTES, AS_MS, NOTHING, cells_of, column_of, described
from commopt.report.document import Fault, FaultCost, Results, RunResult

STOPPED = 2.0  # a stop of fewer median steps is called none
ROUND_COLUMNS = (
    column_of(("outer", "rounds"), "name"),
    column_of(("", "rounds"), "rounds.rounds"),
    column_of(("", "missed"), "rounds.missed"),
    column_of(("blocked", "ms/round"), "rounds.blocked_s", milliseconds, AS_MS),
    column_of(("worst", "rank"), "rounds.blocked_worst_s", milliseconds, AS_MS),
    column_of(("blocked", "%"), "rounds.blocked_share", "{:.1%}".format),
    column_of(("exchange", "s"), "rounds.exchange_s", "{:.2f}".format),
    column_of(("sent", "MB/step"), "rounds.bytes_per_step", megabytes, AS_MEGABYTES),
    column_of(("spread", "at end"), "rounds.spread_end", spread_text),
)
FAULT_COLUMNS = (
    ("at step", described(Fault, "at_step")),
    ("second", described(Fault, "at_s")),
    ("fault", "what was done to which nodes"),
    ("survivors' longest stop", f"{described(FaultCost, 'longest_stop_s')}; none if it is less than two median steps"),
    ("rounds missed", described(FaultCost, "missed")),
    ("stepped again", described(FaultCost, "back_after_s")),
)


def round_cells(results: Results) -> list[list[str]]:
    """One row per run that has outer rounds, one text per column."""
    return cells_of(ROUND_COLUMNS, [run for run in results.runs if run.rounds is not None], results.dense)


def fault_cells(run: RunResult) -> list[list[str]]:
    """One row per fault, one text per column."""
    return [fault_row(fault) for fault in run.faults]


def fault_row(fault: Fault) -> list[str]:
    """`120`, `12.4`, `node2 killed`, `3.1 s (rank 0, 31 steps' time)`, `3 (rank 0: 2, rank 1: 1)`, `4.2 s, step 182`."""
    cost, stop, back = fault.cost, NOTHING, NOTHING
    if cost.longest_stop_s is not None:
        steps = cost.longest_stop_s / (cost.median_step_s or math.inf)
        who = f"rank {cost.stopped_rank}, {steps:.0f} steps' time"
        stop = f"{seconds_text(cost.longest_stop_s)} ({who})" if steps >= STOPPED else "none"
    missed = ", ".join(f"rank {each.rank}: {each.rounds}" for each in cost.missed)
    missed = f"{sum(each.rounds for each in cost.missed)} ({missed})" if missed else "0"
    if fault.kind == "restart":
        after_s = cost.back_after_s
        back = "never" if after_s is None else f"{seconds_text(after_s)}, step {cost.back_at_step}"
    return [str(fault.at_step), f"{fault.at_s:.1f}", str(fault), stop, missed, back]


def fault_lines(results: Results) -> list[str]:
    """`noloco, fault at step 120: node2 killed; longest stop: 3.1 s (rank 0, 31 steps' time)`."""
    return [
        f"{run.name}, fault at step {fault.at_step}: {fault}; {cost_text(fault)}"
        for run in results.runs
        for fault in run.faults
    ]


def cost_text(fault: Fault) -> str:
    """`longest stop: 3.1 s (rank 0, 31 steps' time); rounds missed: 3 (...)`."""
    said = zip(("longest stop", "rounds missed", "stepped again"), fault_row(fault)[3:], strict=True)
    return "; ".join(f"{what}: {text}" for what, text in said if text not in (NOTHING, "0")) or "nobody left to see it"
