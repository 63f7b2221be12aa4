"""What each rank of step.py runs: a GPT under one of commopt's methods or a peer, in the same loop with the same data.

step_ranks.py ef_sign '{"options": {}, "optimizer": {"name": "adam", "lr": 0.001}, "steps": 15, "layers": 5, ...}'

In a race (`seconds` among the settings) ranks train for so many seconds, and look at the loss on held-out text now and then while
their clocks stand. They agree on the step of the next look through files beside their records, so the network carries nothing of it.
Everything is recorded as launch/train.py records (commopt.record.recorder), and what the interface received too.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from building import build, training_program
from step_peers import PEERS, Peer
from torch import Tensor, nn

import commopt
from commopt.groups import connect
from commopt.record.recorder import Recorder
from commopt.run import log

SETTLED = 3  # DDP makes its buckets anew in the first steps; commopt counts none of them as steady either
COMPUTE_STEPS = 20
HELD_OUT = 16  # windows of each look

Settings = Mapping[str, Any]


class TwoWayRecorder(Recorder):
    """A recorder that counts what the interface received as well: a node may receive more than it sends."""

    def counters(self, name: Literal["begin", "end"], traffic: Mapping[str, Any], steps: int | None = None) -> None:
        super().counters(name, {**traffic, "nic_rx_bytes": received_bytes(os.environ.get("COMMOPT_NIC"))}, steps)


def received_bytes(interface: str | None) -> int | None:
    """Bytes that have come in through an interface, headers included, by netlink; None where no interface is named."""
    if not interface:
        return None
    from pyroute2 import IPRoute

    with IPRoute() as route:
        (link,) = route.link("get", ifname=interface)
        return int(link.get_attr("IFLA_STATS64")["rx_bytes"])


# ---- a peer's run ----------------------------------------------------------------------------------------------------


class Training(Protocol):
    """What the loop needs of a commopt.Run, and what a `PeerRun` has too."""

    rank: int
    ranks: int
    optimizer: Any

    def range(self, stop: int) -> Iterator[int]: ...
    def log(self, **values: float | Tensor) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...


class PeerRun:
    """A peer in the loop, recorded as commopt records its own runs."""

    def __init__(self, name: str, peer: Peer, settings: Settings) -> None:
        self.rank, self.ranks, self.optimizer = dist.get_rank(), dist.get_world_size(), peer.optimizer
        self.peer, self._steps, self._mark, self._is_steady = peer, 0, time.perf_counter(), False
        self._recorder = TwoWayRecorder.from_environment(self.rank, self.ranks)
        parameters = sum(p.numel() for p in peer.model.parameters())
        self._recorder.start(method=name, options={}, parameters=parameters, steps=settings["steps"])

    def range(self, stop: int) -> Iterator[int]:
        self._mark = time.perf_counter()
        while self._steps < stop:
            if not self._is_steady and self._steps >= max(SETTLED, self.peer.warmup_steps):
                self._is_steady = True
                self._count("begin")
            yield self._steps
            self._steps += 1

    def log(self, **values: float | Tensor) -> None:
        tokens = int(values.get("tokens", 0))
        if "validation_loss" in values:
            self._recorder.validation(step=self._steps, loss=float(values["validation_loss"]), tokens=tokens)
            return
        step, seconds, loss = self._steps, time.perf_counter() - self._mark, float(values["loss"])
        self._recorder.step(step=step, loss=loss, seconds=seconds, wait_s=0.0, tokens=tokens, steady=self._is_steady)
        self._mark = time.perf_counter()

    def finish(self) -> None:
        self.peer.finish()
        if self._is_steady:
            self._count("end")

    def record_compute(self, seconds: list[float]) -> None:
        self._recorder.compute(seconds)

    def close(self) -> None:
        self._recorder.end()
        dist.barrier()
        dist.destroy_process_group()

    def _count(self, end: Literal["begin", "end"]) -> None:
        dist.barrier()
        self._recorder.counters(end, self.peer.traffic(self._steps).as_dict(), self._steps)
        self._mark = time.perf_counter()


# ---- the loop --------------------------------------------------------------------------------------------------------


class Clock:
    """When the ranks of a race look at their losses next: they agree through files, and their clocks stand meanwhile."""

    def __init__(self, folder: Path, rank: int, ranks: int, seconds: float, looks: int) -> None:
        self.folder, self.rank, self.ranks = folder, rank, ranks
        self.seconds, self.looks, self.trained_s, self._meetings = seconds, looks, 0.0, 0

    def next_stop(self, steps: int, segment_s: float, segment_steps: int) -> int:
        """The step of the next look, after so many seconds for so many steps; `steps` itself at the end of the race."""
        told = self._meet([segment_s / max(1, segment_steps), segment_s])
        step_s, segment_s = (statistics.fmean(column) for column in zip(*told, strict=True))
        self.trained_s += segment_s
        marks = (self.seconds * ((k + 1) / self.looks) ** 1.5 for k in range(self.looks))  # losses fall fast at first
        ahead = [mark for mark in marks if mark > self.trained_s + step_s / 2]
        return steps + max(1, round((ahead[0] - self.trained_s) / step_s)) if ahead else steps

    def _meet(self, own: list[float]) -> list[list[float]]:
        """What every rank told, by rank; waits for all of them."""
        self._meetings += 1
        files = [self.folder / f"meeting{self._meetings}-{rank}.json" for rank in range(self.ranks)]
        unfinished = files[self.rank].with_suffix(".new")
        unfinished.write_text(json.dumps(own))
        unfinished.rename(files[self.rank])
        while not all(file.exists() for file in files):
            time.sleep(0.002)
        return [json.loads(file.read_text()) for file in files]


def train(model: nn.Module, run: Training, settings: Settings) -> list[tuple[Tensor, Tensor]]:
    """Train for the steps or the seconds of the settings; returns batches that were not trained on."""
    page, batch, context = training_program(), settings["batch"], settings["context"]
    corpus, held_out = page.read_corpus(None)
    data = torch.Generator().manual_seed(settings["seed"] * 1000 + run.rank)  # the same whatever the method
    looked_at = page.draw(held_out, HELD_OUT, context, torch.Generator().manual_seed(1))
    race_s, folder = settings.get("seconds"), Path(os.environ.get("COMMOPT_RECORD", "."))
    clock = Clock(folder, run.rank, run.ranks, race_s, settings["looks"]) if race_s else None
    done, stop = 0, settings["steps"]
    while done < stop:
        start = time.perf_counter()
        for _ in run.range(stop):
            loss = page.train_step(model, run.optimizer, page.draw(corpus, batch, context, data))
            run.log(loss=loss, tokens=batch * context)
        segment_s, segment_steps, done = time.perf_counter() - start, stop - done, stop
        if clock is not None:
            with torch.no_grad():
                run.log(validation_loss=unwrapped(model)(*looked_at), tokens=HELD_OUT * context)
            stop = clock.next_stop(done, segment_s, segment_steps)
    run.finish()
    return [page.draw(corpus, batch, context, data) for _ in range(COMPUTE_STEPS)]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in a wrapper whose forward communicates."""
    inside: nn.Module = getattr(model, "module", getattr(model, "_model", model))
    return inside


