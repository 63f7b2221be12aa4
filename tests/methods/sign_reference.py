"""What the tests of 1-bit Adam, 0/1 Adam and 1-bit LAMB share: the 1-bit exchange in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rig import start
from synthetic import F64, Parameters, flat

from commopt.groups import Group, LocalGroup, SimWorld
from commopt.optim import make_optimizer


def parameters(*shapes: tuple[int, ...]) -> Parameters:
    """With two elements that never get a gradient, which the methods must leave alone."""
    return Parameters(*shapes, mean=0.5, dead=2)


def snapshot(run: Any, *keys: str) -> dict[str, Any]:
    """Parameters "x", the named state, and both residuals "e" and "server"; state per parameter only of those with elements."""
    method = run.method
    live = [p.numel() > 0 for p in run.parameters.values()]
    states = {key: method.state[key].double().numpy().copy() for key in keys}
    found = {key: x[live] if len(x) == len(live) else x for key, x in states.items()}
    residuals = (method.saved()["rank"][f"{side}_residual"] for side in ("worker", "server"))
    e, server = (flat([x.clone()]) for x in residuals)
    return {"x": flat(run.parameters.values()), **found, "e": e, "server": server}


def trained(
    ranks: int, shapes: list[tuple[int, ...]], steps: int, name: str, keys: tuple[str, ...], **options: Any
) -> list[list[dict[str, Any]]]:
    """[rank][step] `snapshot` before each step, and after the last; options are those of `rig.start`."""

    def work(group: Group) -> list[dict[str, Any]]:
        model = parameters(*shapes)
        run = start(model, name, group, **options)
        states = [snapshot(run, *keys)]
        for step in range(steps):
            model.set_gradients(group.rank, step)
            run.optimizer.step()
            states.append(snapshot(run, *keys))
        return states

    return SimWorld[Any](ranks).run(work)


def is_its_parent_on_one_rank(name: str, parent: dict[str, Any], **options: Any) -> bool:
    """Whether 30 steps of a method that never freezes equal those of the optimizer that it stands in for, bit for bit."""
    ours, theirs = parameters((50, 60), (7,), (0,)), parameters((50, 60), (7,), (0,))
    run, other = (
        start(ours, name, LocalGroup(), optimizer=parent, **options),
        make_optimizer(parent, theirs.parameters()),
    )
    for step in range(30):
        for model, optimizer in ((ours, run.optimizer), (theirs, other)):
            model.set_gradients(0, step)
            optimizer.step()
    return all(torch.equal(a, b) for a, b in zip(ours.all, theirs.all, strict=True))


def tensors_of(numels: list[int]) -> list[slice]:
    starts = np.cumsum([0, *numels])
    return [slice(a, a + n) for a, n in zip(starts, numels, strict=False) if n]


def blocks_of(numels: list[int], ranks: int, scale: str) -> list[tuple[slice, int]]:
    """Each block and the rank that serves it: blocks of 2,048 in turn ("l1"), or N chunks of each tensor."""
    blocks: list[tuple[slice, int]] = []
    for t in tensors_of(numels):
        size = 2048 if scale == "l1" else math.ceil((t.stop - t.start) / (8 * ranks)) * 8
        for j, a in enumerate(range(t.start, t.stop, size)):
            blocks.append((slice(a, min(a + size, t.stop)), len(blocks) % ranks if scale == "l1" else j))
    return blocks


def server_at_home(residuals: list[F64], numels: list[int], scale: str) -> F64:
    """(n,) the servers' residuals, each where its parameter lies."""
    rest = [list(x) for x in residuals]
    whole: list[float] = []
    for block, owner in blocks_of(numels, len(residuals), scale):
        length = block.stop - block.start
        whole += rest[owner][:length]
        rest[owner] = rest[owner][length:]
    assert not any(rest)
    return np.asarray(whole)


@dataclass
class SignExchange:
    """C(mean C(x_i)) with error feedback on both sides (Tang et al. 2021, arXiv:2102.02888), in float64."""

    numels: list[int]
    scale: str
    e: F64  # (N, n) worker residuals
    s: F64  # (n,) server residuals, each where its owner has it
    margin: F64 = field(default_factory=lambda: np.zeros(0))  # how far from a change of sign everything was, in scales

    def sign(self, c: F64, spans: list[slice]) -> F64:
        q = np.empty_like(c)
        for span in spans:
            part = c[span]
            scale = np.abs(part).mean() if self.scale == "l1" else np.sqrt((part**2).mean())
            q[span] = np.where(part >= 0, scale, -scale)
            self.margin[span] = np.minimum(self.margin[span], np.abs(part) / scale if scale else 0.0)
        return q

    def mean(self, x: F64) -> F64:
        """x: (N, n)"""
        self.margin = np.full(x.shape[1], np.inf)
        blocks = [block for block, _ in blocks_of(self.numels, len(x), self.scale)]
        spans = blocks if self.scale == "l1" else tensors_of(self.numels)
        c = x + self.e
        q = np.stack([self.sign(row, spans) for row in c])
        a = q.mean(0) + self.s
        y = self.sign(a, blocks)
        self.e, self.s = c - q, a - y
        return y
