"""Random places on a GPU: drawn by keys, taken from gradients, and what their mean leaves in the residual."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from commopt.kernels.cuda.entries import Entries, block_of, pieces_of, span
from commopt.kernels.cuda.indices import entry
from commopt.kernels.cuda.pieces import (
    ALL_BUT_SIGN,
    GOLDEN,
    LARGEST,
    corrected,
    key_of,
    launch,
    mix,
    note_bad,
    piece,
    words_of,
)
from commopt.kernels.cuda.select import INF, Chosen
from commopt.wire.bucket import Blocks

WIDE = 256  # entries of a program


@triton.jit
def _draw(
    table,
    blocks,
    total,
    word,
    words,
    columns,
    count,
    pieces_up_to,
    own_blocks,
    x,
    e,
    ranks,
    indices,
    values,
    KEYS: tl.constexpr,
    TAKES: tl.constexpr,
    IS_UNBIASED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    STEPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Draw one of each n / k consecutive elements by `noise.bits`, and take c = x + residual there, over `ranks`, times n / k or not."""
    j, live, i, b, k, n, code, code_end = entry(table, blocks, total, STEPS, SIZE)
    p, _ = span(pieces_up_to, b % own_blocks, live)
    key = key_of(word, words, columns, count, p, live, KEYS) if KEYS > 0 else tl.zeros_like(j).to(tl.uint64)
    bits = mix(key + (i + 1).to(tl.uint64) * GOLDEN) >> 32
    k = tl.maximum(k, 1)
    first = i * n // k
    size = (i + 1) * n // k - first
    index = first + ((bits * size.to(tl.uint64)) >> 32).to(tl.int64)
    tl.store(indices + j, index, mask=live)
    if TAKES:
        value = tl.load(x + tl.load(columns + p, mask=live, other=0) + index, mask=live, other=0.0)
        if HAS_RESIDUAL:
            value += tl.load(e + tl.load(columns + count + p, mask=live, other=0) + index, mask=live, other=0.0)
        if IS_UNBIASED:
            value *= size.to(tl.float32)
        value = tl.div_rn(value, tl.zeros_like(value) + ranks)
        tl.store(values + j, value.to(values.dtype.element_ty), mask=live)


