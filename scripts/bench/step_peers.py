"""The peers that step.py measures beside commopt's methods: torch's own, and public code that runs on Gloo.

Each takes the model and a cell's settings, and returns a `Peer`. Formats that no public package sends on a CPU are in step_formats.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from step_formats import FORMATS, Wire
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, post_localSGD_hook, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from commopt.errors import ConfigError
from commopt.groups.base import Traffic
from commopt.optim import make_optimizer
from commopt.plan.links import schedule

LOCAL_SGD_STARTS, LOCAL_SGD_PERIOD = 4, 4  # torch's documentation has a period of 4, and starts at step 100


@dataclass
class Peer:
    """A model and an optimizer as a peer wants them.

    traffic: what this rank has sent, from the number of steps done. alone: inside, a step sends nothing. warmup_steps: after
    which it is steady. finish: called after the last step.
    """

    model: nn.Module
    optimizer: Any
    traffic: Callable[[int], Traffic]
    alone: Callable[[], AbstractContextManager[Any]]
    warmup_steps: int = 0
    finish: Callable[[], object] = lambda: None


Settings = Mapping[str, Any]


def all_reduced(nbytes: float) -> Traffic:
    """What this rank has sent in all-reduces of so many bytes, by the schedule that commopt counts its own with."""
    traffic = Traffic()
    traffic.record("all_reduce", schedule("all_reduce", int(nbytes), dist.get_rank(), dist.get_world_size()))
    return traffic


def parameters_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ---- torch's own -----------------------------------------------------------------------------------------------------


def torch_ddp(gpt: nn.Module, settings: Settings) -> Peer:
    """DDP as it is: a mean of float32 by a ring all-reduce."""
    model = DistributedDataParallel(gpt)
    optimizer, n = make_optimizer(settings["optimizer"], model.parameters()), parameters_of(gpt)
    return Peer(model, optimizer, lambda steps: all_reduced(4.0 * steps * n), model.no_sync)


def torch_fp16(gpt: nn.Module, settings: Settings) -> Peer:
    """torch's fp16_compress_hook."""
    peer, n = torch_ddp(gpt, settings), parameters_of(gpt)
    peer.model.register_comm_hook(None, default_hooks.fp16_compress_hook)  # type: ignore[operator]
    peer.traffic = lambda steps: all_reduced(2.0 * steps * n)
    return peer


def torch_powersgd(gpt: nn.Module, settings: Settings, bucket_cap_mb: int | None = None) -> Peer:
    """torch's powerSGD_hook of rank 1, with its error feedback and warm start, from the third step on."""
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
    model = DistributedDataParallel(gpt, bucket_cap_mb=bucket_cap_mb)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    optimizer = make_optimizer(settings["optimizer"], model.parameters())
    return Peer(model, optimizer, lambda _: all_reduced(4.0 * state.total_numel_after_compression), model.no_sync)


def torch_powersgd_one_bucket(gpt: nn.Module, settings: Settings) -> Peer:
    """The same in one bucket: on Gloo, the hook's callbacks mix up the exchanges of several."""
    return torch_powersgd(gpt, settings, bucket_cap_mb=1000)


def torch_post_localsgd(gpt: nn.Module, settings: Settings) -> Peer:
    """torch's post-local SGD: gradients of every step at first, then parameters every few steps."""
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer  # slow to import, and warns

    model, n = DistributedDataParallel(gpt), parameters_of(gpt)
    myself = dist.new_subgroups(1)[0]  # type: ignore[no-untyped-call]  # its default does not work without CUDA
    state = post_localSGD_hook.PostLocalSGDState(  # type: ignore[no-untyped-call]
        dist.group.WORLD, myself, LOCAL_SGD_STARTS
    )
    model.register_comm_hook(state, post_localSGD_hook.post_localSGD_hook)
    averager = PeriodicModelAverager(LOCAL_SGD_PERIOD, LOCAL_SGD_STARTS)
    optimizer = PostLocalSGDOptimizer(make_optimizer(settings["optimizer"], model.parameters()), averager)

    def sent(steps: int) -> Traffic:
        local = max(0, steps - LOCAL_SGD_STARTS)
        return all_reduced(4.0 * n * (steps - local + -(-local // LOCAL_SGD_PERIOD)))

    @contextmanager
    def alone() -> Iterator[None]:
        averager.period = 1 << 30
        with model.no_sync():
            yield

    return Peer(model, optimizer, sent, alone, LOCAL_SGD_STARTS)


# ---- public packages -------------------------------------------------------------------------------------------------


class StepsItself:
    """The optimizer of a wrapper that steps in its backward hooks."""

    def step(self) -> None: ...
    def zero_grad(self) -> None: ...


def decent_dp(gpt: nn.Module, settings: Settings) -> Peer:
    """Decent-DP: replicas average with one peer of an exponential graph in every step, one step late. `pip install decent-dp`."""
    try:
        from decent_dp.ddp import DecentralizedDataParallel
    except ImportError:
        raise ConfigError("decent_dp: is not installed; pip install decent-dp") from None

    def optimizer(named: list[tuple[str, torch.Tensor]]) -> torch.optim.Optimizer:
        return make_optimizer(settings["optimizer"], [p for _, p in named])

    model, n = (
        DecentralizedDataParallel(gpt, optimizer, topology="one-peer-exp", _local_world_size=1),
        parameters_of(gpt),
    )

    @contextmanager
    def alone() -> Iterator[None]:
        had, dist.all_reduce = dist.all_reduce, lambda *_, **__: None
        try:
            yield
        finally:
            dist.all_reduce = had

    def sent(steps: int) -> Traffic:  # an all-reduce of two ranks sends what it reduces
        traffic = Traffic()
        for step in range(1, steps):
            edge = model._topo.get_edge(step)
            (other,) = (rank for rank in edge.ranks if rank != dist.get_rank())
            traffic.record("all_reduce", {other: 4.0 * n})
        return traffic

    return Peer(model, StepsItself(), sent, alone)


def format_of(make: Callable[[nn.Module, Settings, Wire], Any]) -> Callable[[nn.Module, Settings], Peer]:
    """A peer of an optimizer that sends a public format."""

    def peer(gpt: nn.Module, settings: Settings) -> Peer:
        wire = Wire()
        optimizer = make(gpt, settings, wire)
        return Peer(gpt, optimizer, lambda _: wire.traffic, wire.cut, getattr(optimizer, "freeze_step", 0))

    return peer


PEERS: Mapping[str, Callable[[nn.Module, Settings], Peer]] = {
    "torch_ddp": torch_ddp,
    "torch_fp16": torch_fp16,
    "torch_powersgd": torch_powersgd,
    "torch_powersgd_one_bucket": torch_powersgd_one_bucket,
    "torch_post_localsgd": torch_post_localsgd,
    "decent_dp": decent_dp,
    **{name: format_of(make) for name, make in FORMATS.items()},
}