def made(settings: Settings) -> nn.Module:
    """The model, the same on every rank."""
    torch.manual_seed(settings["seed"])
    sizes = [settings[key] for key in ("layers", "heads", "width", "context")]
    gpt: nn.Module = training_program().GPT(*sizes, settings.get("embedding-std", 0.02))
    return gpt


def keep_to_a_core() -> None:
    """Keep this rank, with the threads that it will start, to a core of its own if there are enough."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if ranks <= len(cores):
        os.sched_setaffinity(0, {cores[rank]})


def main(name: str, settings: Settings) -> None:
    keep_to_a_core()
    step = training_program().train_step
    if name in PEERS:
        dist.init_process_group("gloo")
        peer = PEERS[name](made(settings), settings)
        theirs = PeerRun(name, peer, settings)
        batches = train(peer.model, theirs, settings)
        seconds = []
        with peer.alone():  # what the same steps cost without a network
            for batch in batches:
                start = time.perf_counter()
                step(peer.model, peer.optimizer, batch)
                seconds.append(time.perf_counter() - start)
        theirs.record_compute(seconds[2:])
        theirs.close()
        return
    log.Recorder = TwoWayRecorder  # type: ignore[attr-defined]
    group = connect("gloo")
    gpt = made(settings)
    method, optimizer = build({"method": name, **settings}, gpt)
    model = commopt.wrap(gpt, method, bucket_cap_mb=settings["bucket-mb"])
    with commopt.attach(model, method, optimizer, group=group) as run:
        run.join()
        left = iter(train(model, run, settings))
        run.measure_compute(lambda: step(model, run.optimizer, next(left)), COMPUTE_STEPS)
        run.quiet()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("step_ranks.py: write a method or a peer, and the settings of a cell as JSON; step.py starts it")
    main(sys.argv[1], json.loads(sys.argv[2]))
