"""Signs on a GPU: sum, pack and residual in one pass, or two for blocks longer than a piece. See `kernels.cpu.signs`."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from commopt.kernels.cuda.pieces import (
    ADD,
    LARGEST,
    NAN,
    PUT,
    Messages,
    Pieces,
    key_of,
    launch,
    note_bad,
    piece,
    within,
    words_of,
)
from commopt.kernels.cuda.residuals import SCALED, arguments, corrected, keep
from commopt.wire.bucket import Blocks, Int64Array, kept
from commopt.wire.residual import Moved, Residual

_MEAN, _RMS, _GIVEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _sums(
    x,
    e,
    steps,
    slots,
    decay,
    weight,
    columns,
    count,
    out,
    SQUARED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    p, live, start, home, n, scale_at, codes = piece(columns, count, ROWS, ALIGN)
    c = corrected(x, e, steps, slots, decay, weight, start, home, n, p, live, tl.arange(0, LENGTH), RESIDUAL)
    total = tl.sum(c * c if SQUARED else tl.abs(c), 1)
    tl.store(out + p, total.to(tl.float64), mask=live)


@triton.jit(do_not_specialize=["word"])
def _compress(
    x,
    e,
    steps,
    slots,
    decay,
    weight,
    share,
    copy,
    steps_copy,
    base,
    columns,
    count,
    word,
    words,
    scales,
    bits,
    first,
    SCALE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    p, live, start, home, n, scale_at, codes = piece(columns, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)
    c = corrected(x, e, steps, slots, decay, weight, start, home, n, p, live, i, RESIDUAL)
    if SCALE == _GIVEN:
        scale = tl.load(scales + scale_at, mask=live, other=0.0)
    else:
        size = tl.maximum(n, 1).to(tl.float32)
        if SCALE == _RMS:
            scale = tl.sqrt_rn(tl.div_rn(tl.sum(c * c, 1), size))
        else:
            scale = tl.div_rn(tl.sum(tl.abs(c), 1), size)
        scale = tl.where(scale <= LARGEST, scale, NAN)
        tl.store(scales + scale_at, scale, mask=live)
    is_good = tl.abs(scale) <= LARGEST
    note_bad(first, live & (is_good == 0), columns, count, p)
    positive = c >= 0
    inside = i[None, :] < n[:, None]
    if RESIDUAL > 0:
        left, key, at = c - tl.where(positive, scale[:, None], -scale[:, None]), p.to(tl.uint64), i[None, :]
        if KEYS > 0:
            key, at = key_of(word, words, columns, count, p, live, KEYS), within(columns, count, p, live, i)
        which = (key, at, home, n, p, live, live & is_good, i)
        keep(left, share, e, steps, slots, copy, steps_copy, base, *which, RESIDUAL, KEYS)
    weights = 128 >> tl.arange(0, 8)
    octets = tl.reshape((positive & inside).to(tl.int32), (ROWS, LENGTH // 8, 8))
    j = tl.arange(0, LENGTH // 8)
    packed = tl.sum(octets * weights[None, None, :], 2).to(tl.uint8)
    tl.store(bits + codes[:, None] + j[None, :], packed, mask=j[None, :] < ((n + 7) // 8)[:, None])


@triton.jit
def _unpack(
    bits,
    scales,
    columns,
    count,
    ranks,
    scale_stride,
    stride,
    alpha,
    out,
    also,
    HAS_TWO: tl.constexpr,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    p, live, start, home, n, scale_at, codes = piece(columns, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)
    inside = i[None, :] < n[:, None]
    total = tl.zeros((ROWS, LENGTH), tl.float32)
    if MODE == ADD:
        total = tl.load(out + start[:, None] + i[None, :], mask=inside, other=0.0)
    for rank in range(ranks):
        at = codes + rank * stride
        octets = tl.load(bits + at[:, None] + (i // 8)[None, :], mask=inside, other=0).to(tl.int32)
        scale = (tl.load(scales + scale_at + rank * scale_stride, mask=live, other=0.0) * alpha)[:, None]
        value = tl.where(((octets >> (7 - i % 8)[None, :]) & 1) != 0, scale, -scale)
        total = value if MODE == PUT else total + value
    tl.store(out + start[:, None] + i[None, :], total, mask=inside)
    if HAS_TWO:
        tl.store(also + home[:, None] + i[None, :], total, mask=inside)


def block_sums(x: Tensor, residual: Tensor | None, blocks: Blocks, *, squared: bool) -> Tensor:
    """See `kernels.cpu.signs.block_sums`."""
    return _block_sums(x, residual, Pieces.of([blocks], 1, x.device, [(0, 0)]), squared)


def _block_sums(x: Tensor, residual: Tensor | Residual | Moved | None, pieces: Pieces, squared: bool) -> Tensor:
    (e, *stored), _, kind = arguments(residual, x, pieces)
    out = torch.empty(len(pieces), dtype=torch.float64, device=x.device)
    how = {"SQUARED": squared, "RESIDUAL": kind, **pieces.shape}
    launch(_sums, pieces.grid, x, e, *stored, pieces.columns, len(pieces), out, **how)
    return torch.segment_reduce(out, "sum", lengths=pieces.counts) if pieces.is_cut else out


def compress_signs_(
    x: Tensor, residual: Tensor | None, blocks: Blocks, scales: Tensor, bits: Tensor, *, squared: bool | None
) -> None:
    """See `kernels.cpu.signs.compress_signs_`."""
    compress_all_(x, residual, Messages([blocks], scales, bits), x.new_zeros(1, dtype=torch.int32), squared=squared)


def compress_all_(
    x: Tensor,
    residual: Tensor | Residual | Moved | None,
    messages: Messages,
    first: Tensor,
    *,
    squared: bool | None,
    groups: Callable[[Blocks], Int64Array] | None = None,
) -> None:
    """`compress_signs_` of several messages; first: (1,) i32, where bad blocks are noted (`note_bad`).

    groups: of some blocks (B,), those with the same number share a scale.
    """
    pieces, scales = messages.pieces(1), messages.scales
    (e, *stored), left, kind = arguments(residual, x, pieces)
    if squared is not None and (pieces.is_cut or groups is not None):
        sums, own = _block_sums(x, residual, pieces, squared), pieces.sizes.double()
        is_good = sums.isfinite()
        if groups is not None:
            group, count = _grouped(messages.parts, groups, x.device)
            # only the blocks that hold a NaN or an inf are marked, so that they can be named
            values = torch.stack([torch.where(is_good, sums, 0.0), own])
            sums, own = values.new_zeros(2, count).index_add_(1, group, values)[:, group]
        scale = (sums / own).sqrt().float() if squared else (sums / own).float()
        scales[pieces.scales] = torch.where(is_good & scale.isfinite(), scale, torch.nan)
        squared = None
    scale_kind = {None: _GIVEN, False: _MEAN, True: _RMS}[squared].value
    word, words, keys = words_of(messages.parts, pieces.columns) if kind == SCALED.value else (0, pieces.columns, 0)
    where = (pieces.columns, len(pieces), word, words, scales, messages.codes, first)
    how = {"SCALE": scale_kind, "RESIDUAL": kind, "KEYS": keys, **pieces.shape}
    launch(_compress, pieces.grid, x, e, *stored, *left, *where, **how)


def _grouped(
    parts: Sequence[Blocks], groups: Callable[[Blocks], Int64Array], device: torch.device
) -> tuple[Tensor, int]:
    """(B,) i64, the number of each block's group, and how many there are; made once for each layout."""

    def find() -> tuple[Tensor, int]:
        which, place = np.unique(np.concatenate([groups(blocks) for blocks in parts]), return_inverse=True)
        return torch.from_numpy(place).to(device), len(which)

    return kept(parts[0].tables, "groups", [blocks.groups for blocks in parts], find)


def unpack_signs_(bits: Tensor, scales: Tensor, blocks: Blocks, out: Tensor, *, alpha: float, add: bool) -> None:
    """See `kernels.cpu.signs.unpack_signs_`."""
    decompress_all_(Messages([blocks], scales, bits), out, alpha=alpha, add=add)


def decompress_all_(messages: Messages, out: Tensor, *, alpha: float, add: bool, also: Tensor | None = None) -> None:
    """`unpack_signs_` of several messages, of which those with the same blocks are added up in their order, from zero unless `add`.

    also: another tensor that gets what `out` gets, at the blocks' homes.
    """
    first, ranks, scale_stride, stride, mode = messages.apart(add)
    pieces = first.pieces(1)
    where = (pieces.columns, len(pieces), ranks, scale_stride, stride, alpha, out, out if also is None else also)
    how = {"HAS_TWO": also is not None, "MODE": mode, **pieces.shape}
    launch(_unpack, pieces.grid, messages.codes, messages.scales, *where, **how)
