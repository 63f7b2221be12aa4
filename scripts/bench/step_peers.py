"""What each rank of step.py runs: launch/train.py as it is, or its model and data under torch's own hooks.

step_peers.py train --method ef_sign --steps 15 ...        launch/train.py, unchanged
step_peers.py profile --method ef_sign --steps 15 ...      the same, timed inside on rank 0
step_peers.py torch_ddp --steps 15 ...                     a peer, with launch/train.py's names for the sizes

All of them record as launch/train.py does (commopt.record.recorder), and what the interface received too.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import os
import runpy
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from building import TRAIN, training_program
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from commopt.compress.base import Compressor
from commopt.frameworks import ddp
from commopt.groups.base import Traffic
from commopt.methods import OPTIMIZERS
from commopt.plan.links import schedule
from commopt.record import recorder as recorder_module
from commopt.record.recorder import Recorder

SETTLED = 3  # DDP makes its buckets anew in the first steps; launch/train.py waits as long
OPERATIONS = ("all_reduce", "all_gather", "all_gather_ragged", "all_to_all", "swap", "broadcast")


class TwoWayRecorder(Recorder):
    """A recorder that counts what the interface received as well: a node may receive more than it sends."""

    def counters(self, name: str, traffic: Mapping[str, Any]) -> None:
        super().counters(name, {**traffic, "nic_rx_bytes": received_bytes(os.environ.get("COMMOPT_NIC"))})


def received_bytes(interface: str | None) -> int | None:
    """Bytes that have come in through an interface, headers included, by netlink; None where no interface is named."""
    if not interface:
        return None
    from pyroute2 import IPRoute

    with IPRoute() as route:
        (link,) = route.link("get", ifname=interface)
        return int(link.get_attr("IFLA_STATS64")["rx_bytes"])


# ---- torch's own -----------------------------------------------------------------------------------------------------


def torch_ddp(model: DistributedDataParallel) -> Callable[[int], float]:
    """DDP as it is: a mean of float32 by a ring all-reduce."""
    return lambda steps: 4.0 * steps * parameters_of(model)


def torch_fp16(model: DistributedDataParallel) -> Callable[[int], float]:
    """torch's fp16_compress_hook."""
    model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return lambda steps: 2.0 * steps * parameters_of(model)


def torch_powersgd(model: DistributedDataParallel) -> Callable[[int], float]:
    """torch's powerSGD_hook of rank 1, from the third step on."""
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return lambda steps: 4.0 * state.total_numel_after_compression


# Each registers its hook, and returns the bytes handed to all-reduces so far, from how many steps were done.
PEERS: Mapping[str, Callable[[DistributedDataParallel], Callable[[int], float]]] = {
    "torch_ddp": torch_ddp,
    "torch_fp16": torch_fp16,
    "torch_powersgd": torch_powersgd,
    "torch_powersgd_one_bucket": torch_powersgd,  # its callbacks, on Gloo, mix up the exchanges of several buckets
}


