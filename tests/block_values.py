"""Blocks and their values, for the tests of codecs and kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from commopt import kernels
from commopt.compress.base import Codes, Compressor
from commopt.wire import noise
from commopt.wire.bucket import Blocks, Bucket, ParameterIndex
from commopt.wire.payload import Payload

LENGTHS = st.lists(
    st.one_of(st.integers(1, 140), st.sampled_from([255, 256, 2047, 2048, 2049, 4096, 5001])), min_size=1, max_size=4
)
SEEDS = st.integers(0, 2**31)
KERNELS = ("cpu", "reference")  # numba, and plain torch


def blocks_in(codec: Compressor, numels: list[int], ranks: int = 3) -> Blocks:
    """The blocks that a codec cuts parameters of these sizes into."""
    tensors = [(f"p{k}", torch.zeros(n)) for k, n in enumerate(numels)]
    return codec.table(ParameterIndex.of(tensors), ranks).all_of(Bucket.of(tensors))


def blocks_of(lengths: list[int], gap: int = 3, seed: int | None = 0) -> Blocks:
    """Blocks with gaps in the values, and in reverse order in the residual; with random keys unless `seed` is None."""
    n = np.asarray(lengths, dtype=np.int64)
    starts, homes = np.cumsum(n + gap) - n, np.cumsum(n[::-1])[::-1] - n
    number = np.arange(len(n))
    keys = None if seed is None else noise.keys(seed, "test", 0, np.zeros_like(n), homes)
    return Blocks(starts, homes, n, number, number, keys)


def heavy_tailed(n: int, seed: int, spread: float = 2.0) -> Tensor:
    """Values over many magnitudes, a tenth of them 0.0 and a tenth -0.0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * torch.randn(n, generator=generator).mul(spread).exp()
    u = torch.rand(n, generator=generator)
    return torch.where(u < 0.1, 0.0, torch.where(u > 0.9, -0.0, x))


def compress(codec: Compressor, x: Tensor, residual: Tensor | None, blocks: Blocks) -> Codes:
    """The tensors of a message."""
    if codec.is_ragged:
        return codec.encode(x, residual, blocks)
    payload = Payload.allocate(codec.layout(blocks), x.device)
    payload.buffer.fill_(171)  # all of it has to be written
    codec.compress_(x, residual, [blocks], [payload.tensors])
    return payload.tensors


def sent_by(codec: Compressor, x: Tensor, blocks: Blocks, residual: Tensor | None = None) -> Tensor:
    """(n,) what the message stands for; zeros beside the blocks."""
    out = torch.zeros_like(x)
    codec.decompress_(compress(codec, x, residual, blocks), blocks, out)
    return out


@contextmanager
def kernels_are(kind: str) -> Iterator[None]:
    """Let codecs use the kernels in commopt.kernels.cpu, or in commopt.kernels.reference."""
    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(kernels, "of", lambda name, device: import_module(f"commopt.kernels.{kind}.{name}"))
        yield


def still_to_send(exchanges: list[Any]) -> Tensor:
    """(n,) the ranks' mean worker residual, and each one's server residual at the places of its parameters."""
    whole = torch.stack([one.worker.residual for one in exchanges]).mean(0)
    for rank, one in enumerate(exchanges):
        if server := getattr(one, "server", None):
            blocks = one.table.at_home(rank)
            parts = torch.split(server.residual, blocks.lengths.tolist())
            for start, part in zip(blocks.starts, parts, strict=True):
                whole[start : start + len(part)] += part
    return whole


def draw(blocks: Blocks, seed: int, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    n = int(blocks.starts[-1] + blocks.lengths[-1]) + 5
    return heavy_tailed(n, seed, spread), heavy_tailed(blocks.elements, seed + 1, spread)
