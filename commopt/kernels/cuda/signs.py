"""Signs on a GPU: sum, pack and residual in one pass, or two for blocks longer than a piece. See `kernels.cpu.signs`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from commopt.kernels.cuda.pieces import LARGEST, NAN, Pieces, corrected, launch, piece
from commopt.wire.bucket import Blocks

_MEAN, _RMS, _GIVEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _sums(
    x,
    e,
    places,
    count,
    out,
    SQUARED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    p, live, start, home, n, block, codes = piece(places, count, ROWS, ALIGN)
    c = corrected(x, e, start, home, n, tl.arange(0, LENGTH), HAS_RESIDUAL)
    total = tl.sum(c * c if SQUARED else tl.abs(c), 1)
    tl.store(out + p, total.to(tl.float64), mask=live)


@triton.jit
def _compress(
    x,
    e,
    places,
    count,
    scales,
    bits,
    SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    p, live, start, home, n, block, codes = piece(places, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)
    c = corrected(x, e, start, home, n, i, HAS_RESIDUAL)
    if SCALE == _GIVEN:
        scale = tl.load(scales + block, mask=live, other=0.0)
    else:
        size = tl.maximum(n, 1).to(tl.float32)
        if SCALE == _RMS:
            scale = tl.sqrt_rn(tl.div_rn(tl.sum(c * c, 1), size))
        else:
            scale = tl.div_rn(tl.sum(tl.abs(c), 1), size)
        scale = tl.where(scale <= LARGEST, scale, NAN)
        tl.store(scales + block, scale, mask=live)
    positive = c >= 0
    inside = i[None, :] < n[:, None]
    if HAS_RESIDUAL:
        is_good = (tl.abs(scale) <= LARGEST)[:, None]
        sent = tl.where(positive, scale[:, None], -scale[:, None])
        tl.store(e + home[:, None] + i[None, :], c - sent, mask=inside & is_good)
    weights = 128 >> tl.arange(0, 8)
    octets = tl.reshape((positive & inside).to(tl.int32), (ROWS, LENGTH // 8, 8))
    j = tl.arange(0, LENGTH // 8)
    packed = tl.sum(octets * weights[None, None, :], 2).to(tl.uint8)
    tl.store(bits + codes[:, None] + j[None, :], packed, mask=j[None, :] < ((n + 7) // 8)[:, None])


@triton.jit
def _unpack(
    bits,
    scales,
    places,
    count,
    alpha,
    out,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    p, live, start, home, n, block, codes = piece(places, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)
    inside = i[None, :] < n[:, None]
    scale = (tl.load(scales + block, mask=live, other=0.0) * alpha)[:, None]
    octets = tl.load(bits + codes[:, None] + (i // 8)[None, :], mask=inside, other=0).to(tl.int32)
    value = tl.where(((octets >> (7 - i % 8)[None, :]) & 1) != 0, scale, -scale)
    if ADD:
        value = tl.load(out + start[:, None] + i[None, :], mask=inside, other=0.0) + value
    tl.store(out + start[:, None] + i[None, :], value, mask=inside)


def block_sums(x: Tensor, residual: Tensor | None, blocks: Blocks, *, squared: bool) -> Tensor:
    """See `kernels.cpu.signs.block_sums`."""
    pieces, e = Pieces.of(blocks, 1, x.device), x if residual is None else residual
    out = torch.empty(len(pieces), dtype=torch.float64, device=x.device)
    how = {"SQUARED": squared, "HAS_RESIDUAL": residual is not None, **pieces.shape}
    launch(_sums, pieces.grid, x, e, pieces.places, len(pieces), out, **how)
    return torch.segment_reduce(out, "sum", lengths=pieces.counts) if pieces.is_cut else out


def compress_signs_(
    x: Tensor, residual: Tensor | None, blocks: Blocks, scales: Tensor, bits: Tensor, *, squared: bool | None
) -> None:
    """See `kernels.cpu.signs.compress_signs_`."""
    pieces, e = Pieces.of(blocks, 1, x.device), x if residual is None else residual
    if squared is not None and pieces.is_cut:
        mean = block_sums(x, residual, blocks, squared=squared) / pieces.sizes
        scale = (mean.sqrt() if squared else mean).float()
        scales.copy_(torch.where(scale.isfinite(), scale, torch.nan))
        squared = None
    scale_kind = {None: _GIVEN, False: _MEAN, True: _RMS}[squared].value
    how = {"SCALE": scale_kind, "HAS_RESIDUAL": residual is not None, **pieces.shape}
    launch(_compress, pieces.grid, x, e, pieces.places, len(pieces), scales, bits, **how)


def unpack_signs_(bits: Tensor, scales: Tensor, blocks: Blocks, out: Tensor, *, alpha: float, add: bool) -> None:
    """See `kernels.cpu.signs.unpack_signs_`."""
    pieces = Pieces.of(blocks, 1, out.device)
    launch(_unpack, pieces.grid, bits, scales, pieces.places, len(pieces), alpha, out, ADD=add, **pieces.shape)
