"""Selection on a GPU: the cut between magnitudes is found digit by digit, and what is above it is written in order.

A short block is a row of a tile, whose cut is found bit by bit in one pass. Of longer ones c = x + residual is written once; three
passes count its magnitudes by digits of 11, 10 and 10 bits, each among those that share the digits before. Then each piece counts what
it will write, and writes it behind what the others do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from commopt.kernels.cuda.entries import Entries, pieces_of, span
from commopt.kernels.cuda.pieces import ALL_BUT_SIGN, Pieces, corrected, launch, note_bad, piece, values
from commopt.wire.bucket import Blocks, Int64Array
from commopt.wire.residual import Accumulated

INF = tl.constexpr(0x7F800000)  # the bits of inf; those of NaN are above
BINS = tl.constexpr(2048)
DIGITS = ((11, 20), (10, 10), (10, 0))  # of a magnitude: how many bits, and how many are below them
_SHORT, _LONG, _GIVEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_NONE, _PLAIN, _NESTEROV = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # momentum


@triton.jit
def _magnitudes(c):
    """Bits that are ordered as magnitudes are."""
    return c.to(tl.int32, bitcast=True) & ALL_BUT_SIGN


@triton.jit
def _accumulated(
    x, e, u, u_columns, moved, factor, count, p, live, start, home, n, i, HAS_RESIDUAL: tl.constexpr, STEP: tl.constexpr
):
    """c = x + residual; if momentum is to be applied, after that: see `wire.residual.Accumulated`."""
    if STEP == _NONE:
        c = corrected(x, e, start, home, n, i, HAS_RESIDUAL)
    else:
        inside = i[None, :] < n[:, None]
        c = values(x, start, n, i)
        before = values(u, tl.load(u_columns + count + p, mask=live, other=0), n, i)
        if STEP == _PLAIN:
            c = tl.fma(before, factor + tl.zeros_like(c), c)  # as torch's add
        else:
            after = (c + before) * factor
            tl.store(moved + start[:, None] + i[None, :], after, mask=inside)
            c += after
        tl.store(x + start[:, None] + i[None, :], c, mask=inside)
        c += values(e, home, n, i)
    return c


@triton.jit
def _count_digits(
    x,
    e,
    u,
    u_columns,
    moved,
    factor,
    columns,
    count,
    cuts,
    c_out,
    histograms,
    BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Add how often each digit occurs in a piece to its block's histogram; with a residual keep c."""
    p, live, start, home, n, block, codes = piece(columns, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)
    inside = i[None, :] < n[:, None]
    c = _accumulated(x, e, u, u_columns, moved, factor, count, p, live, start, home, n, i, HAS_RESIDUAL, STEP)
    if HAS_RESIDUAL:
        tl.store(c_out + start[:, None] + i[None, :], c, mask=inside)
    rest = _magnitudes(c) >> SHIFT
    if BITS + SHIFT < 31:
        cut = tl.load(cuts + block, mask=live, other=0)
        inside &= (rest >> BITS) == cut[:, None]
    digits = tl.where(inside, rest & ((1 << BITS) - 1), BINS)
    found = tl.histogram(tl.reshape(digits, (LENGTH,)), BINS, mask=tl.reshape(inside, (LENGTH,)))
    at = histograms + block * BINS + tl.arange(0, BINS)
    tl.atomic_add(at, found, mask=found > 0)


@triton.jit
def _pick_digit(ks, histograms, cuts, ties, is_bad, BITS: tl.constexpr, IS_FIRST: tl.constexpr):
    """Append to the cut the highest digit that k magnitudes reach, and leave of k what equals the cut so far; empty the histogram."""
    b, digits = tl.program_id(0), tl.arange(0, BINS)
    found = tl.load(histograms + b.to(tl.int64) * BINS + digits)
    tl.store(histograms + b.to(tl.int64) * BINS + digits, tl.zeros_like(found))
    k = tl.load((ks if IS_FIRST else ties) + b)
    reached = tl.sum(found, 0) - tl.cumsum(found, 0) + found
    digit = tl.max(tl.where((reached >= k) & (digits < (1 << BITS)), digits, 0), 0)
    cut = digit
    if IS_FIRST:
        tl.store(is_bad + b, (tl.sum(tl.where(digits >= (INF >> 20), found, 0), 0) > 0).to(tl.uint8))
    else:
        cut += tl.load(cuts + b) << BITS
    tl.store(cuts + b, cut)
    tl.store(ties + b, k - tl.sum(tl.where(digits > digit, found, 0), 0))


