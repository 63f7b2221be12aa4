"""Reads the lines that one rank wrote, whole or torn."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from commopt.meter import Window, window


@dataclass(frozen=True)
class StepLine:
    """One optimizer step of one rank; `loss` is None where it was not finite."""

    step: int
    loss: float | None
    seconds: float
    wait_s: float
    tokens: int
    steady: bool
    at_s: float


@dataclass(frozen=True)
class ValidationLine:
    """A loss over `tokens` that were not trained on, after `steps` steps and `at_s` seconds of the record."""

    loss: float | None
    tokens: int
    steps: int
    at_s: float


@dataclass(frozen=True)
class CountersLine:
    """The bytes so far, by the library and by the interface, after `steps` steps."""

    traffic: Mapping[str, Any]
    nic_tx_bytes: int | None
    steps: int


@dataclass
class RankRecord:
    """What one rank has written so far; `feed` takes it line by line, and a second start line starts it again."""

    rank: int
    start: Mapping[str, Any] | None = None
    steps: list[StepLine] = field(default_factory=list)
    validations: list[ValidationLine] = field(default_factory=list)
    counters: dict[str, CountersLine] = field(default_factory=dict)
    compute_s: list[float] = field(default_factory=list)
    events: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    bytes_so_far: list[tuple[int, str, float]] = field(default_factory=list)  # (steps done, who counted, bytes)
    ended: bool = False
    starts: int = 0
    unreadable_lines: int = 0

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

    def _take(self, line: dict[str, Any]) -> None:
        kind = line["kind"]
        if kind == "start":
            afresh = RankRecord(self.rank, line, starts=self.starts + 1, unreadable_lines=self.unreadable_lines)
            vars(self).update(vars(afresh))
        elif kind == "step":
            self._take_step(line)
        elif kind == "validation":
            at_s, steps = float(line["at_s"]), len(self.steps)
            self.validations.append(ValidationLine(_loss(line["loss"]), int(line["tokens"]), steps, at_s))
        elif kind == "counters":
            reading = CountersLine(line["traffic"], line["nic_tx_bytes"], len(self.steps))
            window(reading.traffic, reading.traffic)  # a line that cannot be subtracted is unreadable, now
            self.counters[str(line["name"])] = reading
        elif kind == "compute":
            self.compute_s = [float(seconds) for seconds in line["seconds"]]
        elif kind == "event":
            self.events.append((str(line["event"]), dict(line["fields"])))
        elif kind == "end":
            self.ended = True
        else:
            raise ValueError(kind)

    def _take_step(self, line: dict[str, Any]) -> None:
        loss, seconds, wait_s = _loss(line["loss"]), float(line["seconds"]), float(line["wait_s"])
        tokens, steady, at_s = int(line["tokens"]), bool(line["steady"]), float(line["at_s"])
        self.steps.append(StepLine(int(line["step"]), loss, seconds, wait_s, tokens, steady, at_s))
        for who in ("payload_bytes", "nic_tx_bytes"):
            if line.get(who) is not None:
                self.bytes_so_far.append((len(self.steps), who, float(line[who])))


def _loss(value: float | None) -> float | None:
    return None if value is None else float(value)


def rank_of(path: Path) -> int:
    """The rank in the name of a rank's file: 12 for `rank12.jsonl`."""
    return int(path.stem.removeprefix("rank"))


def rank_files(record_dir: Path) -> Iterator[Path]:
    """The ranks' files of a run, in the order of the ranks; none if there is no such folder."""
    yield from sorted((p for p in record_dir.glob("rank*.jsonl") if p.stem[4:].isdigit()), key=rank_of)
