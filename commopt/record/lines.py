"""Reads the lines that one rank wrote, whole or torn."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator
from pydantic.dataclasses import dataclass as checked

from commopt.record.meter import Window, window


@checked(frozen=True)
class StepLine:
    """One optimizer step of one rank; `loss` is None where it was not finite."""

    step: int
    loss: float | None
    seconds: float
    wait_s: float
    tokens: int
    steady: bool
    at_s: float


@checked(frozen=True)
class ValidationLine:
    """A loss over `tokens` that were not trained on, after `steps` steps and `at_s` seconds of the record."""

    loss: float | None
    tokens: int
    steps: int
    at_s: float


@checked(frozen=True)
class CountersLine:
    """The bytes so far, by the library and by the interface, after `steps` steps."""

    traffic: Mapping[str, Any]
    nic_tx_bytes: int | None
    steps: int


@checked(frozen=True)
class RoundLine:
    """One outer round of one rank: whose parameters it averaged, what it cost, and how far apart the replicas were.

    `step`: optimizer steps done when it ended. `missed`: a scheduled peer's message did not come in time. `spread` is
    None where the rank did not know it.
    """

    step: int
    round: int
    members: tuple[int, ...]
    missed: bool
    blocked_s: float
    exchange_s: float
    nbytes: float
    spread: Annotated[float | None, AfterValidator(lambda x: x if x is not None and math.isfinite(x) else None)]
    at_s: float


@dataclass
class RankRecord:
    """What one rank has written so far; `feed` takes it line by line.

    A second start line that resumes at a step goes on with the record, on the same clock; one that resumes at none
    starts it afresh.
    """

    rank: int
    start: Mapping[str, Any] | None = None
    steps: list[StepLine] = field(default_factory=list)
    rounds: list[RoundLine] = field(default_factory=list)
    begins: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])  # of each start: index in steps, first step
    validations: list[ValidationLine] = field(default_factory=list)
    counters: dict[str, CountersLine] = field(default_factory=dict)
    compute_s: list[float] = field(default_factory=list)
    events: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    bytes_so_far: list[tuple[int, str, float]] = field(default_factory=list)  # (steps done, who counted, bytes)
    ended: bool = False
    starts: int = 0
    unreadable_lines: int = 0
    last_s: float = 0.0  # of the last line, on the record's clock
    _shift_s: float = 0.0  # from the clock of the last start to that of the first

    @classmethod
    def read(cls, path: Path) -> RankRecord:
        """Everything in a rank's file; a line that was cut off or garbled is counted and left out."""
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
        except (ValueError, TypeError, KeyError, AttributeError):
            self.unreadable_lines += 1

    def window(self) -> tuple[Window, int, int | None] | None:
        """The measured window: what the library counted, in how many steps, and what the interface transmitted."""
        begin, end = self.counters.get("begin"), self.counters.get("end")
        if begin is None or end is None or end.steps <= begin.steps:
            return None
        nic = None if begin.nic_tx_bytes is None or end.nic_tx_bytes is None else end.nic_tx_bytes - begin.nic_tx_bytes
        return window(begin.traffic, end.traffic), end.steps - begin.steps, nic

    @property
    def steady_steps(self) -> list[StepLine]:
        return [line for line in self.steps if line.steady]

    @property
    def steps_done(self) -> int:
        """Steps of training behind this rank, with those that it caught up on from others after it was away."""
        begin, resumed_at = self.begins[-1]
        return resumed_at + _done(self.steps[begin:], len(self.steps) - begin)

    def parts(self) -> list[tuple[list[StepLine], list[int]]]:
        """For each start, its steps, and how many steps of training were behind this rank after each of them."""
        found = []
        for (begin, resumed_at), (end, _) in zip(self.begins, [*self.begins[1:], (len(self.steps), 0)], strict=True):
            lines = self.steps[begin:end]
            found.append((lines, [resumed_at + _done(lines, k + 1) for k in range(len(lines))]))
        return found

    @property
    def epoch_s(self) -> float | None:
        """When this record's clock began, by the machine's own; None in a record that does not say."""
        return None if self.start is None or self.start.get("epoch_s") is None else float(self.start["epoch_s"])

    def _take(self, line: dict[str, Any]) -> None:
        kind, at_s = line["kind"], float(line["at_s"])
        if kind == "start":
            self._take_start(line)
        line = {**line, "at_s": at_s + self._shift_s}
        if kind == "step":
            self.steps.append(StepLine(**line))
            for who in ("payload_bytes", "nic_tx_bytes"):
                if line.get(who) is not None:
                    self.bytes_so_far.append((len(self.steps), who, float(line[who])))
        elif kind == "round":
            self.rounds.append(RoundLine(**line))
        elif kind == "validation":
            self.validations.append(ValidationLine(**line | {"steps": self.steps_done}))
        elif kind == "counters":
            reading = CountersLine(**line | {"steps": len(self.steps)})
            window(reading.traffic, reading.traffic)  # a line that cannot be subtracted is unreadable, now
            self.counters[str(line["name"])] = reading
        elif kind == "compute":
            self.compute_s = [float(seconds) for seconds in line["seconds"]]
        elif kind == "event":
            self.events.append((str(line["event"]), dict(line["fields"])))
        elif kind == "end":
            self.ended = True
        elif kind != "start":
            raise ValueError(kind)
        self.last_s = max(self.last_s, line["at_s"])

    def _take_start(self, line: dict[str, Any]) -> None:
        resumed_at, epoch_s = int(line.get("resumed_at") or 0), line.get("epoch_s")
        since_s = None if epoch_s is None or self.epoch_s is None else float(epoch_s) - self.epoch_s
        if self.start is None or resumed_at == 0:
            afresh = RankRecord(self.rank, line, starts=self.starts + 1, unreadable_lines=self.unreadable_lines)
            vars(self).update(vars(afresh) | {"begins": [(0, resumed_at)]})
            return
        self._shift_s = self.last_s if since_s is None else max(self.last_s, since_s)  # a machine's clock may be set
        self.begins.append((len(self.steps), resumed_at))
        self.ended = False
        self.counters.clear()  # the bytes of the process that ended are not those of this one
        self.bytes_so_far.clear()


def _done(lines: Sequence[StepLine], k: int) -> int:
    """Steps of training in the first k lines; more than k where the rank left some out to go on with others."""
    return max(k, lines[k - 1].step - lines[0].step + 1) if k else 0


def rank_of(path: Path) -> int:
    """The rank in the name of a rank's file: 12 for `rank12.jsonl`."""
    return int(path.stem.removeprefix("rank"))


def rank_files(record_dir: Path) -> Iterator[Path]:
    """The ranks' files of a run, in the order of the ranks; none if there is no such folder."""
    yield from sorted((p for p in record_dir.glob("rank*.jsonl") if p.stem[4:].isdigit()), key=rank_of)
