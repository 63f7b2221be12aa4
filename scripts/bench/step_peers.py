"""What each rank of step.py runs: launch/train.py as it is, or its model and data under torch's own hooks.

step_peers.py train --method ef_sign --steps 15 ...        launch/train.py, unchanged
step_peers.py torch_ddp --steps 15 ...                     a peer, with launch/train.py's names for the sizes

All of them record as launch/train.py does (commopt.record.recorder), and what the interface received too.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from building import TRAIN, training_program
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from commopt.groups.base import Traffic
from commopt.optim import make_optimizer
from commopt.plan.links import schedule
from commopt.record.recorder import Recorder
from commopt.run import log

SETTLED = 3  # DDP makes its buckets anew in the first steps; launch/train.py waits as long


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
    optimizer = make_optimizer(args.optimizer, model.parameters())

    recorder = TwoWayRecorder.from_environment(rank, world)
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


def main(what: str, words: list[str]) -> None:
    if what == "train":
        log.Recorder = TwoWayRecorder  # type: ignore[attr-defined]
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
    if len(sys.argv) < 2 or sys.argv[1] not in ("train", *PEERS):
        sys.exit(f"step_peers.py: write one of train, {', '.join(PEERS)} first; step.py starts it")
    main(sys.argv[1], sys.argv[2:])
