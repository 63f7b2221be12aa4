"""The faults that the launcher injected, and what each cost by the ranks' records."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Literal

from commopt.record.lines import RankRecord
from commopt.report.document import Fault, FaultCost, InjectedFault, MissedRounds
from commopt.report.rounds import clock_offsets_s

FAULTS_FILE = "faults.jsonl"  # the launcher's, beside the ranks' files


class FaultLine(InjectedFault, extra="ignore"):
    """A fault as the launcher wrote it, with the time of its end."""

    phase: Literal["begin", "end"]
    epoch_s: float
    end_epoch_s: float | None = None


def read_faults(record_dir: Path) -> tuple[list[FaultLine], int]:
    """The faults of a run in order, and how many lines were cut off or garbled; no faults if there is no file."""
    path = record_dir / FAULTS_FILE
    faults: list[FaultLine] = []
    unreadable = 0
    for text in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = FaultLine.model_validate_json(text)
        except ValueError:
            unreadable += 1
            continue
        begun = [f for f in faults if (f.kind, f.nodes, f.end_epoch_s) == (line.kind, line.nodes, None)]
        if line.phase == "begin":
            faults.append(line)
        elif begun:
            begun[0].end_epoch_s = line.epoch_s
    return faults, unreadable


def faults_of(lines: Sequence[FaultLine], records: Sequence[RankRecord]) -> list[Fault]:
    """Each fault with its cost until the next one began; none if no rank wrote a record."""
    if not lines or not records:
        return []
    offsets_s = clock_offsets_s(records)
    timelines = [_Timeline(record, offsets_s[record.rank]) for record in records]
    zero_s = min(record.epoch_s for record in records)
    ordered = sorted(lines, key=lambda line: line.epoch_s)
    begins = [line.epoch_s - zero_s for line in ordered]
    ends = [*begins[1:], max([timeline.end_s for timeline in timelines] + begins)]
    faults, dead = [], set[str]()
    for line, begin_s, end_s in zip(ordered, begins, ends, strict=True):
        dead = dead | set(line.nodes) if line.kind == "kill" else dead
        faults.append(
            Fault(
                **line.model_dump(include=set(InjectedFault.model_fields)),
                ranks=sorted(timeline.rank for timeline in timelines if timeline.node in line.nodes),
                at_s=round(begin_s, 3),
                end_s=None if line.end_epoch_s is None else round(line.end_epoch_s - zero_s, 3),
                cost=_cost(line, timelines, dead, begin_s, end_s),
            )
        )
        dead = dead - set(line.nodes) if line.kind == "restart" else dead
    return faults


class _Timeline:
    """One rank's steps in seconds since the first rank's start."""

    def __init__(self, record: RankRecord, offset_s: float) -> None:
        self.rank, self.node = record.rank, record.start["node"]
        self.is_through = record.ended or record.steps_done >= record.start["steps"]
        self.steps = [(line.at_s + offset_s, line) for line in record.steps]
        self.first_after_away = {k for k, _ in record.begins[1:]}  # indices in steps
        self.validated = [line.at_s + offset_s for line in record.validations]
        self.missed = [line.at_s + offset_s for line in record.rounds if line.missed]
        self.end_s = record.last_s + offset_s
        self.median_s = median(line.seconds for line in record.steps) if record.steps else None

    def pauses(self, begin_s: float, end_s: float) -> Iterator[float]:
        """The times between the ends of two steps, as far as they lie in the window, without validations and absences.

        A rank that did not train to the end has also been stopped since its last step.
        """
        for k, ((before_s, _), (after_s, line)) in enumerate(pairwise(self.steps), start=1):
            if after_s <= begin_s or before_s >= end_s or k in self.first_after_away:
                continue
            is_validation = any(before_s <= at_s < after_s for at_s in self.validated)
            from_s = after_s - line.seconds if is_validation else before_s
            yield min(after_s, end_s) - max(from_s, begin_s)
        if self.steps and not self.is_through:
            yield end_s - max(self.steps[-1][0], begin_s)


def _cost(line: FaultLine, timelines: Sequence[_Timeline], dead: set[str], begin_s: float, end_s: float) -> FaultCost:
    away = dead if line.kind == "cut" else dead | set(line.nodes)
    stops = {t: max([0.0, *t.pauses(begin_s, end_s)]) for t in timelines if t.node not in away and t.steps}
    stopped = max(stops, key=lambda t: stops[t], default=None)
    missed = {t.rank: sum(begin_s <= at_s < end_s for at_s in t.missed) for t in timelines}
    restarted = [t for t in timelines if line.kind == "restart" and t.node in line.nodes]
    after = [[(at_s, step.step) for at_s, step in t.steps if at_s > begin_s][:1] for t in restarted]
    returned = max((step for steps in after for step in steps), default=None) if all(after) else None
    return FaultCost(
        longest_stop_s=None if stopped is None else round(stops[stopped], 3),
        stopped_rank=None if stopped is None else stopped.rank,
        median_step_s=None if stopped is None else stopped.median_s,
        missed=[MissedRounds(rank=rank, rounds=n) for rank, n in sorted(missed.items()) if n],
        back_after_s=None if returned is None else round(returned[0] - begin_s, 3),
        back_at_step=None if returned is None else returned[1],
    )