@triton.jit
def _cut_of_rows(magnitudes, inside, k):
    """(ROWS,) the k-th largest magnitude of each row, bit by bit, and how many of those that equal it are among the k."""
    cut = tl.zeros_like(k).to(tl.int32)
    for bit in range(31):
        higher = cut | (1 << (30 - bit))
        reached = tl.sum((inside & (magnitudes >= higher[:, None])).to(tl.int32), 1)
        cut = tl.where(reached >= k, higher, cut)
    above = tl.sum((inside & (magnitudes > cut[:, None])).to(tl.int32), 1)
    return cut, k - above


@triton.jit
def _count_chosen(
    x,
    e,
    columns,
    count,
    cuts,
    threshold,
    is_bad,
    noted,
    out,
    HOW: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """(2, P): how many of each piece are above the cut, and equal to it; or reach the threshold."""
    p, live, start, home, n, block, codes = piece(columns, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)
    inside = i[None, :] < n[:, None]
    magnitudes = _magnitudes(corrected(x, e, start, home, n, i, HAS_RESIDUAL))
    if HOW == _GIVEN:
        chosen = inside & (magnitudes >= threshold) & (magnitudes <= INF)
        largest = tl.max(tl.where(inside, magnitudes, 0), 1)
        tl.store(is_bad + block, tl.full((ROWS,), 1, tl.uint8), mask=live & (largest >= INF))
        note_bad(noted, live & (largest >= INF), columns, count, p)
    else:
        cut = tl.load(cuts + block, mask=live, other=0)[:, None]
        chosen = inside & (magnitudes > cut)
        equal = inside & (magnitudes == cut)
        tl.store(out + count + p, tl.sum(equal.to(tl.int32), 1).to(tl.int64), mask=live)
    tl.store(out + p, tl.sum(chosen.to(tl.int32), 1).to(tl.int64), mask=live)


@triton.jit
def _write(
    x,
    e,
    u,
    u_columns,
    moved,
    factor,
    columns,
    count,
    pieces_up_to,
    before,
    entries_up_to,
    cuts,
    ties,
    threshold,
    is_bad,
    indices,
    values,
    HOW: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    STEP: tl.constexpr,
    KEEPS: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Write the indices and values of what is chosen of each piece, and c to the residual of good blocks."""
    p, live, start, home, n, block, codes = piece(columns, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)
    inside = i[None, :] < n[:, None]
    c = _accumulated(x, e, u, u_columns, moved, factor, count, p, live, start, home, n, i, HAS_RESIDUAL, STEP)
    magnitudes = _magnitudes(c)
    first_piece, end_piece = span(pieces_up_to, block, live)
    within = (p - first_piece) * LENGTH
    if HOW == _SHORT:
        bad = tl.max(tl.where(inside, magnitudes, 0), 1) >= INF
        tl.store(is_bad + block, bad.to(tl.uint8), mask=live)
    else:
        bad = tl.load(is_bad + block, mask=live, other=0) != 0
    if HOW == _GIVEN:
        at = tl.load(before + p - 1, mask=live & (p > 0), other=0)
        chosen = inside & (magnitudes >= threshold) & (magnitudes <= INF)
    else:
        at, end = span(entries_up_to, block, live)
        k = end - at
        if HOW == _SHORT:
            cut, room = _cut_of_rows(magnitudes, inside, k)
            equal_before = tl.zeros_like(k)
        else:
            cut, room = tl.load(cuts + block, mask=live, other=0), tl.load(ties + block, mask=live, other=0)
            earlier, later = first_piece - 1, p - 1
            above_before = tl.load(before + later, mask=live & (p > 0), other=0)
            above_before -= tl.load(before + earlier, mask=live & (first_piece > 0), other=0)
            equal_before = tl.load(before + count + later, mask=live & (p > 0), other=0)
            equal_before -= tl.load(before + count + earlier, mask=live & (first_piece > 0), other=0)
            at += tl.where(bad, tl.minimum(within, k), above_before + tl.minimum(equal_before, room))
        equal = inside & (magnitudes == cut[:, None])
        number = tl.cumsum(equal.to(tl.int32), 1) + equal_before[:, None]
        chosen = inside & ((magnitudes > cut[:, None]) | (equal & (number <= room[:, None])))
        chosen = tl.where(bad[:, None], inside & (within[:, None] + i[None, :] < k[:, None]), chosen)
    place = at[:, None] + tl.cumsum(chosen.to(tl.int32), 1) - 1
    tl.store(indices + place, within[:, None] + i[None, :], mask=chosen)
    tl.store(values + place, c, mask=chosen)
    if KEEPS:
        tl.store(e + home[:, None] + i[None, :], c, mask=inside & ~bad[:, None])


@dataclass(frozen=True)
class Chosen:
    """(K,) i64 indices within blocks, ascending, (K,) f32 values, and (B,) u8, whether a block has a NaN or an inf."""

    indices: Tensor
    values: Tensor
    is_bad: Tensor

    @classmethod
    def room(cls, entries: Entries, is_bad: Tensor) -> Chosen:
        """Still to be written."""
        return cls(
            is_bad.new_empty(entries.count, dtype=torch.int64),
            is_bad.new_empty(entries.count, dtype=torch.float32),
            is_bad,
        )


def largest_(x: Tensor, residual: Tensor | Accumulated | None, blocks: Blocks, entries: Entries) -> Chosen:
    """The elements of largest magnitude, as many as there are entries; residual <- c in good blocks."""
    pieces = pieces_of(blocks, x.device)
    (c, e, *momentum), how = _given(x, residual, blocks, pieces)
    chosen = Chosen.room(entries, torch.empty(len(blocks), dtype=torch.uint8, device=x.device))
    cuts = ties = before = chosen.is_bad
    if pieces.is_cut:
        first, first_how, c = (x, e, *momentum), how, x if residual is None else torch.empty_like(x)
        (_, _, *momentum), how = _given(c, None, blocks, pieces)
        cuts, ties = _cuts(first, first_how, (c, c, *momentum), how, pieces, entries.ks, chosen.is_bad)
        before = torch.empty(2, len(pieces), dtype=torch.int64, device=x.device)
        counting = (pieces.columns, len(pieces), cuts, 0, chosen.is_bad, cuts, before)
        launch(_count_chosen, pieces.grid, c, c, *counting, HOW=_LONG.value, HAS_RESIDUAL=False, **pieces.shape)
        before = before.cumsum(1)
    how |= {"HOW": _LONG.value if pieces.is_cut else _SHORT.value, "KEEPS": residual is not None}
    where = (pieces.columns, len(pieces), pieces.ends, before, entries.ends, cuts, ties, 0, chosen.is_bad)
    launch(_write, pieces.grid, c, e, *momentum, *where, chosen.indices, chosen.values, **how)
    return chosen


def _given(
    x: Tensor, residual: Tensor | Accumulated | None, blocks: Blocks, pieces: Pieces
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What kernels make c of, and what they are compiled for."""
    how = {"HAS_RESIDUAL": residual is not None, "STEP": _NONE.value, **pieces.shape}
    if not isinstance(residual, Accumulated):
        return (x, x if residual is None else residual, x, pieces.columns, x, 0.0), how
    columns, align = velocity_places(residual, blocks, pieces)
    how |= {"STEP": (_PLAIN if residual.moved is x else _NESTEROV).value, "ALIGN": align}
    return (x, residual.values, residual.velocity, columns, residual.moved, residual.factor), how


def velocity_places(given: Accumulated, blocks: Blocks, pieces: Pieces) -> tuple[Tensor, int]:
    """The columns of the blocks' pieces in the velocity, and what their places and those of `pieces` are multiples of."""
    own = pieces_of(blocks.having(homes=given.homes), pieces.columns.device)
    return own.columns, min(own.align, pieces.align)


def _cuts(
    first: tuple[Any, ...],
    first_how: dict[str, Any],
    later: tuple[Any, ...],
    later_how: dict[str, Any],
    pieces: Pieces,
    ks: Tensor,
    is_bad: Tensor,
) -> tuple[Tensor, Tensor]:
    """(B,) i32: the bits of each block's k-th largest magnitude, and (B,) i64, how many of those equal to it are among the k.

    first: what c is made of in the first pass, and later: c, from `_given`.
    """
    histograms = torch.zeros(len(ks), BINS.value, dtype=torch.int32, device=ks.device)
    cuts, ties = torch.empty(len(ks), dtype=torch.int32, device=ks.device), torch.empty_like(ks)
    for bits, below in DIGITS:
        is_first = bits + below == 31
        values, how = (first, first_how) if is_first else (later, later_how)
        where = (pieces.columns, len(pieces), cuts, later[0], histograms)
        launch(_count_digits, pieces.grid, *values, *where, BITS=bits, SHIFT=below, **how)
        launch(_pick_digit, (len(ks),), ks, histograms, cuts, ties, is_bad, BITS=bits, IS_FIRST=is_first)
    return cuts, ties


def reaching_(
    x: Tensor,
    residual: Tensor | None,
    blocks: Blocks,
    threshold: float,
    sizes: Callable[[Tensor, Tensor], tuple[int, int, int]] | None = None,
) -> tuple[Entries, Chosen]:
    """All elements whose magnitude reaches a threshold above 0; residual <- c in good blocks.

    sizes: finds the entries' totals by (1,) i64, what is noted of bad blocks, and the entries' table; the host reads them if None.
    """
    pieces = pieces_of(blocks, x.device)
    zeros = torch.zeros(2 + len(pieces) + (len(blocks) + 7) // 8, dtype=torch.int64, device=x.device)
    noted, found = zeros[:1], zeros[1 : 2 + len(pieces)]
    is_bad = zeros[2 + len(pieces) :].view(torch.uint8)[: len(blocks)]
    bits = int(np.float32(threshold).view(np.int32))
    given, how = _given(x, residual, blocks, pieces)
    counting = (pieces.columns, len(pieces), is_bad, bits, is_bad, noted.view(torch.int32), found[1:])
    shape = {"HOW": _GIVEN.value, "HAS_RESIDUAL": residual is not None, **pieces.shape}
    launch(_count_chosen, pieces.grid, *given[:2], *counting, **shape)
    before = found.cumsum(0)
    entries = Entries.of(before, pieces.sizes, sizes and partial(sizes, noted), ends=pieces.ends)
    chosen = Chosen.room(entries, is_bad)
    where = (pieces.columns, len(pieces), pieces.ends, before[1:], entries.ends, is_bad, is_bad, bits, is_bad)
    how |= {"HOW": _GIVEN.value, "KEEPS": residual is not None}
    launch(_write, pieces.grid, *given, *where, chosen.indices, chosen.values, **how)
    return entries, chosen


def select_(
    x: Tensor, residual: Tensor | None, blocks: Blocks, ks: Int64Array, threshold: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.cpu.select.select_`."""
    if threshold > 0:
        entries, chosen = reaching_(x, residual, blocks, threshold)
        ks[:] = entries.ks.cpu().numpy()
    else:
        entries = Entries.of(
            torch.from_numpy(ks).to(x.device), pieces_of(blocks, x.device).sizes, (int(ks.sum()), 0, 0)
        )
        chosen = largest_(x, residual, blocks, entries)
    return chosen.indices, chosen.values, chosen.is_bad == 0
