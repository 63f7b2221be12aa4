"""A run's record: its steps, rounds and events, and the bytes of the steady part."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

from commopt.record.recorder import Recorder

if TYPE_CHECKING:
    from commopt.run.run import Run

_log = logging.getLogger(__name__)
_SETTLED = 3  # DDP settles its buckets in the first steps


class RunLog:
    """One rank's record of a run, which begins with the first `log`."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._recorder: Recorder | None = None
        self._planned = 0
        self._begun_at: int | None = None  # the step at which this process began
        self._is_measuring = self._has_ended = False
        self._told, self._last_step = (0, 0, 0), -1
        self._mark = (time.perf_counter(), 0.0)  # when the last step was logged, and waited_s then

    def plan(self, steps: int) -> None:
        """Tell the method how many steps are planned, record it, and start the record if the launcher wants one."""
        method = self._run.method
        method.planned = steps
        if method.warmup_steps >= steps and self._run.rank == 0:
            told = "%s: the warm-up of %d steps does not end before the last of %d; write a lower %s"
            _log.warning(told, method.name, method.warmup_steps, steps, method.warmup_option or "number")
        self._planned, self._begun_at = steps, self._run.steps
        self._mark = (time.perf_counter(), self._run.waited_s)
        if self._recorder is None and Recorder.is_wanted():
            self._start()

    def log(self, values: Mapping[str, float]) -> None:
        """Record a step's values, or those of a validation."""
        run = self._run
        tokens = int(values.get("tokens", 0))
        unknown = set(values) - {"loss", "tokens", "validation_loss"}
        if unknown or not {"loss", "validation_loss"} & set(values):
            raise TypeError(
                f"log(): give loss= or validation_loss=, and tokens=; got {', '.join(sorted(values)) or 'nothing'}"
            )
        recorder = self._recorder or self._start()
        if "validation_loss" in values:
            recorder.validation(step=run.steps, loss=values["validation_loss"], tokens=tokens)
            return
        seconds, wait_s = time.perf_counter() - self._mark[0], run.waited_s - self._mark[1]
        self._last_step = step = max(self._last_step + 1, run.steps - 1)  # a scaler's skipped step counts here
        recorder.step(
            step=step, loss=values["loss"], seconds=seconds, wait_s=wait_s, tokens=tokens, steady=self._is_measuring
        )
        self.tell()
        if not self._is_measuring and run.steps >= _SETTLED and run.method.is_steady and recorder.is_recording:
            self._is_measuring = True
            run.quiet()
            recorder.counters("begin", run.traffic.as_dict())
        self._mark = (time.perf_counter(), run.waited_s)

    def tell(self) -> None:
        """Record voids, rounds and events since the last call."""
        if self._recorder is None:
            return
        run, recorder = self._run, self._recorder
        voids, reports, events = self._told
        for step, name in run.voided[voids:]:
            recorder.event("void", step=step, parameter=name)
        for report in run.reports[reports:]:
            recorder.round(report)
        for kind, fields in run.events[events:]:
            recorder.event(kind, **fields)
        self._told = (len(run.voided), len(run.reports), len(run.events))

    def end_window(self) -> None:
        """End the measured window."""
        if self._recorder is not None and self._is_measuring and not self._has_ended:
            self._has_ended = True
            self._run.quiet()
            self._recorder.counters("end", self._run.traffic.as_dict())

    def finish(self) -> None:
        """End the measured window, and record it if replicas have drifted apart."""
        if self._recorder is None:
            return
        self.tell()
        self.end_window()
        if not self._run.replicas_are_equal():
            self._recorder.event("replicas have drifted apart")

    def measure_compute(self, step: Callable[[], object], repeats: int) -> None:
        """Time steps with communication switched off, and record all but the first two."""
        run, seconds = self._run, list[float]()
        run.quiet()
        with run.communication_off(), ExitStack() as at_end:
            for group in run.optimizer.param_groups:
                at_end.callback(group.update, lr=group["lr"])
                group["lr"] = 0.0
            for _ in range(repeats):
                start = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - start)
        if self._recorder is not None:
            self._recorder.compute(seconds[2:])

    def close(self) -> None:
        """Record that training ended as planned, if it did."""
        if self._recorder is not None and self._run.is_finished:
            self._recorder.end()
        self._recorder = None

    def _start(self) -> Recorder:
        run, method = self._run, self._run.method
        self._recorder = recorder = Recorder.from_environment(run.rank, run.ranks)
        begun_at = max(0, run.steps - 1) if self._begun_at is None else self._begun_at
        self._last_step = begun_at - 1
        recorder.start(
            method=method.name,
            options=method.given,
            parameters=sum(p.numel() for p in run.parameters.values()),
            steps=self._planned,
            resumed_at=begun_at,
            per_machine=run.per_machine,
        )
        return recorder
