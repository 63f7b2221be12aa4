"""A small model sharded over four ranks, and the same training on one process; functions that the ranks run."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rig import default_block, loss_of, make_batch, sgd_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from commopt import Method, attach, build
from commopt.groups import Group
from commopt.optim import make_optimizer
from commopt.wire.bucket import Bucket
from commopt.wire.shards import local

SHARDS = 2
Flats = dict[str, Tensor]


@functools.cache
def mesh_of(*shape: int) -> DeviceMesh:
    """A mesh of the four ranks: (2, 2) has two replicas of two shards, (1, 4) one of four, and (4,) shards alone."""
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


class Uneven(nn.Module):
    """Three layers whose rows two shards cannot share evenly; the last has one row, of which the second shard has nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, 37), nn.Linear(37, 24), nn.Linear(24, 1)
        self.scale = nn.Parameter(torch.ones(24))
        self.is_poisoned = False  # whether this rank's gradient of row 20 of `second` is NaN, and no other
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)

    def forward(self, x: Tensor, uses_scale: bool = True) -> Tensor:
        hidden = self.first(x).tanh()
        if self.is_poisoned:
            hidden.register_hook(lambda grad: grad.nan_to_num(0.0))
        hidden = self.second(hidden)
        if self.is_poisoned:
            hidden.register_hook(lambda grad: grad.index_fill(1, torch.tensor([20]), torch.nan))
        hidden = hidden.tanh()
        y: Tensor = self.last(hidden * self.scale if uses_scale else hidden)
        return y


UNITS = {  # what one call of fully_shard holds, in its order
    "first": ["first.weight", "first.bias"],
    "second": ["second.weight", "second.bias"],
    "root": ["scale", "last.weight", "last.bias"],
}


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    x, y = make_batch(rank, step)
    return x, y[:, :1]


def sharded(mesh: Any, layers: tuple[str, ...] = ("first", "second"), **options: Any) -> Any:
    model = Uneven()
    for layer in layers:
        fully_shard(getattr(model, layer), mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return sgd_of(model, momentum=0.9)


def train(model: Any, optimizer: torch.optim.Optimizer, rank: int, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        x, y = batch(rank, step)
        loss = loss_of(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def shards(model: nn.Module) -> Flats:
    """This rank's shard of every parameter, flat."""
    return {name: local(p).reshape(-1).clone() for name, p in model.named_parameters()}


def assert_equal(found: Flats, expected: Flats) -> None:
    assert [name for name, x in expected.items() if not torch.equal(found[name], x)] == []


def assert_shards_of(model: nn.Module, found: list[Flats], shards: int) -> None:
    """Each rank has its shard of the parameters of an unsharded model."""
    for rank, own in enumerate(found):
        assert_equal(own, {name: cut(p.detach(), shards, rank % shards) for name, p in model.named_parameters()})


@contextmanager
def attached(mesh: Any, method: Any, group: Any = None, **options: Any) -> Iterator[Any]:
    """(model, optimizer that steps, run)"""
    model, made = sharded(mesh, **options), build(method)
    run = attach(model, made, optimizer_for(made, model.parameters()), group=group)
    try:
        yield model, run.optimizer, run
    finally:
        run.close()


def cut(x: Tensor, shards: int, shard: int) -> Tensor:
    """What one of some ranks holds of a parameter: its rows as torch.chunk cuts them, flat."""
    pieces = torch.chunk(x, shards, dim=0)
    return pieces[shard].reshape(-1) if shard < len(pieces) else x.new_empty(0)


def gradient(model: nn.Module, rank: int, step: int) -> Flats:
    """What one rank's batch gives, by parameter."""
    model.zero_grad()
    x, y = batch(rank, step)
    loss_of(model(x), y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train_replica(group: Group, method: dict[str, Any], steps: int) -> nn.Module:
    """What FSDP's replica of two shards should do, on one process: a method for each shard, alone."""
    model = Uneven()
    methods: list[Any] = [build(method) for _ in range(SHARDS)]
    parts_of: list[dict[str, nn.Parameter]] = []
    for shard, one in enumerate(methods):
        cuts = ((name, p, cut(p.detach(), SHARDS, shard)) for name, p in model.named_parameters())
        held = {name: nn.Parameter(x.view(-1, *p.shape[1:]).clone()) for name, p, x in cuts if x.numel()}
        parts_of.append(held)
        one.follow(optimizer_for(one, held.values()), held)
        one.bind(list(held.items()), group)
    optimizer = optimizer_for(methods[0], model.parameters())
    for step in range(steps):
        own, other = (gradient(model, SHARDS * group.rank + shard, step) for shard in range(SHARDS))
        averaged = []
        for shard, one in enumerate(methods):
            parts = {name: cut((own[name] + other[name]) / 2, SHARDS, shard) for name in own}
            for names in UNITS.values():
                bucket = Bucket.of([(name, parts[name]) for name in names if parts[name].numel()])
                (one.exchange_alone if one.is_local else one.exchange)(bucket, group)
                one.receive(bucket)
                one.exchanges[[one.index.position[name] for name in bucket.names]] += 1
                parts |= dict(bucket.views())
            averaged.append(parts)
        for name, p in model.named_parameters():
            p.grad = torch.cat([parts[name] for parts in averaged]).view_as(p)
        if methods[0].kind == "gradient":
            optimizer.step()
            continue
        for one, held in zip(methods, parts_of, strict=True):
            for p in held.values():
                p.grad = p.detach()
            one.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(torch.cat([held[name] for held in parts_of if name in held]).view_as(p))
    return model


def optimizer_for(method: Method, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """One that an update method can replace, or SGD."""
    if method.kind == "update":
        return make_optimizer({**default_block(type(method)), "lr": 0.003, "weight_decay": 0.01}, parameters)
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.0 if method.name == "dgc" else 0.9)
