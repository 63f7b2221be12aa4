"""Merges the ranks' outer rounds, and says how far each rank came when."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from commopt.record.lines import RankRecord, RoundLine
from commopt.report.document import Progress, ProgressPart, RankRounds, RankValidation, Rounds, Spread

SHOWN_STEPS = 160  # of a rank's progress: some steps evenly spaced, and the ends of its longest pauses
SHOWN_PAUSES = 20


def rounds_of(records: Sequence[RankRecord]) -> Rounds | None:
    """The outer rounds of all ranks; None where no rank made one."""
    by_rank = [_of_one(record, clock_offset_s(records, record)) for record in records if record.rounds]
    if not by_rank:
        return None
    sent = [rank.bytes_per_step for rank in by_rank if rank.bytes_per_step is not None]
    spread = _spread(records)
    return Rounds(
        rounds=max(rank.rounds for rank in by_rank),
        missed=sum(rank.missed for rank in by_rank),
        **_costs(records),
        blocked_worst_s=max(rank.blocked_s for rank in by_rank),
        bytes_per_step=fmean(sent) if sent else None,
        by_rank=by_rank,
        spread=spread,
        spread_end=spread[-1].spread if spread else None,
    )


def _of_one(record: RankRecord, offset_s: float | None) -> RankRounds:
    lines = record.rounds
    return RankRounds(
        rank=record.rank,
        rounds=len(lines),
        missed=sum(line.missed for line in lines),
        missed_at_s=[] if offset_s is None else [round(line.at_s + offset_s, 3) for line in lines if line.missed],
        alone=sum(len(line.members) < 2 for line in lines),
        **_costs([record]),
        bytes_per_step=sum(line.nbytes for line in lines) / len(record.steps) if record.steps else None,
    )


def _costs(records: Sequence[RankRecord]) -> dict[str, Any]:
    """Means over the rounds of some ranks."""
    lines = [line for record in records for line in record.rounds]
    steps_s = sum(line.seconds for record in records for line in record.steps)
    return {
        "blocked_s": fmean(line.blocked_s for line in lines),
        "blocked_share": sum(line.blocked_s for line in lines) / steps_s if steps_s > 0 else None,
        "exchange_s": fmean(line.exchange_s for line in lines),
    }


def _spread(records: Sequence[RankRecord]) -> list[Spread]:
    """Of each round, what the ranks that knew the spread make of it together."""
    by_round: dict[int, list[tuple[RoundLine, float, float | None]]] = {}
    for record in records:
        offset_s = clock_offset_s(records, record)
        for line in record.rounds:
            if line.spread is not None:
                at_s = None if offset_s is None else line.at_s + offset_s
                by_round.setdefault(line.round, []).append((line, line.spread, at_s))
    return [
        Spread(
            step=max(line.step for line, _, _ in seen),
            at_s=max((at_s for _, _, at_s in seen if at_s is not None), default=None),
            spread=math.sqrt(fmean(spread * spread for _, spread, _ in seen)),
        )
        for _, seen in sorted(by_round.items())
    ]


def clock_offset_s(records: Sequence[RankRecord], record: RankRecord) -> float | None:
    """What to add to a record's times to have seconds since the first rank's start; None where it says no epoch."""
    epochs = [other.epoch_s for other in records if other.epoch_s is not None]
    return None if record.epoch_s is None else round(record.epoch_s - min(epochs), 6)


def validation_by_rank(records: Sequence[RankRecord]) -> list[RankValidation]:
    """The last validation of each rank that made one."""
    last = [(record.rank, record.validations[-1]) for record in records if record.validations]
    return [
        RankValidation(rank=rank, after_steps=line.steps, loss=line.loss, tokens=line.tokens) for rank, line in last
    ]


def progress_of(started: Mapping[int, RankRecord]) -> list[Progress]:
    """When each rank had done how many steps, thinned out; empty where the ranks do not say when they started."""
    records = list(started.values())
    shown = []
    for rank, record in sorted(started.items()):
        offset_s = clock_offset_s(records, record)
        if record.start is not None and offset_s is not None:
            parts = _parts(record, offset_s)
            shown.append(Progress(rank=rank, node=str(record.start["node"]), parts=parts, ended=record.ended))
    return shown


def _parts(record: RankRecord, offset_s: float) -> list[ProgressPart]:
    parts = []
    for lines, done in record.parts():
        at_s = [line.at_s + offset_s for line in lines]
        chosen = _thinned(at_s)
        parts.append(ProgressPart(at_s=[round(at_s[k], 3) for k in chosen], steps=[done[k] for k in chosen]))
    return [part for part in parts if part.at_s]


def _thinned(at_s: Sequence[float]) -> list[int]:
    """Which of many points in time to keep: the first, the last, some between them, and both ends of the longest pauses."""
    last = len(at_s) - 1
    if last < SHOWN_STEPS:
        return list(range(last + 1))
    even = {round(k * last / (SHOWN_STEPS - 1)) for k in range(SHOWN_STEPS)}
    pauses = sorted(range(last), key=lambda k: at_s[k] - at_s[k + 1])[:SHOWN_PAUSES]
    return sorted(even | set(pauses) | {k + 1 for k in pauses})