@triton.jit
def _find_bad(
    x,
    e,
    columns,
    count,
    is_bad,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Mark blocks where c = x + residual has a NaN or an inf."""
    p, live, start, home, n, block, codes = piece(columns, count, ROWS, ALIGN)
    c = corrected(x, e, start, home, n, tl.arange(0, LENGTH), HAS_RESIDUAL)
    largest = tl.max(c.to(tl.int32, bitcast=True) & ALL_BUT_SIGN, 1)
    tl.store(is_bad + block, tl.full((ROWS,), 1, is_bad.dtype.element_ty), mask=live & (largest >= INF))


@triton.jit
def _keep(x, e, columns, count, is_bad, ROWS: tl.constexpr, LENGTH: tl.constexpr, ALIGN: tl.constexpr):
    """residual <- x + residual in good blocks."""
    p, live, start, home, n, block, codes = piece(columns, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)
    c = corrected(x, e, start, home, n, i, True)
    bad = tl.load(is_bad + block, mask=live, other=0) != 0
    tl.store(e + home[:, None] + i[None, :], c, mask=(i[None, :] < n[:, None]) & ~bad[:, None])


@triton.jit
def _note_sum(mean, table, blocks, total, columns, count, pieces_up_to, first, STEPS: tl.constexpr, SIZE: tl.constexpr):
    u = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    live = u < total + blocks
    b = tl.where(u < total, block_of(table, blocks, u, STEPS), u - total)
    value = tl.load(mean + u, mask=live, other=0.0).to(tl.float32)
    is_there = live & tl.where(u < total, ~(tl.abs(value) <= LARGEST), value != 0)
    at, _ = span(pieces_up_to, b, is_there)
    note_bad(first, is_there, columns, count, at)


@triton.jit
def _take_sent(
    e, sent, indices, table, blocks, total, columns, count, pieces_up_to, ranks, STEPS: tl.constexpr, SIZE: tl.constexpr
):
    j, live, i, b, k, n, code, code_end = entry(table, blocks, total, STEPS, SIZE)
    p, _ = span(pieces_up_to, b, live)
    at = e + tl.load(columns + count + p, mask=live, other=0) + tl.load(indices + j, mask=live, other=0)
    value = tl.load(sent + j, mask=live, other=0.0).to(tl.float32) * ranks
    tl.store(at, tl.load(at, mask=live, other=0.0) - value, mask=live)


def draw(blocks: Blocks, entries: Entries) -> Tensor:
    """(K,) i64: the places that keys name in their blocks, `RandomK.places`."""
    return _drawn(None, None, blocks, entries, entries.table, is_unbiased=False, ranks=1)


def draw_and_take_(
    x: Tensor,
    residual: Tensor | None,
    blocks: Blocks,
    entries: Entries,
    values: Tensor,
    *,
    is_unbiased: bool,
    ranks: int = 1,
) -> Tensor:
    """`draw`; values <- (x + residual) / ranks there, times n / k if they are to be unbiased; (K,) f32 or f16."""
    return _drawn(x, residual, blocks, entries, values, is_unbiased=is_unbiased, ranks=ranks)


def _drawn(
    x: Tensor | None,
    residual: Tensor | None,
    blocks: Blocks,
    entries: Entries,
    values: Tensor,
    *,
    is_unbiased: bool,
    ranks: int,
) -> Tensor:
    pieces = pieces_of(blocks, values.device)
    word, words, keys = words_of([blocks], pieces.columns)
    out = torch.empty(entries.count, dtype=torch.int64, device=values.device)
    x_or_any = out if x is None else x
    what = (x_or_any, x_or_any if residual is None else residual, float(ranks), out, values)
    where = (word, words, pieces.columns, len(pieces), pieces.ends, len(blocks))
    how = {"KEYS": keys, "TAKES": x is not None, "IS_UNBIASED": is_unbiased, "HAS_RESIDUAL": residual is not None}
    size = {"STEPS": entries.steps, "SIZE": WIDE}
    launch(_draw, (triton.cdiv(entries.count, WIDE),), *entries.where, entries.count, *where, *what, **how, **size)
    return out


def find_bad_(x: Tensor, residual: Tensor | None, blocks: Blocks, is_bad: Tensor) -> None:
    """is_bad, (B,) of any type, <- 1 where x + residual has a NaN or an inf."""
    pieces, e = pieces_of(blocks, x.device), x if residual is None else residual
    how = {"HAS_RESIDUAL": residual is not None, **pieces.shape}
    launch(_find_bad, pieces.grid, x, e, pieces.columns, len(pieces), is_bad, **how)


def keep_(x: Tensor, residual: Tensor, blocks: Blocks, is_bad: Tensor) -> None:
    """residual <- x + residual in good blocks."""
    pieces = pieces_of(blocks, x.device)
    launch(_keep, pieces.grid, x, residual, pieces.columns, len(pieces), is_bad, **pieces.shape)


def drawn_(x: Tensor, residual: Tensor | None, blocks: Blocks, entries: Entries, is_unbiased: bool) -> Chosen:
    """The elements at random places; residual <- c in good blocks."""
    is_bad = torch.zeros(len(blocks), dtype=torch.uint8, device=x.device)
    values = torch.empty(entries.count, dtype=torch.float32, device=x.device)
    find_bad_(x, residual, blocks, is_bad)
    indices = draw_and_take_(x, residual, blocks, entries, values, is_unbiased=is_unbiased)
    if residual is not None:
        keep_(x, residual, blocks, is_bad)
    return Chosen(indices, values, is_bad)


def note_sum_(summed: Tensor, blocks: Blocks, entries: Entries, first: Tensor) -> None:
    """Note in first, (1,) i32, the first parameter with a block that some rank calls bad, or with a mean that is not finite.

    summed: (K + B,), the means, and how many ranks call each block bad.
    """
    pieces, units = pieces_of(blocks, summed.device), len(summed)
    where = (pieces.columns, len(pieces), pieces.ends, first)
    how = {"STEPS": entries.steps, "SIZE": WIDE}
    launch(_note_sum, (triton.cdiv(units, WIDE),), summed, *entries.where, entries.count, *where, **how)


def take_sent_(
    residual: Tensor, sent: Tensor, indices: Tensor, blocks: Blocks, entries: Entries, *, ranks: int
) -> None:
    """residual <- residual - ranks * sent at the places of what was sent."""
    pieces = pieces_of(blocks, residual.device)
    where = (pieces.columns, len(pieces), pieces.ends, float(ranks))
    how = {"STEPS": entries.steps, "SIZE": WIDE}
    grid = (triton.cdiv(entries.count, WIDE),)
    launch(_take_sent, grid, residual, sent, indices, *entries.where, entries.count, *where, **how)
