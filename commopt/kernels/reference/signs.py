"""The kernels in plain torch, one line an equation: the oracle of the fast ones, and what runs on devices without one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from commopt.kernels.reference.runs import (
    bits_of_bytes,
    bytes_of_bits,
    corrected,
    element_indices,
    keep_rest_,
    put_,
    run_of_element,
)
from commopt.wire.bucket import Blocks


def packed(flags: Tensor, blocks: Blocks, n_bytes: int) -> Tensor:
    """(n_bytes,) u8: a bit for each element, every block padded with zeros to whole bytes."""
    bits = torch.zeros(n_bytes * 8, dtype=torch.uint8, device=flags.device)
    bits[_bit_places(blocks, flags.device)] = flags.to(torch.uint8)
    return bytes_of_bits(bits)


def unpacked(code: Tensor, blocks: Blocks) -> Tensor:
    """(elements,) bool: the bits that `packed` was given."""
    return bits_of_bytes(code)[_bit_places(blocks, code.device)].bool()


def _bit_places(blocks: Blocks, device: torch.device) -> Tensor:
    return element_indices(blocks.byte_starts * 8, blocks.lengths, device)


def block_sums(x: Tensor, residual: Tensor | None, blocks: Blocks, *, squared: bool) -> Tensor:
    """(B,) f64: sum of |c| or of c squared per block, with c = x + residual."""
    c = corrected(x, residual, blocks).double()
    sums = torch.zeros(len(blocks), dtype=torch.float64, device=x.device)
    return sums.index_add_(0, run_of_element(blocks.lengths, x.device), c * c if squared else c.abs())


def pack_signs_(x: Tensor, residual: Tensor | None, blocks: Blocks, scales: Tensor, bits: Tensor) -> None:
    """Write the sign bits of c = x + residual (1 for c >= 0), and residual <- c - scale * sign where the scale is finite."""
    c = corrected(x, residual, blocks)
    bits.copy_(packed(c >= 0, blocks, bits.numel()))
    if residual is not None:
        scale = scales[run_of_element(blocks.lengths, x.device)]
        keep_rest_(residual, c - torch.where(c >= 0, scale, -scale), scales.isfinite(), blocks)


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
    scale = (scales * alpha)[run_of_element(blocks.lengths, bits.device)]
    put_(torch.where(unpacked(bits, blocks), scale, -scale), blocks, out, add)