def parameters_of(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def run_peer(peer: str, args: argparse.Namespace) -> None:
    """The steps of launch/train.py's main, without commopt in them."""
    page = training_program()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    corpus, _ = page.read_corpus(None)
    torch.manual_seed(args.seed)
    buckets: dict[str, Any] = {"bucket_cap_mb": 1000} if peer.endswith("one_bucket") else {}  # else torch's own sizes
    model = DistributedDataParallel(page.GPT(args.layers, args.heads, args.width, args.context), **buckets)
    sent_bytes = PEERS[peer](model)
    arguments = {key: value for key, value in args.optimizer.items() if key != "name"}
    optimizer = OPTIMIZERS[args.optimizer["name"]](model.parameters(), **arguments)

    recorder = TwoWayRecorder.from_environment()
    recorder.start(method=peer, options={}, parameters=parameters_of(model), steps=args.steps)
    data = torch.Generator().manual_seed(args.seed * 1000 + rank)
    for step in range(args.steps):
        if step == SETTLED:
            dist.barrier()
            recorder.counters("begin", traffic_of(peer, sent_bytes(step), rank, world))
        start = time.perf_counter()
        loss = page.train_step(model, optimizer, page.draw(corpus, args.batch, args.context, data))
        seconds = time.perf_counter() - start
        tokens = world * args.batch * args.context
        recorder.step(step=step, loss=loss, seconds=seconds, wait_s=0.0, tokens=tokens, steady=step >= SETTLED)
    dist.barrier()
    recorder.counters("end", traffic_of(peer, sent_bytes(args.steps), rank, world))

    seconds_alone = []
    with model.no_sync():  # what the same steps cost without a network
        for batch in [page.draw(corpus, args.batch, args.context, data) for _ in range(20)]:
            start = time.perf_counter()
            page.train_step(model, optimizer, batch)
            seconds_alone.append(time.perf_counter() - start)
    recorder.compute(seconds_alone[2:])
    recorder.end()
    dist.barrier()
    dist.destroy_process_group()


def traffic_of(peer: str, nbytes: float, rank: int, world: int) -> dict[str, Any]:
    """What a peer's all-reduces have sent, counted by their schedule as commopt counts its own."""
    traffic = Traffic(method=peer)
    traffic.record("all_reduce", schedule("all_reduce", int(nbytes), rank, world))
    return traffic.as_dict()


# ---- where the time of a step goes -----------------------------------------------------------------------------------


class Stopwatch:
    """Calls and seconds of functions, by the path of watched functions that they were called through."""

    def __init__(self) -> None:
        self.is_on = False
        self.spent: dict[tuple[str, ...], tuple[int, float]] = {}
        self._thread = threading.local()

    def around(self, label: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed while the watch is on."""

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            path = (*getattr(self._thread, "path", ()), label)
            self._thread.path, start = path, time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._thread.path = path[:-1]
                self.add(path, time.perf_counter() - start)

        return timed

    def add(self, path: tuple[str, ...], seconds: float) -> None:
        if self.is_on:
            calls, before = self.spent.get(path, (0, 0.0))
            self.spent[path] = (calls + 1, before + seconds)


def watch_steps(watch: Stopwatch) -> None:
    """Time what the next `ddp.attach` attaches: its method, its group's exchanges, codecs and kernels."""
    attach = ddp.attach

    def attach_and_watch(*args: Any, **kwargs: Any) -> ddp.DDPAttachment:
        attachment = attach(*args, **kwargs)
        for kind, owner, name in [
            *(("exchange", attachment.group, name) for name in OPERATIONS),
            ("method", attachment.method, "exchange"),
            *codecs(Compressor),
            *kernel_functions(),
        ]:
            label = f"{kind}: {getattr(owner, '__name__', type(owner).__name__).rpartition('.')[2]}.{name}"
            setattr(owner, name, watch.around(label, getattr(owner, name)))
        started_s = [0.0]

        def before(*_: Any) -> None:
            started_s[0] = time.perf_counter()

        def after(*_: Any) -> None:
            watch.add(("optimizer.step",), time.perf_counter() - started_s[0])

        attachment.optimizer.register_step_pre_hook(before)
        attachment.optimizer.register_step_post_hook(after)
        return attachment

    ddp.attach = attach_and_watch


def codecs(kind: type[Any]) -> Iterator[tuple[str, object, str]]:
    """Every compressor's own encoder and decoder."""
    for sub in kind.__subclasses__():
        for what, name in (("encode", "compress_"), ("decode", "decompress_")):
            if name in vars(sub):
                yield what, sub, name
        yield from codecs(sub)


def kernel_functions() -> Iterator[tuple[str, object, str]]:
    """The public functions of the kernels that are loaded; methods look them up when they call them."""
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("commopt.kernels.") and ".reference" not in module_name:
            for name, function in list(vars(module).items()):
                if inspect.isfunction(function) and function.__module__ == module_name and not name.startswith("_"):
                    yield "kernel", module, name


class ProfilingRecorder(TwoWayRecorder):
    """Switches the watch on for the steady steps, and writes down what it saw."""

    watch = Stopwatch()

    def counters(self, name: str, traffic: Mapping[str, Any]) -> None:
        if name == "end":
            self.watch.is_on = False
            rows = [[list(path), calls, seconds] for path, (calls, seconds) in self.watch.spent.items()]
            self.event("profile", rows=rows)
        super().counters(name, traffic)
        self.watch.is_on = name == "begin"


def main(what: str, words: list[str]) -> None:
    if what in ("train", "profile"):
        is_profiled = what == "profile" and os.environ.get("RANK") == "0"  # one rank, the others run as ever
        recorder_module.Recorder = ProfilingRecorder if is_profiled else TwoWayRecorder  # type: ignore[misc]
        if is_profiled:
            watch_steps(ProfilingRecorder.watch)
        sys.argv = [str(TRAIN), *words]
        runpy.run_path(str(TRAIN), run_name="__main__")
        return
    parser = argparse.ArgumentParser(prog=f"step_peers.py {what}")
    for name in ("steps", "layers", "heads", "width", "context", "batch", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--optimizer", type=json.loads, required=True, help='as JSON: {"name": "adam", "lr": 0.001}')
    parser.add_argument("--backend", choices=["gloo"], default="gloo")
    run_peer(what, parser.parse_args(words))


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("train", "profile", *PEERS):
        sys.exit(f"step_peers.py: write one of train, profile, {', '.join(PEERS)} first; step.py starts it")
    main(sys.argv[1], sys.argv[2:])
