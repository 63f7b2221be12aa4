"""Random bits that depend on what is drawn for and not on when: a counter goes through a mixing function.

A draw is named by (seed, purpose, rank, how often the parameter has been exchanged, where it lies), so that ranks agree where they
should, a resumed run draws what the uninterrupted one would have drawn, and buckets do not matter. splitmix64 (Steele et al. 2014).
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

UInt64Array = NDArray[np.uint64]
GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(x: UInt64Array) -> UInt64Array:
    """(n,) u64: the finaliser of splitmix64, a bijection whose every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
    return x ^ (x >> np.uint64(31))


def words(seed: int, purpose: str, rank: int, counts: NDArray[np.int64]) -> UInt64Array:
    """(B,) u64: what keys are made of beside places; counts: how often each has been drawn for."""
    key = np.asarray([seed & _MASK], dtype=np.uint64)
    for word in (zlib.crc32(purpose.encode()), rank):
        key = mix(key + np.uint64(GOLDEN * (word + 1) & _MASK))
    return mix(key + np.uint64(GOLDEN) * (counts.astype(np.uint64) + np.uint64(1)))


def keys(seed: int, purpose: str, rank: int, counts: NDArray[np.int64], places: NDArray[np.int64]) -> UInt64Array:
    """(B,) u64: one key for each block, from how often it has been drawn for and where it lies."""
    drawn = words(seed, purpose, rank, counts)
    return mix(drawn + np.uint64(GOLDEN) * (places.astype(np.uint64) + np.uint64(1)))


def bits(keys: UInt64Array, lengths: NDArray[np.int64]) -> UInt64Array:
    """(sum of lengths,) u64: element i of a block gets mix(key + (i + 1) GOLDEN)."""
    ends = np.cumsum(lengths)
    within = np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(ends - lengths, lengths) + 1
    return mix(np.repeat(keys, lengths) + within.astype(np.uint64) * np.uint64(GOLDEN))


def uniform(keys: UInt64Array, lengths: NDArray[np.int64], device: torch.device | str = "cpu") -> Tensor:
    """(sum of lengths,) f32 in [0, 1): the top 24 bits of `bits`. The oracle of the kernels that draw as they go."""
    import torch  # only here: a planner draws groups without it

    top = bits(keys, lengths) >> np.uint64(40)
    return torch.from_numpy(top.astype(np.float32) * np.float32(2.0**-24)).to(device)
