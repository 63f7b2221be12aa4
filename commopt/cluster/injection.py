"""Carries out a run's faults: kills, restarts, stops, slows down and cuts off nodes of a running job."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from commopt.cluster.emulate import Emulation
from commopt.cluster.faults import Fault
from commopt.cluster.machine import Emulate
from commopt.cluster.processes import Throttle
from commopt.errors import ConfigError
from commopt.record.live import Follower

if TYPE_CHECKING:
    from commopt.cluster.run import Job


def check_faults(faults: Sequence[Fault], emulation: Emulation, file: str) -> None:
    """Raise ConfigError, before anything starts, for faults that this emulation cannot carry out."""
    if faults and emulation.is_elsewhere:
        raise ConfigError(f"{file}: faults: real machines get none; add --emulate netns, or leave the key out")
    cuts = [index for index, fault in enumerate(faults) if fault.kind == "cut"]
    if cuts and emulation.mode is not Emulate.NETNS:
        text = "needs links that the kernel emulates, and here they are not "
        text += f"(--emulate {emulation.mode.value}); add --emulate netns, or leave the cut out"
        raise ConfigError("\n".join(f"{file}: faults.{index}.cut: {text}" for index in cuts))


class Injection:
    """The faults of one job: give it to a `Job`.

    A fault is due when the furthest rank has recorded `at_step` steps in `record_dir`. `faults.jsonl` there gets a line
    when one begins and when it ends; `tell` gets a sentence.
    """

    def __init__(
        self, faults: Sequence[Fault], *, emulation: Emulation, record_dir: Path, tell: Callable[[str], None]
    ) -> None:
        self._waiting = sorted(faults, key=lambda fault: fault.at_step)  # within a step in the file's order
        self._emulation, self._network = emulation, emulation.network
        self._tell, self._follower = tell, Follower(record_dir)
        self._record = record_dir / "faults.jsonl"
        self._in_force: list[tuple[Fault, float]] = []  # each with its end on the monotonic clock
        self._killed: dict[str, Fault] = {}
        self._throttle: Throttle | None = None

    @property
    def unreached(self) -> list[str]:
        return [f"the fault at step {fault.at_step} was not reached: {fault}" for fault in self._waiting]

    @property
    def is_stopping(self) -> bool:
        """Whether a fault in force stops processes."""
        return any(fault.kind != "cut" for fault, _ in self._in_force)

    def tick(self, job: Job) -> None:
        """End and begin the faults of this running job that are due; call it several times a second."""
        if self._throttle is None:
            self._throttle = Throttle(job.mark)
        now_s = time.monotonic()
        for fault, ends_s in list(self._in_force):
            if ends_s <= now_s:
                self._end(fault)
                self._tell(f"fault of step {fault.at_step} is over: {fault.recovery}")
        if not self._waiting:
            return
        self._follower.poll()
        done = max((r.steps[-1].step + 1 for r in self._follower.records.values() if r.steps), default=0)
        while self._waiting and self._waiting[0].at_step <= done:
            self._begin(job, self._waiting.pop(0))

    def release(self) -> None:
        """Resume every process, so that it can end in order."""
        if self._throttle is not None:
            self._throttle.close()

    def restore(self) -> None:
        """Restore the network for the next job; call it when the processes have ended."""
        self._in_force = []
        if self._network is not None:
            self._network.cut([])
            for name in self._killed:
                self._network.restore(name)
        self._killed = {}

    def _begin(self, job: Job, fault: Fault) -> None:
        self._tell(f"fault at step {fault.at_step}: {fault}")
        name = fault.names[0]
        if fault.kind == "restart":
            self._write(self._killed.pop(name), "end")
        self._write(fault, "begin")
        if fault.kind == "kill":
            self._kill(job, fault, name)
        elif fault.kind == "restart":
            if self._network is not None:
                self._network.restore(name)
            job.start(self._emulation.cluster.names.index(name), returns=True)
        else:
            ends_s = math.inf if fault.for_s is None else time.monotonic() + fault.for_s
            self._in_force.append((fault, ends_s))
            self._apply()

    def _kill(self, job: Job, fault: Fault, name: str) -> None:
        """Unplug the node first, so that peers don't see its connections close; then kill its processes."""
        self._killed[name] = fault
        if self._network is not None:
            self._network.unplug(name)
        job.kill(name, fault.at_step)
        if self._network is not None:
            self._network.remove(name)
        for other, _ in list(self._in_force):
            if other.kind != "cut" and name in other.names:
                self._end(other)

    def _end(self, fault: Fault) -> None:
        self._in_force = [one for one in self._in_force if one[0] is not fault]
        self._apply()
        self._write(fault, "end")

    def _apply(self) -> None:
        """Set the cuts and the shares of time that the faults in force add up to."""
        assert self._throttle is not None
        pairs: set[frozenset[str]] = set()
        shares: dict[str, float] = {}
        for fault, _ in self._in_force:
            if fault.kind == "cut":
                pairs |= self._emulation.cluster.separated(fault)
            else:
                share = 0.0 if fault.factor is None else 1 / fault.factor
                shares[fault.names[0]] = min(share, shares.get(fault.names[0], 1.0))
        if self._network is not None:
            self._network.cut(pairs)
        self._throttle.set(shares)

    def _write(self, fault: Fault, phase: str) -> None:
        line = {"epoch_s": time.time(), "at_step": fault.at_step, "kind": fault.kind, "nodes": fault.names}
        line |= {"for_s": fault.for_s, "factor": fault.factor, "phase": phase}
        try:
            with self._record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # a full disk must not end the training
            self._tell(f"{self._record}: cannot be written: {(error.strerror or str(error)).lower()}")
