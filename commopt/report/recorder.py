"""What a training program tells the world: one JSON object per line, one file per rank."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from commopt.errors import ConfigError

LOG = logging.getLogger(__name__)
PRINTED_LINES = 20
NIC_EVERY_S = 1.0  # how often step() also reads the interface, for the live display


class Recorder:
    """Writes `rank{r}.jsonl` in the folder that the launcher named; prints some lines where there is no launcher.

    recorder = Recorder.from_environment()
    recorder.start(method="onebit_adam", options={"warmup": 24}, parameters=1_000_000, steps=300)
    for step in range(300):
        ...
        recorder.step(step=step, loss=loss, seconds=0.13, wait_s=0.05, tokens=8192, steady=step >= 24)
    recorder.end()

    Every line is flushed, so a killed run leaves what it did. A line that cannot be written (a full disk) ends the
    record with a warning, never the training.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        rank: int = 0,
        world_size: int = 1,
        node: str = "node0",
        node_rank: int = 0,
        nic: str | None = None,
        mtu: int = 1500,
    ) -> None:
        self.rank = rank
        self._place = {"rank": rank, "world_size": world_size, "node": node, "node_rank": node_rank}
        self._nic, self._mtu = nic, mtu
        self._prints = folder is None and rank == 0
        self._file = self._open(folder / f"rank{rank}.jsonl") if folder is not None else None
        self._started_s = self._nic_read_s = time.monotonic()
        self._method, self._steps, self._steps_done = "", 0, 0

    @classmethod
    def from_environment(cls) -> Recorder:
        """Read COMMOPT_RECORD (a folder), RANK, WORLD_SIZE and COMMOPT_NODE, _NODE_RANK, _NIC, _MTU.

        Without COMMOPT_RECORD, rank 0 prints and the others are silent. Raises ConfigError where a number is none.
        """
        folder = os.environ.get("COMMOPT_RECORD")
        return cls(
            Path(folder) if folder else None,
            rank=_integer("RANK", 0),
            world_size=_integer("WORLD_SIZE", 1),
            node=os.environ.get("COMMOPT_NODE") or "node0",
            node_rank=_integer("COMMOPT_NODE_RANK", 0),
            nic=os.environ.get("COMMOPT_NIC") or None,
            mtu=_integer("COMMOPT_MTU", 1500),
        )

    def start(self, *, method: str, options: Mapping[str, Any], parameters: int, steps: int) -> None:
        """Say what is about to be trained; the clock of this record starts here."""
        self._started_s = self._nic_read_s = time.monotonic()
        self._method, self._steps, self._steps_done = method, steps, 0
        what = {"method": method, "options": dict(options), "parameters": parameters, "steps": steps}
        self._write("start", **self._place, nic=self._nic, mtu=self._mtu, **what)
        self._print(f"{method}: {steps} steps, {parameters:,} parameters, {self._place['world_size']} ranks")

    def step(
        self,
        *,
        step: int,
        loss: float,
        seconds: float,
        wait_s: float,
        tokens: int,
        steady: bool,
        payload_bytes: float | None = None,
    ) -> None:
        """One optimizer step of this rank.

        wait_s: the part of `seconds` spent waiting for the network. tokens: what this rank trained on. steady: the
        method is past its warm-up. payload_bytes: the library's count so far, if the live display is to show it.
        """
        fields = {"loss": _finite(loss), "seconds": seconds, "wait_s": wait_s, "tokens": tokens, "steady": steady}
        if payload_bytes is not None:
            fields["payload_bytes"] = payload_bytes
        if time.monotonic() - self._nic_read_s >= NIC_EVERY_S:
            fields["nic_tx_bytes"] = self._transmitted()
        self._write("step", step=step, **fields)
        self._steps_done += 1
        if self._steps_done % max(1, math.ceil(self._steps / PRINTED_LINES)) == 0 or self._steps_done == self._steps:
            waiting = f", {wait_s / seconds:.0%} waiting for the network" if seconds > 0 else ""
            self._print(f"step {step}: loss {float(loss):.3f}, {seconds * 1e3:.0f} ms{waiting}")

    def counters(self, name: str, traffic: Mapping[str, Any]) -> None:
        """The bytes so far, at the "begin" or the "end" of the measured steady window; call right after a barrier.

        traffic: `Traffic.as_dict()`. The interface's own count is written beside it.
        """
        if name not in ("begin", "end"):
            raise ValueError(f"counters({name!r}): the window has a 'begin' and an 'end'")
        self._write("counters", name=name, traffic=dict(traffic), nic_tx_bytes=self._transmitted())

    def validation(self, *, step: int, loss: float, tokens: int) -> None:
        """The loss on text that is not trained on, over `tokens` of this rank."""
        self._write("validation", step=step, loss=_finite(loss), tokens=tokens)
        self._print(f"validation after step {step}: loss {float(loss):.3f}")

    def compute(self, seconds: Sequence[float]) -> None:
        """The times of the same steps with communication switched off."""
        self._write("compute", seconds=[float(s) for s in seconds])

    def event(self, kind: str, **fields: Any) -> None:
        """Anything else that a reader of the report should know, such as a voided step with the parameter's name."""
        self._write("event", event=kind, fields=fields)
        self._print(f"{kind}: " + ", ".join(f"{key} {value}" for key, value in fields.items()))

    def end(self) -> None:
        """Say that training ended as planned: a record without this line is one of a run that did not."""
        self._write("end")
        self._print(f"{self._method}: finished after {time.monotonic() - self._started_s:.1f} s")
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, path: Path) -> BinaryIO | None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("ab", buffering=0)  # unbuffered: one system call per line, nothing left to fail at exit
        except OSError as error:
            LOG.warning("rank %d records nothing: %s", self.rank, error)
            return None

    def _write(self, kind: str, **fields: Any) -> None:
        if self._file is None:
            return
        at_s = round(time.monotonic() - self._started_s, 6)
        line = json.dumps({"kind": kind, "at_s": at_s, **fields}, default=str).encode() + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError("the line was written in part")
        except OSError as error:
            LOG.warning("rank %d stops recording, and goes on training: %s", self.rank, error)
            self._file.close()
            self._file = None

    def _print(self, text: str) -> None:
        if self._prints:
            print(text, flush=True)

    def _transmitted(self) -> int | None:
        if self._nic is None or self._file is None:
            return None
        from commopt.meter import transmitted_bytes

        self._nic_read_s = time.monotonic()
        try:
            return transmitted_bytes(self._nic)
        except (ImportError, OSError) as error:
            LOG.warning("rank %d records no bytes of the interface: %s", self.rank, error)
            self._nic = None
            return None


def _integer(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise ConfigError(f"environment: {name}={text}: no whole number") from None


def _finite(loss: float) -> float | None:
    """A loss as JSON can hold it: None where it is not finite."""
    loss = float(loss)
    return loss if math.isfinite(loss) else None
