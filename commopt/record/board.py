"""Writes what the ranks record to TensorBoard, while they train."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from commopt.errors import ConfigError
from commopt.record.lines import RankRecord, StepLine

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Board:
    """One TensorBoard run per method, in `folder`/METHOD: loss, milliseconds of a step, share of waiting, bytes sent, and the
    replicas' spread.

    Raises ConfigError without the package tensorboard.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError("--tensorboard: the package is not installed: pip install tensorboard") from None
        self._make, self._folder = SummaryWriter, folder
        self.begin("")

    def begin(self, name: str) -> None:
        """Write another run's values from now on."""
        self._writer = self._make(str(self._folder / name)) if name else None
        self._written = self._rounds = 0
        self._sent: tuple[int, float] | None = (
            None  # steps, and bytes of the first rank's machine, when its interface was last read
        )

    def write(self, records: Mapping[int, RankRecord], steps: int) -> None:
        """Write the steps that are new, of the first `steps`: means over the ranks that did them."""
        if self._writer is None:
            return
        by_step: dict[int, list[StepLine]] = {}
        for record in records.values():
            for line in record.steps[self._written : steps]:
                by_step.setdefault(line.step, []).append(line)
        for step, lines in sorted(by_step.items()):
            seconds = fmean(line.seconds for line in lines)
            values = {
                "step/milliseconds": 1e3 * seconds,
                "step/waiting": fmean(line.wait_s for line in lines) / seconds,
            }
            if losses := [math.nan if line.loss is None else line.loss for line in lines if line.is_logged]:
                values["loss"] = fmean(losses)
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        self._written = max(self._written, steps)
        if records:
            self._write_first(self._writer, records[min(records)])
        self._writer.flush()

    def _write_first(self, writer: SummaryWriter, first: RankRecord) -> None:
        for round in first.rounds[self._rounds :]:
            if round.spread is not None:
                writer.add_scalar("replicas/spread", round.spread, round.step)
        self._rounds = len(first.rounds)
        for reading in first.nic_bytes:
            if self._sent is None or reading[0] > self._sent[0]:
                if self._sent is not None:
                    rate = (reading[1] - self._sent[1]) / (reading[0] - self._sent[0])
                    writer.add_scalar("step/bytes sent by its machine", rate, reading[0])
                self._sent = reading
