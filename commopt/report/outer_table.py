"""Outer rounds and faults in tables and words: what each method's rounds cost, and what each fault cost."""

from __future__ import annotations

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
    return [
        [
            str(fault.at_step),
            f"{fault.at_s:.1f}",
            str(fault),
            stop_text(fault.cost) or NOTHING,
            missed_text(fault.cost),
            back_text(fault) or NOTHING,
        ]
        for fault in run.faults
    ]


def fault_lines(results: Results) -> list[str]:
    """`noloco, fault at step 120: node2 killed; longest stop: 3.1 s (rank 0, 31 steps' time)`."""
    return [
        f"{run.name}, fault at step {fault.at_step}: {fault}; {cost_text(fault)}"
        for run in results.runs
        for fault in run.faults
    ]


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
    """`longest stop: 3.1 s (rank 0, 31 steps' time); rounds missed: 3 (...)`."""
    texts = (stop_text(fault.cost), missed_text(fault.cost).removeprefix("0"), back_text(fault))
    said = zip(("longest stop", "rounds missed", "stepped again"), texts, strict=True)
    return "; ".join(f"{what}: {text}" for what, text in said if text) or "nobody left to see it"
