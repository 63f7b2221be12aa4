"""Sets of indices, for the tests of their codes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from commopt.kernels.reference.indices import MAX_N
from commopt.wire.bucket import Int64Array


def draw(n: int, k: int, seed: int) -> Tensor:
    return torch.from_numpy(np.sort(np.random.default_rng(seed).choice(n, k, replace=False)))


def corner_cases() -> Iterator[tuple[int, Tensor]]:
    """None, one, all but one, all, runs and combs; large draws; and indices beyond 32 bits."""
    for n in (1, 2, 7, 8, 9, 63, 64, 65, 1000, 4096, 100_003):
        every = torch.arange(n)
        yield from ((n, every[a:z]) for a in (0, n // 3, n - n // 10) for z in (0, n // 2, n))
        yield from ((n, x) for i in (0, n // 2, n - 1) for x in (every[i : i + 1], every[every != i]))
        yield from ((n, every[::stride].contiguous()) for stride in (2, 700))
    for density in (0.001, 0.01, 0.1, 0.3, 0.4, 0.9):
        yield 200_000, draw(200_000, round(200_000 * density), 3)
    for n in (2**31 - 1, 2**31 + 7, 2**33, MAX_N):
        for indices in ([n - 1], [0], [0, n - 1], list(range(n - 200, n)), [2**31 - 4, 2**31 - 3, n - 1]):
            yield n, torch.tensor(indices)


def many_blocks() -> tuple[Tensor, Int64Array, Int64Array]:
    ns = np.asarray([0, 17, 17, 17, 1000, 1000, 1000, 3, 2**35, 90, 64, 1])
    ks = np.asarray([0, 0, 17, 5, 900, 2, 999, 0, 3, 40, 32, 1])
    rng = np.random.default_rng(5)
    # of n = 2**35 all that counts is that there are few
    drawn = [np.sort(rng.choice(min(n, 10**6), k, replace=False)) for n, k in zip(ns, ks, strict=True)]
    return torch.from_numpy(np.concatenate(drawn)), ns, ks
