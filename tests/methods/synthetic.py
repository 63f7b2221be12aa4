"""Parameters whose gradients the tests write themselves, and the frame of an oracle test over them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from commopt import attach, build
from commopt.groups import Group, SimWorld

F64 = NDArray[np.float64]
Shapes = Sequence[tuple[int, ...]]


class Parameters(nn.Module):
    """The same on every rank."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.all = nn.ParameterList([nn.Parameter(torch.randn(*shape, generator=generator)) for shape in shapes])

    def set_gradients(self, rank: int, step: int) -> None:
        """A mean of 0.3 with noise of each rank's own, of another size in each parameter."""
        generator = torch.Generator().manual_seed(1000 * rank + step)
        for k, p in enumerate(self.all):
            p.grad = (0.3 + torch.randn(p.shape, generator=generator)) * 10.0**-k

    def flat(self) -> F64:
        return np.asarray(torch.cat([p.detach().reshape(-1) for p in self.all]).double())


def gradients(shapes: Shapes, ranks: int, step: int) -> F64:
    """(ranks, n) what `set_gradients` writes."""
    rows = []
    for rank in range(ranks):
        model = Parameters(shapes)
        model.set_gradients(rank, step)
        rows.append(torch.cat([p.grad.reshape(-1) for p in model.all if p.grad is not None]).double().numpy())
    return np.stack(rows)


def spans(shapes: Shapes) -> list[slice]:
    """Where each parameter lies in a flat tensor of all."""
    starts = np.cumsum([0, *map(math.prod, shapes)])
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(starts)]


def train(group: Group, shapes: Shapes, steps: int, name: str, **options: Any) -> list[dict[str, F64]]:
    """The parameters "x" and every tensor of `comm_state` before each step, and after the last. Plain SGD with rate 0.05 applies it."""
    model = Parameters(shapes)
    method: Any = build(name, **options)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    attach(model, method, sgd, group=group)

    def snapshot() -> dict[str, F64]:
        state = method.saved()
        tensors = {**state["shared"], **state["rank"]}
        return {"x": model.flat(), **{key: np.asarray(x.double().clone()) for key, x in tensors.items()}}

    states = [snapshot()]
    for step in range(steps):
        model.set_gradients(group.rank, step)
        sgd.step()
        states.append(snapshot())
    return states


def simulate(ranks: int, shapes: Shapes, steps: int, name: str, **options: Any) -> list[list[dict[str, F64]]]:
    """[rank][step] as `train` gives it."""
    return SimWorld[Any](ranks).run(lambda group: train(group, shapes, steps, name, **options))
