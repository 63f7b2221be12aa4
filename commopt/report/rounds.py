"""Merges the ranks' outer rounds, and collects each rank's steps over time."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from commopt.record.lines import RankRecord, RoundLine
from commopt.report.document import Progress, ProgressPart, RankRounds, Rounds, Spread

SHOWN_STEPS = 160  # evenly spaced, of a rank's progress; the ends of its longest pauses are added
SHOWN_PAUSES = 20


def rounds_of(records: Sequence[RankRecord]) -> Rounds | None:
    """The outer rounds of all ranks; None if no rank made one."""
    offsets_s = clock_offsets_s(records)
    by_rank = [
        RankRounds(
            rank=record.rank,
            rounds=len(record.rounds),
            missed=sum(line.missed for line in record.rounds),
            missed_at_s=[round(line.at_s + offsets_s[record.rank], 3) for line in record.rounds if line.missed],
            alone=sum(len(line.members) < 2 for line in record.rounds),
            **_costs([record]),
        )
        for record in records
        if record.rounds
    ]
    if not by_rank:
        return None
    spread = _spread(records)
    return Rounds(
        rounds=max(rank.rounds for rank in by_rank),
        missed=sum(rank.missed for rank in by_rank),
        **_costs(records),
        blocked_worst_s=max(rank.blocked_s for rank in by_rank),
        by_rank=by_rank,
        spread=spread,
        spread_end=spread[-1].spread if spread else None,
    )


def _costs(records: Sequence[RankRecord]) -> dict[str, Any]:
    lines = [line for record in records for line in record.rounds]
    steps_s = sum(line.seconds for record in records for line in record.steps)
    sent = [sum(line.nbytes for line in r.rounds) / len(r.steps) for r in records if r.rounds and r.steps]
    return {
        "blocked_s": fmean(line.blocked_s for line in lines),
        "blocked_share": sum(line.blocked_s for line in lines) / steps_s if steps_s > 0 else None,
        "exchange_s": fmean(line.exchange_s for line in lines),
        "bytes_per_step": fmean(sent) if sent else None,
    }


def _spread(records: Sequence[RankRecord]) -> list[Spread]:
    """The spread in each round: the root mean square of the ranks' estimates."""
    offsets_s = clock_offsets_s(records)
    by_round: dict[int, list[tuple[int, RoundLine, float]]] = {}
    for record in records:
        for line in record.rounds:
            if line.spread is not None:
                by_round.setdefault(line.round, []).append((record.rank, line, line.spread))
    return [
        Spread(
            step=max(line.step for _, line, _ in seen),
            at_s=max(line.at_s + offsets_s[rank] for rank, line, _ in seen),
            spread=math.sqrt(fmean(spread * spread for _, _, spread in seen)),
        )
        for _, seen in sorted(by_round.items())
    ]


def clock_offsets_s(records: Sequence[RankRecord]) -> dict[int, float]:
    """What to add to a rank's times to get seconds since the first rank's start."""
    first_s = min((record.epoch_s for record in records), default=0.0)
    return {record.rank: round(record.epoch_s - first_s, 6) for record in records}


def progress_of(records: Sequence[RankRecord]) -> list[Progress]:
    """Each rank's steps over time, thinned out."""
    offsets_s, shown = clock_offsets_s(records), []
    for record in records:
        parts = []
        for lines, done in record.parts():
            at_s = [line.at_s + offsets_s[record.rank] for line in lines]
            if chosen := _thinned(at_s):
                parts.append(ProgressPart(at_s=[round(at_s[k], 3) for k in chosen], steps=[done[k] for k in chosen]))
        shown.append(Progress(rank=record.rank, node=record.start["node"], parts=parts, ended=record.ended))
    return shown


def _thinned(at_s: Sequence[float]) -> list[int]:
    """Which of many points in time to keep: the first, the last, some between them, and both ends of the longest pauses."""
    last = len(at_s) - 1
    if last < SHOWN_STEPS:
        return list(range(last + 1))
    even = {round(k * last / (SHOWN_STEPS - 1)) for k in range(SHOWN_STEPS)}
    pauses = sorted(range(last), key=lambda k: at_s[k] - at_s[k + 1])[:SHOWN_PAUSES]
    return sorted(even | set(pauses) | {k + 1 for k in pauses})
