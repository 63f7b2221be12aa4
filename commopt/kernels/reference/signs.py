"""The kernels in plain torch, one line an equation: the oracle of the fast ones, and what runs on devices without one."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from commopt.wire.bucket import Blocks, Int64Array

_BIT = (128, 64, 32, 16, 8, 4, 2, 1)  # the first element is the most significant bit, as in numpy.packbits


def _runs(starts: Int64Array, lengths: Int64Array, device: torch.device) -> Tensor:
    """(sum of lengths,) the indices of all elements of the blocks."""
    ends = np.cumsum(lengths)
    indices = np.arange(int(lengths.sum())) - np.repeat(ends - lengths, lengths) + np.repeat(starts, lengths)
    return torch.from_numpy(indices).to(device)


def _bit_places(blocks: Blocks, device: torch.device) -> Tensor:
    return _runs(blocks.byte_starts * 8, blocks.lengths, device)


def _per_block(blocks: Blocks, device: torch.device) -> Tensor:
    return torch.from_numpy(np.repeat(np.arange(len(blocks)), blocks.lengths)).to(device)


def block_sums(x: Tensor, residual: Tensor | None, blocks: Blocks, *, squared: bool) -> Tensor:
    """(B,) f64: sum of |c| or of c squared per block, with c = x + residual."""
    c = _corrected(x, residual, blocks).double()
    sums = torch.zeros(len(blocks), dtype=torch.float64, device=x.device)
    return sums.index_add_(0, _per_block(blocks, x.device), c * c if squared else c.abs())


def pack_signs_(x: Tensor, residual: Tensor | None, blocks: Blocks, scales: Tensor, bits: Tensor) -> None:
    """Write the sign bits of c = x + residual (1 for c >= 0), and residual <- c - scale * sign where the scale is finite."""
    c = _corrected(x, residual, blocks)
    unpacked = torch.zeros(bits.numel() * 8, dtype=torch.uint8, device=x.device)
    unpacked[_bit_places(blocks, x.device)] = (c >= 0).to(torch.uint8)
    weights = torch.tensor(_BIT, dtype=torch.uint8, device=x.device)
    bits.copy_((unpacked.view(-1, 8) * weights).sum(1, dtype=torch.uint8))
    if residual is not None:
        scale = scales[_per_block(blocks, x.device)]
        left = c - torch.where(c >= 0, scale, -scale)
        homes = _runs(blocks.homes, blocks.lengths, x.device)
        residual[homes] = torch.where(scale.isfinite(), left, residual[homes])


def compress_signs_(
    x: Tensor, residual: Tensor | None, blocks: Blocks, scales: Tensor, bits: Tensor, *, squared: bool
) -> None:
    """Scale, bits and new residual of blocks that each have a scale of their own; a non-finite block gets scale NaN."""
    sums = block_sums(x, residual, blocks, squared=squared)
    mean = sums / torch.from_numpy(blocks.lengths).to(x.device)
    scale = (mean.sqrt() if squared else mean).float()
    scales.copy_(torch.where(scale.isfinite(), scale, math.nan))
    pack_signs_(x, residual, blocks, scales, bits)


def unpack_signs_(bits: Tensor, scales: Tensor, blocks: Blocks, out: Tensor, *, alpha: float, add: bool) -> None:
    """out <- alpha * scale * sign, or out <- out + alpha * scale * sign, at the blocks' starts."""
    weights = torch.tensor(_BIT, dtype=torch.uint8, device=bits.device)
    unpacked = (bits.view(-1, 1) & weights).ne(0).view(-1)[_bit_places(blocks, bits.device)]
    scale = (scales * alpha)[_per_block(blocks, bits.device)]
    values = torch.where(unpacked, scale, -scale)
    places = _runs(blocks.starts, blocks.lengths, bits.device)
    out[places] = out[places] + values if add else values


def _corrected(x: Tensor, residual: Tensor | None, blocks: Blocks) -> Tensor:
    c = x[_runs(blocks.starts, blocks.lengths, x.device)]
    return c if residual is None else c + residual[_runs(blocks.homes, blocks.lengths, x.device)]
