"""How long exchanges take, and the steps around them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch

from commopt.plan.expected import Measured


class Waits:
    """Seconds from one moment to a later one; on a GPU, of the stream that is current, read once it has come so far."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._is_gpu = device, device.type == "cuda"
        self._open: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def now(self) -> float | torch.cuda.Event:
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def since(self, begun: float | torch.cuda.Event) -> float:
        """Seconds since then, on a GPU with those of earlier calls that were not known yet, and without what is not known now."""
        ended = self.now()
        if isinstance(begun, float) or isinstance(ended, float):
            return float(ended) - float(begun)  # type: ignore[arg-type]
        self._open.append((begun, ended))
        known_s = 0.0
        while self._open and self._open[0][1].query():  # type: ignore[no-untyped-call]
            begun, ended = self._open.pop(0)
            known_s += begun.elapsed_time(ended) / 1000
        return known_s


class Watch:
    """Times steps on this rank, and the exchanges in them."""

    def __init__(self, device: torch.device) -> None:
        self._waits = Waits(device)
        self.restart(0.0)

    def restart(self, waited_s: float) -> None:
        """Forget what was timed; a step has just ended. waited_s: the seconds that this rank has waited so far, for exchanges."""
        self._steps: list[tuple[float, float, float]] = []
        self._exchange_s, self._mark = 0.0, (time.perf_counter(), waited_s)

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Time an exchange, from its first call to its last."""
        begun = self._waits.now()
        yield
        self._exchange_s += self._waits.since(begun)

    def step(self, waited_s: float) -> None:
        """Note that a step has ended."""
        now_s, (then_s, before_s) = time.perf_counter(), self._mark
        self._steps.append((now_s - then_s, waited_s - before_s, self._exchange_s))
        self._exchange_s, self._mark = 0.0, (now_s, waited_s)

    def read(self) -> Measured:
        """The medians of all steps since the last `restart`: one that evaluates or saves counts no more than any other."""
        return Measured(*map(median, zip(*self._steps, strict=True)))
