"""Outer rounds and faults as tables: what each method's rounds cost, and what each fault cost."""

from __future__ import annotations

from collections.abc import Callable

from commopt.record.words import spread_text
from commopt.report.columns import NOTHING, Column, cells_of, mb, ms
from commopt.report.document import Fault, Rounds
from commopt.report.fault_words import back_text, cost_text, fault_text, missed_text, stop_text
from commopt.report.results import Results, RunResult


def _of(tell: Callable[[Rounds], str | None]) -> Callable[[RunResult, RunResult | None], str | None]:
    return lambda run, _: None if run.rounds is None else tell(run.rounds)


def _share(rounds: Rounds) -> str | None:
    return None if rounds.blocked_share is None else f"{rounds.blocked_share * 100:.1f}%"


ROUND_COLUMNS = (
    Column(("outer", "rounds"), "the method; a number where it ran more than once", lambda run, _: run.name),
    Column(("", "rounds"), "outer rounds of the rank that made most", _of(lambda rounds: str(rounds.rounds))),
    Column(
        ("", "missed"),
        "rounds in which a scheduled peer's message did not come in time, so that a rank went on without it; over all ranks",
        _of(lambda rounds: str(rounds.missed)),
    ),
    Column(
        ("blocked", "ms/round"),
        "milliseconds that training stood still for a round, mean over rounds and ranks",
        _of(lambda rounds: ms(rounds.blocked_s)),
    ),
    Column(
        ("worst", "rank"), "the same of the rank with the largest mean", _of(lambda rounds: ms(rounds.blocked_worst_s))
    ),
    Column(("blocked", "%"), "share of the steps' time that they stood still for rounds", _of(_share)),
    Column(
        ("exchange", "s"),
        "seconds from a round's start to its last message, mean; more than it blocks, where training goes on meanwhile",
        _of(lambda rounds: f"{rounds.exchange_s:.2f}"),
    ),
    Column(
        ("sent", "MB/step"),
        "megabytes (10^6) that a rank sent in rounds, over all its optimizer steps",
        _of(lambda rounds: mb(rounds.bytes_per_step)),
    ),
    Column(
        ("spread", "at end"),
        "how far apart the replicas were in the last round: root mean square over replicas of ||x_i - mean|| / ||mean||, "
        "as the ranks estimate it",
        _of(lambda rounds: None if rounds.spread_end is None else spread_text(rounds.spread_end)),
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
    return [_row(fault) for fault in run.faults]


def _row(fault: Fault) -> list[str]:
    stop, back = stop_text(fault.cost), back_text(fault)
    return [
        str(fault.at_step),
        f"{fault.at_s:.1f}",
        fault_text(fault),
        stop or NOTHING,
        missed_text(fault.cost),
        back or NOTHING,
    ]


def fault_lines(results: Results) -> list[str]:
    """`noloco, fault at step 120: node2 killed; longest stop 3.1 s (rank 0, 31 steps' time)`."""
    return [
        f"{run.name}, fault at step {fault.at_step}: {fault_text(fault)}; {cost_text(fault)}"
        for run in results.runs
        for fault in run.faults
    ]
