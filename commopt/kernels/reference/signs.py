"""The kernels in plain torch, one line an equation: the oracle of the fast ones, and what runs on devices without one."""

import math

import torch
from torch import Tensor

from commopt.kernels.reference import runs
from commopt.wire.bucket import Blocks


def block_sums(x: Tensor, residual: Tensor | None, blocks: Blocks, *, squared: bool) -> Tensor:
    """(B,) f64: sum of |c| or of c squared per block, with c = x + residual."""
    c = runs.corrected(x, residual, blocks).double()
    sums = torch.zeros(len(blocks), dtype=torch.float64, device=x.device)
    return sums.index_add_(0, runs.run_of_element(blocks.lengths, x.device), c * c if squared else c.abs())


def compress_signs_(
    x: Tensor, residual: Tensor | None, blocks: Blocks, scales: Tensor, bits: Tensor, *, squared: bool | None
) -> None:
    """See `kernels.cpu.signs.compress_signs_`."""
    if squared is not None:
        mean = block_sums(x, residual, blocks, squared=squared) / torch.from_numpy(blocks.lengths).to(x.device)
        scale = (mean.sqrt() if squared else mean).float()
        scales.copy_(torch.where(scale.isfinite(), scale, math.nan))
    c = runs.corrected(x, residual, blocks)
    bits.copy_(runs.packed(c >= 0, blocks.lengths))
    if residual is not None:
        scale = scales[runs.run_of_element(blocks.lengths, x.device)]
        runs.keep_rest_(residual, c - torch.where(c >= 0, scale, -scale), scales.isfinite(), blocks)


def unpack_signs_(bits: Tensor, scales: Tensor, blocks: Blocks, out: Tensor, *, alpha: float, add: bool) -> None:
    """out <- alpha * scale * sign, or out <- out + alpha * scale * sign, at the blocks' starts."""
    scale = (scales * alpha)[runs.run_of_element(blocks.lengths, bits.device)]
    is_positive = runs.unpacked(bits, blocks.lengths).bool()
    runs.put_(torch.where(is_positive, scale, -scale), blocks, out, add)
