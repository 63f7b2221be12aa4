"""A run's record: its steps, rounds and events, and the bytes of the steady part."""

from __future__ import annotations

import atexit
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import Tensor

from commopt.record.recorder import Recorder, steps_wanted

if TYPE_CHECKING:
    from commopt.run.run import Run

_log = logging.getLogger(__name__)
_SETTLED = 3  # DDP settles its buckets in the first steps
_TIMED, _UNCOUNTED = 16, 4  # steps without communication when a script is ended early, and how many are not counted
SILENT_S, _FEWEST = 12.0, 3  # what they may take if the script makes no others, but so many are made
_Values = Mapping[str, float | Tensor]


class RunLog:
    """One rank's record of a run. It follows the optimizer's steps if the launcher wants a record; else `log` prints some.

    If the launcher wants some steps only, the script is ended after them, by SystemExit(0) from `optimizer.step()`: the run is finished,
    some more steps without communication are timed, the same number on all ranks, and the run is closed. If it wants none, there are
    only the latter, and fewer if they take long.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._recorder: Recorder | None = None
        self._limit = steps_wanted()
        self._planned = 0
        self._begun_at: int | None = None  # the step at which this process began
        self._is_measuring = self._has_ended = False
        self._told, self._last_step, self._lines = (0, 0, 0), -1, 0
        self._mark = (time.monotonic(), 0.0)  # when the last step ended, and waited_s then
        self._unwritten: dict[str, Any] | None = None  # the last step, as its loss may still be logged
        self._values: _Values = {}  # what was logged before its step
        self._logs_first: bool | None = None  # whether the script logs before it steps
        self._is_aside = False  # in steps that belong to no training
        self._timed: list[float] | None = None  # seconds of steps without communication, after the last that is wanted
        self._to_time = _TIMED
        self._silence = ExitStack()

    def plan(self, steps: int) -> None:
        """Tell the method how many steps are planned, record it, and start the record if the launcher wants one."""
        method, steps = self._run.method, min(steps, self._limit or steps)
        method.planned = steps
        if method.warmup_steps >= steps and self._run.rank == 0:
            told = "%s: the warm-up of %d steps does not end before the last of %d; write a lower %s"
            _log.warning(told, method.name, method.warmup_steps, steps, method.warmup_option or "number")
        self._planned, self._begun_at = steps, self._run.steps
        self._mark = (time.monotonic(), self._run.waited_s)
        if self._recorder is None and Recorder.is_wanted():
            self._start()

    def log(self, values: _Values) -> None:
        """Record a step's values, or those of a validation."""
        run = self._run
        unknown = set(values) - {"loss", "tokens", "validation_loss"}
        if unknown or not {"loss", "validation_loss"} & set(values):
            raise TypeError(
                f"log(): give loss= or validation_loss=, and tokens=; got {', '.join(sorted(values)) or 'nothing'}"
            )
        if self._is_aside or (self._timed is not None and self._unwritten is None):
            return
        recorder = self._recorder or self._start()
        if "validation_loss" in values:
            self._write()
            loss, tokens = _number(values["validation_loss"]), int(values.get("tokens", 0))
            recorder.validation(step=run.steps, loss=loss, tokens=tokens)
            return
        if not Recorder.is_wanted():
            self._note_step()
            self._write(values)
            return
        if self._logs_first is None:
            self._logs_first = self._unwritten is None
        if self._logs_first:
            self._values = values
        elif self._unwritten is not None:
            self._write(values)

    def stepped(self, *_: object) -> None:
        """Record an optimizer's step, if the launcher wants a record; after the last one that it wants, end the script."""
        run = self._run
        if self._is_aside or not Recorder.is_wanted():
            return
        if self._timed is not None:
            self._time(self._timed)
            return
        if self._recorder is None:
            self._start(time.monotonic() - self._mark[0])
        self._write()  # nothing if the disk is full; the rest is done with the other ranks
        self._note_step()
        if self._values:
            self._write(self._values)
            self._values = {}
        if not self._is_measuring and run.steps >= _SETTLED and run.method.is_steady:
            self._is_measuring = True
            run.quiet()
            self._count("begin")
        if self._limit is not None and run.steps >= self._limit:
            self._begin_silence()
        self._mark = (time.monotonic(), run.waited_s)

    def exchanging(self) -> None:
        """Before an exchange: switch communication off if no step with it is wanted."""
        if self._limit == 0 and self._timed is None:
            self._recorder = self._recorder or self._start(time.monotonic() - self._mark[0])
            self._begin_silence()

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
            self._count("end")

    def finish(self) -> None:
        """End the measured window, and record it if replicas have drifted apart."""
        if self._recorder is None:
            return
        self.tell()
        self.end_window()
        if not self._run.replicas_are_equal():
            self._recorder.event("replicas have drifted apart")

    def measure_compute(self, step: Callable[[], object], repeats: int) -> None:
        """Time steps with communication switched off, and record all but the first ones."""
        run = self._run
        self._write()
        run.quiet()
        self._is_aside, seconds = True, list[float]()
        with run.communication_off(), ExitStack() as at_end:
            for group in run.optimizer.param_groups:
                at_end.callback(group.update, lr=group["lr"])
                group["lr"] = 0.0
            for _ in range(repeats):
                start = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - start)
        self._is_aside = False
        self._tell_compute(seconds)

    def close(self) -> None:
        """Record that training ended as planned, if it did."""
        self._silence.close()
        if self._recorder is not None:
            self._write()
            atexit.unregister(self._end_with_script)
            if self._run.is_finished:
                self._recorder.end()
        self._recorder = None

    def _begin_silence(self) -> None:
        """End the training, and time steps without communication from now on."""
        self._run.finish()
        self._run.quiet()
        self._silence.enter_context(self._run.communication_off())
        self._timed = []

    def _time(self, timed: list[float]) -> None:
        """Note a step without communication; after the last one, end the script."""
        self._write()
        timed.append(time.monotonic() - self._mark[0])
        if self._limit == 0 and len(timed) == _FEWEST - 1:
            self._to_time = self._agreed_count(timed[-1])
        self._mark = (time.monotonic(), 0.0)
        if len(timed) == self._to_time:
            self._tell_compute(timed)
            self._run.close()
            raise SystemExit(0)

    def _agreed_count(self, step_s: float) -> int:
        """How many steps without communication there is time for, the same on all ranks."""
        run: Any = self._run  # in such a script, one that exchanges in every step
        self._silence.close()
        (slowest_s,) = run.largest([step_s])
        self._silence.enter_context(run.communication_off())
        return max(_FEWEST, min(_TIMED, int(SILENT_S / slowest_s)))

    def _tell_compute(self, seconds: Sequence[float]) -> None:
        """Record steps without communication; the first ones are not counted."""
        run = self._run
        if self._recorder is not None:
            shapes, uncounted = [p.shape for p in run.parameters.values()], min(_UNCOUNTED, self._to_time // 3)
            self._recorder.compute(seconds[uncounted:], buckets=run.buckets, overlap=run.overlaps, shapes=shapes)

    def _note_step(self) -> None:
        """Take the times of the step that has just ended."""
        run = self._run
        self._last_step = step = max(self._last_step + 1, run.steps - 1)  # a scaler's skipped step counts here
        seconds, wait_s = time.monotonic() - self._mark[0], run.waited_s - self._mark[1]
        at_s = self._recorder.elapsed_s if self._recorder is not None else 0.0
        steady = self._is_measuring
        self._unwritten = {"step": step, "seconds": seconds, "wait_s": wait_s, "steady": steady, "at_s": at_s}
        self._lines += 1
        self._mark = (time.monotonic(), run.waited_s)

    def _write(self, values: _Values | None = None) -> None:
        """Write the last step, with what was logged of it."""
        step, self._unwritten = self._unwritten, None
        if step is not None and self._recorder is not None:
            loss = None if not values else _number(values["loss"])
            self._recorder.step(**step, loss=loss, tokens=int((values or {}).get("tokens", 0)))
            self.tell()

    def _count(self, end: Any) -> None:
        if self._recorder is not None:
            self._recorder.counters(end, self._run.traffic.as_dict(), steps=self._lines)

    def _end_with_script(self) -> None:
        """Complete the record of a script that ended, without an exception, before `close`; other ranks may be gone."""
        recorder = self._recorder
        if recorder is None or hasattr(sys, "last_value"):
            return
        self._write()
        self.tell()
        if self._is_measuring and not self._has_ended:
            self._count("end")
        if self._timed is not None and len(self._timed) > _UNCOUNTED:
            self._tell_compute(self._timed)
        recorder.end()
        self._recorder = None

    def _start(self, before_s: float = 0.0) -> Recorder:
        run, method = self._run, self._run.method
        self._recorder = recorder = Recorder.from_environment(run.rank, run.ranks)
        self._planned = self._planned or self._limit or 0
        method.planned = method.planned or self._limit or None
        begun_at = max(0, run.steps - 1) if self._begun_at is None else self._begun_at
        self._last_step = begun_at - 1
        recorder.start(
            method=method.name,
            options=method.given,
            parameters=sum(p.numel() for p in run.parameters.values()),
            steps=self._planned,
            resumed_at=begun_at,
            per_machine=run.per_machine,
            before_s=before_s,
        )
        if recorder.is_recording:
            atexit.register(self._end_with_script)
        return recorder


def _number(x: float | Tensor) -> float:
    return float(x.detach() if isinstance(x, Tensor) else x)
