"""Parameters and gradients for optimizers under test."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

F64 = NDArray[np.float64]
Shapes = Sequence[tuple[int, ...]]


def parameters(shapes: Shapes, dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [torch.nn.Parameter(x.to(dtype)) for x in drawn]


def gradient(k: int, shape: tuple[int, ...], step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Of another size in each of three parameters."""
    generator = torch.Generator().manual_seed(100 * step + k)
    return (0.3 + torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) * 10.0 ** -(k % 3)


def step(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, number: int) -> None:
    for k, p in enumerate(params):
        p.grad = gradient(k, tuple(p.shape), number, p.dtype)
    optimizer.step()


def f64(x: Tensor) -> F64:
    return np.asarray(x.detach().double()).copy()
