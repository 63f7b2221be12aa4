"""Half precision on a GPU: cast, find what is beyond the dtype's range, and keep the rest, in one pass."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from commopt.kernels.cuda.pieces import (
    ADD,
    LARGEST,
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
from commopt.kernels.cuda.residuals import SCALED, arguments, corrected, keep, narrowed, widened
from commopt.wire.residual import Moved, Residual


@triton.jit
def _halves(c, out):
    """As float16, or as bfloat16 in an i16."""
    if out.dtype.element_ty == tl.int16:
        half = narrowed(c, out)
    else:
        over = tl.where(c > 0, float("inf"), float("-inf"))
        half = tl.where(tl.abs(c) >= 65520.0, over, c).to(tl.float16)  # the first that is rounded to inf
    return half


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
    out,
    first,
    RESIDUAL: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    p, live, start, home, n, scale_at, at = piece(columns, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)
    c = corrected(x, e, steps, slots, decay, weight, start, home, n, p, live, i, RESIDUAL)
    half = _halves(c, out)
    sent = widened(half)
    is_good = tl.min((tl.abs(sent) <= LARGEST).to(tl.int32), 1) > 0
    note_bad(first, live & (is_good == 0), columns, count, p)
    if RESIDUAL > 0:
        key, place = p.to(tl.uint64), i[None, :]
        if KEYS > 0:
            key, place = key_of(word, words, columns, count, p, live, KEYS), within(columns, count, p, live, i)
        which = (key, place, home, n, p, live, live & is_good, i)
        left = tl.where(is_good[:, None], c, 0.0) - tl.where(is_good[:, None], sent, 0.0)
        keep(left, share, e, steps, slots, copy, steps_copy, base, *which, RESIDUAL, KEYS)
    tl.store(out + at[:, None] + i[None, :], half, mask=i[None, :] < n[:, None])


@triton.jit
def _decompress(
    codes,
    columns,
    count,
    ranks,
    stride,
    alpha,
    out,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    p, live, start, home, n, scale_at, at = piece(columns, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)
    inside = i[None, :] < n[:, None]
    total = tl.zeros((ROWS, LENGTH), tl.float32)
    if MODE == ADD:
        total = tl.load(out + start[:, None] + i[None, :], mask=inside, other=0.0)
    for rank in range(ranks):
        value = widened(tl.load(codes + (at + rank * stride)[:, None] + i[None, :], mask=inside, other=0)) * alpha
        total = value if MODE == PUT else total + value
    tl.store(out + start[:, None] + i[None, :], total, mask=inside)


def compress_all_(
    x: Tensor, residual: Tensor | Residual | Moved | None, messages: Messages, first: Tensor, *, dtype: torch.dtype
) -> None:
    """`Cast.write_` of several messages; first: (1,) i32, where bad blocks are noted (`note_bad`)."""
    out, pieces = _laid(messages, dtype)
    stored, left, kind = arguments(residual, x, pieces)
    word, words, keys = words_of(messages.parts, pieces.columns) if kind == SCALED.value else (0, pieces.columns, 0)
    where = (pieces.columns, len(pieces), word, words, out, first)
    launch(_compress, pieces.grid, x, *stored, *left, *where, RESIDUAL=kind, KEYS=keys, **pieces.shape)


def decompress_all_(messages: Messages, out: Tensor, *, dtype: torch.dtype, alpha: float, add: bool) -> None:
    """`Cast.decompress_` of several messages, of which those with the same blocks are added up in their order."""
    first, ranks, scale_stride, _, mode = messages.apart(add)
    codes, pieces = _laid(first, dtype)
    where = (pieces.columns, len(pieces), ranks, 2 * scale_stride, alpha, out)
    launch(_decompress, pieces.grid, codes, *where, MODE=mode, **pieces.shape)


def _laid(messages: Messages, dtype: torch.dtype) -> tuple[Tensor, Pieces]:
    """The buffer as numbers of two bytes, and the pieces, whose codes are elements: they begin where scales would."""
    codes: Any = messages.codes.view(torch.int16 if dtype == torch.bfloat16 else dtype)
    return codes, Pieces.of(messages.parts, 8, codes.device, [(0, 2 * scale) for scale, _ in messages.at])
