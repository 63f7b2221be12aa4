"""A model whose gradients are given, for machines with several ranks and for single ranks with the mean gradients of a machine."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from presets import Preset
from rig import flat
from torch import Tensor, nn

import commopt
from commopt.groups import Group


class Net(nn.Module):
    """Parameters that share out unevenly: one of several blocks, small ones, one of one element, and one of none."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for k, shape in enumerate([(0,), (1,), (150, 40), (150,), (7, 150), (7,)]):
            self.register_parameter(f"p{k}", nn.Parameter(torch.randn(shape, generator=generator) * 0.1))

    def forward(self, *gradients: Tensor) -> Tensor:
        return torch.stack([(g * p).sum() for g, p in zip(gradients, self.parameters(), strict=True)]).sum()


def machine(number: int) -> AbstractContextManager[object]:
    """As torchrun says which machine this is."""
    return mock.patch.dict(os.environ, GROUP_RANK=str(number))


def gradient(rank: int, step: int, k: int, shape: torch.Size) -> Tensor:
    """Multiples of 1/1024, so that sums are exact."""
    generator = torch.Generator().manual_seed(100_000 * step + 100 * k + rank)
    return torch.randint(-64, 65, shape, generator=generator) / 1024


def start(preset: Preset, group: Group, bucket_bytes: int = 25 << 20, **options: Any) -> Any:
    net = Net()
    run: Any = commopt.attach(net, preset.method(), preset.optimizer(net), group=group, **options)
    run.bucket_bytes = bucket_bytes
    return run


def train(run: Any, steps: range, ranks: list[int], bad: tuple[int, int] = (-1, -1)) -> tuple[Tensor, list[Any]]:
    """Steps by the mean gradient of some ranks; bad: a step, and a rank that has a NaN in it."""
    for step in steps:
        for k, p in enumerate(run.model.parameters()):
            p.grad = sum(gradient(rank, step, k, p.shape) for rank in ranks) / len(ranks)
            if bad[0] == step and bad[1] in ranks and k == 2:
                p.grad.view(-1)[5] = float("nan")
        run.optimizer.step()
    return flat(run.model), run.voided
