"""Records a training run: one JSON object per line, one file per rank."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from commopt.errors import ConfigError
from commopt.record.words import spread_text

LOG = logging.getLogger(__name__)
PRINTED_LINES = 20
NIC_EVERY_S = 1.0  # how often step() also reads the interface, for the live display


def steps_wanted() -> int | None:
    """COMMOPT_STEPS: after how many optimizer steps a launcher wants the script to end; None if it does not.

    Raises ConfigError if that is not a whole number.
    """
    text = os.environ.get("COMMOPT_STEPS") if Recorder.is_wanted() else None
    if text is not None and not text.isdecimal():
        raise ConfigError(f"environment: COMMOPT_STEPS={text}: no whole number")
    return None if text is None else int(text)


@dataclass(frozen=True)
class RoundReport:
    """One outer round as one rank saw it."""

    step: int  # optimizer steps done when it ended
    round: int
    members: Sequence[int]  # the ranks whose parameters were averaged, with this one
    missed: bool  # a scheduled peer's message did not arrive in time
    blocked_s: float  # how long training stopped for it
    exchange_s: float  # from its start to the last message
    nbytes: float  # what this rank sent for it
    spread: float | None  # estimated root mean square over replicas of ||x_i - mean|| / ||mean||


@dataclass(eq=False)
class Recorder:
    """Writes `rank{r}.jsonl` in the folder that the launcher named; without a launcher, rank 0 prints some lines.

    recorder = Recorder.from_environment(rank, world_size)
    recorder.start(method="onebit_adam", options={"warmup": 24}, parameters=1_000_000, steps=300)
    for step in range(300):
        ...
        recorder.step(step=step, loss=loss, seconds=0.13, wait_s=0.05, tokens=8192, steady=step >= 24)
    recorder.end()

    Every line is flushed, so a killed run leaves what it did. A line that cannot be written (a full disk) ends the
    record with a warning, never the training.
    """

    folder: Path | None
    _: KW_ONLY
    rank: int = 0
    world_size: int = 1
    node: str = "node0"
    nic: str | None = None
    mtu: int = 1500

    def __post_init__(self) -> None:
        self._prints = self.folder is None and self.rank == 0
        self._file = None if self.folder is None else self._open(self.folder / f"rank{self.rank}.jsonl")
        self._started_s = self._nic_read_s = time.monotonic()
        self._method, self._steps, self._steps_done = "", 0, 0
        self._rounds_missed = 0  # of the rounds since the last printed step
        self._spread: float | None = None

    @staticmethod
    def is_wanted() -> bool:
        """Whether a launcher has asked for a record."""
        return bool(os.environ.get("COMMOPT_RECORD"))

    @property
    def elapsed_s(self) -> float:
        """Seconds since the record's clock was started."""
        return time.monotonic() - self._started_s

    @property
    def is_recording(self) -> bool:
        """Whether lines go to a file."""
        return self._file is not None

    @classmethod
    def from_environment(cls, rank: int, world_size: int) -> Recorder:
        """Read COMMOPT_RECORD (a folder), and COMMOPT_NODE, _NIC, _MTU.

        Without COMMOPT_RECORD, rank 0 prints and the others are silent. Raises ConfigError if COMMOPT_MTU is not a number.
        """
        folder, mtu = os.environ.get("COMMOPT_RECORD"), os.environ.get("COMMOPT_MTU") or "1500"
        if not mtu.isdecimal():
            raise ConfigError(f"environment: COMMOPT_MTU={mtu}: no whole number")
        return cls(
            Path(folder) if folder else None,
            rank=rank,
            world_size=world_size,
            node=os.environ.get("COMMOPT_NODE") or "node0",
            nic=os.environ.get("COMMOPT_NIC") or None,
            mtu=int(mtu),
        )

    def start(
        self,
        *,
        method: str,
        options: Mapping[str, Any],
        parameters: int,
        steps: int,
        resumed_at: int = 0,
        per_machine: int = 1,
        before_s: float = 0.0,
    ) -> None:
        """Record what is about to be trained, and start the clock of this record.

        steps: 0 if it is not known. resumed_at: the first step, if an earlier training is resumed; what this rank recorded of it is
            kept. per_machine: ranks that share out what their machine exchanges. before_s: seconds since training began.
        """
        self._nic_read_s = time.monotonic()
        self._started_s = self._nic_read_s - before_s
        self._method, self._steps, self._steps_done = method, steps, resumed_at
        what = {"method": method, "options": dict(options), "parameters": parameters, "steps": steps}
        when = {"epoch_s": round(time.time() - before_s, 6), "resumed_at": resumed_at}
        who = {"world_size": self.world_size, "node": self.node, "mtu": self.mtu}
        self._write("start", **who, **what, **when)
        resumed = f", resumed at step {resumed_at}" if resumed_at else ""
        on = f" on {self.world_size // per_machine} machines" if per_machine > 1 else ""
        length = f"{steps} steps, " if steps else ""
        self._print(f"{method}: {length}{parameters:,} parameters, {self.world_size} ranks{on}{resumed}")

    def step(
        self,
        *,
        step: int,
        loss: float | None,
        seconds: float,
        wait_s: float,
        tokens: int,
        steady: bool,
        at_s: float | None = None,
    ) -> None:
        """Record one optimizer step of this rank.

        loss: None if it was not logged. wait_s: the part of `seconds` spent waiting for the network. tokens: what this rank trained on.
        steady: the method is past its warm-up. at_s: when the step ended, by this record's clock; if None, now.
        """
        fields: dict[str, Any] = {} if loss is None else {"loss": _finite(loss)}
        fields |= {"seconds": seconds, "wait_s": wait_s, "tokens": tokens, "steady": steady}
        fields |= {} if at_s is None else {"at_s": round(at_s, 6)}
        if time.monotonic() - self._nic_read_s >= NIC_EVERY_S:
            fields["nic_tx_bytes"] = self._transmitted()
        self._write("step", step=step, **fields)
        self._steps_done += 1
        if self._steps_done % max(1, math.ceil(self._steps / PRINTED_LINES)) == 0 or self._steps_done == self._steps:
            missed = self._rounds_missed
            said = "" if loss is None else f": loss {loss:.3f}"
            facts = [f"step {step}{said}", f"{seconds * 1e3:.0f} ms"]
            facts += [f"{wait_s / seconds:.0%} waiting for the network"] if seconds > 0 else []
            facts += [] if self._spread is None else [f"spread {spread_text(self._spread)}"]
            facts += [f"{missed} {'round' if missed == 1 else 'rounds'} missed"] if missed else []
            self._print(", ".join(facts))
            self._rounds_missed, self._spread = 0, None

    def round(self, report: RoundReport) -> None:
        """Record one outer round of this rank."""
        spread = _finite(report.spread)
        self._write("round", **asdict(report) | {"spread": spread})
        self._rounds_missed += report.missed
        self._spread = spread if spread is not None else self._spread

    def counters(self, name: Literal["begin", "end"], traffic: Mapping[str, Any], steps: int | None = None) -> None:
        """Record the bytes so far, at one end of the measured steady window; call right after a barrier.

        traffic: `Traffic.as_dict()`. steps: how many steps it covers; by default those that were recorded. The interface's own count is
            written with it.
        """
        covers = {} if steps is None else {"steps": steps}
        self._write("counters", name=name, traffic=dict(traffic), **covers, nic_tx_bytes=self._transmitted())

    def validation(self, *, step: int, loss: float, tokens: int) -> None:
        """Record the loss on held-out text, over `tokens` of this rank."""
        self._write("validation", step=step, loss=_finite(loss), tokens=tokens)
        self._print(f"validation after step {step}: loss {float(loss):.3f}")

    def compute(
        self,
        seconds: Sequence[float],
        *,
        buckets: Sequence[int] = (),
        overlap: bool = False,
        shapes: Sequence[Sequence[int]] = (),
    ) -> None:
        """Record the times of the same steps with communication switched off.

        buckets: elements of each bucket of a step, in the order of their exchange. overlap: they are exchanged during backward. shapes: of
        the parameters.
        """
        model = {"buckets": list(buckets), "overlap": overlap, "shapes": [list(shape) for shape in shapes]}
        self._write("compute", seconds=[float(s) for s in seconds], **model)

    def event(self, kind: str, **fields: Any) -> None:
        """Record anything else that a reader of the report should know, such as a voided step with the parameter's name."""
        self._write("event", event=kind, fields=fields)
        self._print(f"{kind}: " + ", ".join(f"{key} {value}" for key, value in fields.items()))

    def end(self) -> None:
        """Record that training ended as planned; without this line, the run counts as cut short."""
        self._write("end")
        self._print(f"{self._method}: finished after {self.elapsed_s:.1f} s")
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, path: Path) -> BinaryIO | None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("ab", buffering=0)  # unbuffered: one system call per line, nothing left to fail at exit
            if file.tell() and not path.read_bytes().endswith(b"\n"):
                file.write(b"\n")  # a line that a kill cut off must not garble the next one
            return file
        except OSError as error:
            LOG.warning("rank %d records nothing: %s", self.rank, error)
            return None

    def _write(self, kind: str, **fields: Any) -> None:
        if self._file is None:
            return
        line = json.dumps({"kind": kind, "at_s": round(self.elapsed_s, 6), **fields}, default=str).encode() + b"\n"
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
        if self.nic is None or self._file is None:
            return None
        from commopt.record.meter import transmitted_bytes

        self._nic_read_s = time.monotonic()
        try:
            return transmitted_bytes(self.nic)
        except (ImportError, OSError) as error:
            LOG.warning("rank %d records no bytes of the interface: %s", self.rank, error)
            self.nic = None
            return None


def _finite(number: float | None) -> float | None:
    """A number that JSON can hold: None if it is not finite."""
    return None if number is None or not math.isfinite(number) else float(number)
