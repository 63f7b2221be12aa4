"""Reads the lines that one rank wrote, whole or torn."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass as checked

from commopt.record.meter import Window, window
from commopt.record.recorder import RoundReport

# the types of a start line's fields
_START = {"world_size": int, "node": str, "mtu": int, "method": str, "options": dict, "parameters": int, "steps": int}
_START |= {"epoch_s": float, "resumed_at": int}


@checked(frozen=True)
class StepLine:
    """One optimizer step of one rank; `loss` is None if it was not finite, or not logged."""

    step: int
    seconds: float
    wait_s: float
    tokens: int
    steady: bool
    at_s: float
    loss: float | None = None
    is_logged: bool = False


@checked(frozen=True)
class ValidationLine:
    """A loss over `tokens` held-out tokens, after `steps` steps and `at_s` seconds of the record."""

    loss: float | None
    tokens: int
    steps: int
    at_s: float


@checked(frozen=True)
class CountersLine:
    """The bytes so far, by commopt's count and by the interface's, after `steps` steps."""

    traffic: Mapping[str, Any]
    nic_tx_bytes: int | None
    steps: int


@checked(frozen=True)
class RoundLine(RoundReport):
    """One outer round of one rank, and when it ended."""

    at_s: float


@dataclass
class RankRecord:
    """What one rank has written so far; `feed` takes it line by line.

    A later start line that resumes at a step continues the record on the same clock; one that does not starts it afresh.
    """

    rank: int
    start: Mapping[str, Any] = field(default_factory=dict)  # the first start line; empty until it is read
    epoch_s: float = 0.0  # when the record's clock began, by the machine's clock
    steps: list[StepLine] = field(default_factory=list)
    rounds: list[RoundLine] = field(default_factory=list)
    begins: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])  # of each start: index in steps, first step
    validations: list[ValidationLine] = field(default_factory=list)
    counters: dict[str, CountersLine] = field(default_factory=dict)
    compute_s: list[float] = field(default_factory=list)
    buckets: list[int] = field(
        default_factory=list
    )  # elements of each bucket of a step, in the order of their exchange
    overlap: bool = False  # whether they are exchanged during backward
    events: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    nic_bytes: list[tuple[int, float]] = field(default_factory=list)  # (steps done, what the interface had transmitted)
    ended: bool = False
    starts: int = 0
    unreadable_lines: int = 0
    last_s: float = 0.0  # of the last line, on the record's clock
    _shift_s: float = 0.0  # from the clock of the last start to that of the first

    @classmethod
    def read(cls, path: Path) -> RankRecord:
        """Everything in a rank's file; lines that were cut off or garbled are counted and left out."""
        record = cls(rank_of(path))
        for line in path.read_bytes().splitlines():
            record.feed(line)
        return record

    def feed(self, line: bytes) -> None:
        """Take one line, without its end."""
        if not line.strip():
            return
        try:
            self._take(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            self.unreadable_lines += 1

    def window(self) -> tuple[Window, int, int | None] | None:
        """The measured window: commopt's count, the number of steps, and the bytes that the interface transmitted."""
        begin, end = self.counters.get("begin"), self.counters.get("end")
        if begin is None or end is None or end.steps <= begin.steps:
            return None
        nic = None if begin.nic_tx_bytes is None or end.nic_tx_bytes is None else end.nic_tx_bytes - begin.nic_tx_bytes
        return window(begin.traffic, end.traffic), end.steps - begin.steps, nic

    @property
    def steps_done(self) -> int:
        """Steps that this rank has trained, including those that it caught up on from others after an absence."""
        begin, resumed_at = self.begins[-1]
        return resumed_at + _done(self.steps[begin:], len(self.steps) - begin)

    def parts(self) -> list[tuple[list[StepLine], list[int]]]:
        """For each start, its steps, and how many steps this rank had trained after each of them."""
        begins = pairwise([*self.begins, (len(self.steps), 0)])
        found = [(self.steps[begin:end], resumed_at) for (begin, resumed_at), (end, _) in begins]
        return [(lines, [at + _done(lines, k + 1) for k in range(len(lines))]) for lines, at in found]

    def _take(self, line: dict[str, Any]) -> None:
        kind, at_s = line["kind"], float(line["at_s"])
        if kind == "start":
            self._take_start(line)
        line = {**line, "at_s": at_s + self._shift_s}
        if kind == "step":
            self.steps.append(StepLine(**line, is_logged="loss" in line))
            if line.get("nic_tx_bytes") is not None:
                self.nic_bytes.append((len(self.steps), float(line["nic_tx_bytes"])))
        elif kind == "round":
            self.rounds.append(RoundLine(**line))
        elif kind == "validation":
            self.validations.append(ValidationLine(**line | {"steps": self.steps_done}))
        elif kind == "counters":
            reading = CountersLine(**{"steps": len(self.steps)} | line)
            window(reading.traffic, reading.traffic)  # raises now if the line cannot be subtracted later
            self.counters[str(line["name"])] = reading
        elif kind == "compute":
            self.compute_s = [float(seconds) for seconds in line["seconds"]]
            self.buckets, self.overlap = [int(n) for n in line.get("buckets", ())], bool(line.get("overlap"))
        elif kind == "event":
            self.events.append((str(line["event"]), dict(line["fields"])))
        elif kind == "end":
            self.ended = True
        elif kind != "start":
            raise ValueError(kind)
        self.last_s = max(self.last_s, line["at_s"])

    def _take_start(self, line: dict[str, Any]) -> None:
        start = {key: kind(line[key]) for key, kind in _START.items()}
        epoch_s, resumed_at = start["epoch_s"], start["resumed_at"]
        if not self.start or resumed_at == 0:
            starts, unreadable = self.starts + 1, self.unreadable_lines
            afresh = RankRecord(self.rank, start, epoch_s, starts=starts, unreadable_lines=unreadable)
            vars(self).update(vars(afresh) | {"begins": [(0, resumed_at)]})
            return
        self._shift_s = max(self.last_s, epoch_s - self.epoch_s)  # a machine's clock may have been set back
        self.begins.append((len(self.steps), resumed_at))
        self.ended = False
        self.counters.clear()  # the new process counts from zero
        self.nic_bytes.clear()


def _done(lines: Sequence[StepLine], k: int) -> int:
    """Steps of training in the first k lines; more than k if the rank skipped some to catch up with others."""
    return max(k, lines[k - 1].step - lines[0].step + 1) if k else 0


def rank_of(path: Path) -> int:
    """The rank in the name of a rank's file: 12 for `rank12.jsonl`."""
    return int(path.stem.removeprefix("rank"))


def rank_files(record_dir: Path) -> Iterator[Path]:
    """The ranks' files of a run, in the order of the ranks; none if there is no such folder."""
    yield from sorted((p for p in record_dir.glob("rank*.jsonl") if p.stem[4:].isdigit()), key=rank_of)
