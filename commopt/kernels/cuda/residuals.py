"""Residuals on a GPU as they are stored: c = x + decay e, and e <- average e + (1 - average) (c - sent).

Kernels that compress do both as they go, with `corrected` and `keep`. `read`, `store_` and `undo_` are passes of their own, for codecs
without such kernels, and for residuals in 8 bits whose blocks are longer than a piece.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from commopt.kernels.cuda.pieces import (
    LARGEST,
    Pieces,
    between,
    key_of,
    launch,
    mix,
    piece,
    uniform,
    values,
    within,
    words_of,
)
from commopt.wire.bucket import Blocks, kept
from commopt.wire.residual import Blended, Moved, Residual, end_to_end

# no residual; float32 that is just what was left out; any other; and one in 8 bits, with a scale for each block
NONE, PLAIN, STORED, SCALED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
# no residual, but values within the bounds of their parameters, an average of them less what is known of it, and themselves less that
CLAMPED, AVERAGED, LESS = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
# a residual as in PLAIN, and values that are blended with one state or two
BLENDED, TWICE = tl.constexpr(7), tl.constexpr(8)


@dataclass(frozen=True)
class Clamped:
    """Instead of a residual: c = x, clamped to -bound .. bound.

    bounds: f32. places: (B,) i64, which is that of each block of all messages. tables: what is made of them, which lasts as long.
    """

    bounds: Tensor
    places: Tensor
    tables: dict[int, Any]


_VIEWED = {torch.bfloat16: torch.int16}  # which kernels have no arithmetic of


@triton.jit
def stored(e, steps, slots, home, n, p, live, i, RESIDUAL: tl.constexpr):
    """(ROWS, LENGTH) and (ROWS,) f32: the residual before this message as it is stored, and its scales."""
    raw = tl.load(e + home[:, None] + i[None, :], mask=i[None, :] < n[:, None], other=0)
    step = tl.zeros_like(n).to(tl.float32)
    if RESIDUAL == SCALED:
        step = tl.load(steps + tl.load(slots + p, mask=live, other=0), mask=live, other=0.0)
    return raw, step


@triton.jit
def remembered(e, steps, slots, home, n, p, live, i, RESIDUAL: tl.constexpr):
    """(ROWS, LENGTH) f32: the residual before this message."""
    raw, step = stored(e, steps, slots, home, n, p, live, i, RESIDUAL)
    return widened(raw) * step[:, None] if RESIDUAL == SCALED else widened(raw)


@triton.jit
def corrected(x, e, steps, slots, decay, weight, start, home, n, p, live, i, RESIDUAL: tl.constexpr):
    """(ROWS, LENGTH) f32: c = x + decay e, and zeros behind the ends."""
    c = values(x, start, n, i)
    if RESIDUAL == PLAIN:
        c += remembered(e, steps, slots, home, n, p, live, i, RESIDUAL)
    elif RESIDUAL == CLAMPED:
        bound = tl.load(steps + tl.load(slots + p, mask=live, other=0), mask=live, other=0.0)[:, None]
        c = tl.minimum(tl.maximum(c, -bound), bound)
    elif RESIDUAL == AVERAGED:
        c = blend(values(e, home, n, i), c, decay) - values(steps, home, n, i)
    elif RESIDUAL == LESS:
        c -= values(steps, home, n, i)
    elif RESIDUAL >= BLENDED:
        c = between(values(steps, home, n, i), c, decay)
        if RESIDUAL == TWICE:
            c = between(values(slots, home, n, i), c, weight)
        c += values(e, home, n, i)
    elif RESIDUAL > 0:
        c += remembered(e, steps, slots, home, n, p, live, i, RESIDUAL) * decay
    return c


@triton.jit
def blend(left, old, share):
    """average old + (1 - average) left with the bits of `torch.lerp`; share: average, or from 1/2 on average - 1."""
    return tl.fma(share + tl.zeros_like(left), old - left, tl.where(share < 0, old, left))


@triton.jit
def narrowed(new, e):
    """As it is stored: float32, the nearest bfloat16 as an i16, or a whole number as an i8."""
    if e.dtype.element_ty == tl.int16:
        bits = new.to(tl.int32, bitcast=True)
        narrow = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
    else:
        narrow = new.to(e.dtype.element_ty)
    return narrow


@triton.jit
def widened(raw):
    """(ROWS, LENGTH) f32 of what is stored."""
    if raw.dtype == tl.int16:
        wide = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = raw.to(tl.float32)
    return wide


@triton.jit
def write(new, e, steps, slots, key, at, home, n, p, is_kept, i, RESIDUAL: tl.constexpr, KEYS: tl.constexpr):
    """Store the residual, where a block is to be kept; in 8 bits by max|e| / 127, with stochastic rounding if there are keys."""
    inside = (i[None, :] < n[:, None]) & is_kept[:, None]
    if RESIDUAL == SCALED:
        step = tl.div_rn(tl.max(tl.where(inside, tl.abs(new), 0.0), 1), tl.zeros_like(n).to(tl.float32) + 127.0)
        tl.store(steps + tl.load(slots + p, mask=is_kept, other=0), step, mask=is_kept)
        new = in_steps(new, step, key, at, KEYS)
    tl.store(e + home[:, None] + i[None, :], narrowed(new, e), mask=inside)


@triton.jit
def in_steps(new, step, key, at, KEYS: tl.constexpr):
    """(ROWS, LENGTH) f32: whole numbers from -127 to 127, by the key that comes after a message's."""
    inverse = tl.div_rn(tl.zeros_like(step) + 1.0, tl.where(step > 0, step, 1.0))
    inverse = tl.where((step > 0) & (inverse <= LARGEST), inverse, 0.0)
    u = tl.zeros_like(new) + 0.5
    if KEYS > 0:
        u = uniform(mix(key), at)
    return tl.minimum(tl.maximum(tl.floor(new * inverse[:, None] + u), -127.0), 127.0)


@triton.jit
def keep(
    left,
    share,
    e,
    steps,
    slots,
    copy,
    steps_copy,
    base,
    key,
    at,
    home,
    n,
    p,
    live,
    is_kept,
    i,
    RESIDUAL: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Store what a message leaves out, where a block is to be kept, and a copy of what was stored."""
    if RESIDUAL == PLAIN or RESIDUAL >= BLENDED:
        tl.store(e + home[:, None] + i[None, :], left, mask=(i[None, :] < n[:, None]) & is_kept[:, None])
    elif RESIDUAL < CLAMPED:
        # what is copied must be what the new residual is made of, so that no thread reads an element that another has overwritten
        raw, step = stored(e, steps, slots, home, n, p, live, i, RESIDUAL)
        tl.store(copy + (home - base)[:, None] + i[None, :], raw, mask=i[None, :] < n[:, None])
        old = widened(raw)
        if RESIDUAL == SCALED:
            tl.store(steps_copy + tl.load(slots + p, mask=live, other=0), step, mask=live)
            old = old * step[:, None]
        write(blend(left, old, share), e, steps, slots, key, at, home, n, p, is_kept, i, RESIDUAL, KEYS)


@triton.jit
def _read(
    e,
    steps,
    slots,
    columns,
    count,
    decay,
    out,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    p, live, start, home, n, scale_at, codes = piece(columns, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)
    old = remembered(e, steps, slots, home, n, p, live, i, RESIDUAL)
    tl.store(out + start[:, None] + i[None, :], old * decay, mask=i[None, :] < n[:, None])


@triton.jit
def _blend(
    left,
    e,
    steps,
    slots,
    columns,
    count,
    share,
    largest,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """left <- average e + (1 - average) left, and the largest magnitude of each piece."""
    p, live, start, home, n, scale_at, codes = piece(columns, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)
    new = blend(values(left, start, n, i), remembered(e, steps, slots, home, n, p, live, i, RESIDUAL), share)
    inside = i[None, :] < n[:, None]
    tl.store(left + start[:, None] + i[None, :], new, mask=inside)
    tl.store(largest + p, tl.max(tl.where(inside, tl.abs(new), 0.0), 1), mask=live)


@triton.jit(do_not_specialize=["word"])
def _store(
    new,
    e,
    steps,
    slots,
    columns,
    count,
    word,
    words,
    RESIDUAL: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    p, live, start, home, n, scale_at, codes = piece(columns, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)
    e_new = values(new, start, n, i)
    if RESIDUAL == SCALED:
        step = tl.load(steps + tl.load(slots + p, mask=live, other=0), mask=live, other=0.0)
        key = key_of(word, words, columns, count, p, live, KEYS) if KEYS > 0 else p.to(tl.uint64)
        e_new = in_steps(e_new, step, key, within(columns, count, p, live, i), KEYS)
    tl.store(e + home[:, None] + i[None, :], narrowed(e_new, e), mask=i[None, :] < n[:, None])


@triton.jit
def _undo(
    x,
    sent,
    bad,
    e,
    columns,
    count,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    p, live, start, home, n, block, codes = piece(columns, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)
    is_good = live & (tl.load(bad + block, mask=live, other=1) == 0)
    e_old = values(sent, start, n, i) + values(e, home, n, i) - values(x, start, n, i)
    tl.store(e + home[:, None] + i[None, :], e_old, mask=(i[None, :] < n[:, None]) & is_good[:, None])


def arguments(
    residual: Tensor | Residual | Moved | Clamped | None, x: Tensor, pieces: Pieces
) -> tuple[tuple[Any, ...], tuple[Any, ...], int]:
    """What `corrected` takes of a residual, what `keep` takes beside that, and what kind it is."""
    if residual is None:
        return (x, x, pieces.columns, 1.0, 0.0), (0.0, x, x, 0), NONE.value
    if isinstance(residual, Tensor):
        return (residual, x, pieces.columns, 1.0, 0.0), (0.0, x, x, 0), PLAIN.value
    if isinstance(residual, Clamped):
        slots = kept(residual.tables, "places", [pieces], lambda: residual.places[pieces.columns[3]])
        return (x, residual.bounds, slots, 1.0, 0.0), (0.0, x, x, 0), CLAMPED.value
    if isinstance(residual, Blended):
        (state, first), (other, second) = (residual.states * 2)[:2]
        kind = BLENDED.value if len(residual.states) == 1 else TWICE.value
        return (residual.known, state, other, float(first), float(second)), (0.0, x, x, 0), kind
    if isinstance(residual, Moved):
        average, kind = (x, LESS.value) if residual.average is None else (residual.average, AVERAGED.value)
        return (average, residual.known, pieces.columns, share_of(residual.eta), 0.0), (0.0, x, x, 0), kind
    slots, scales, kind = pieces.columns, x, STORED.value
    if residual.has_scales:
        slots, scales, kind = _slots(residual, pieces), residual.scales, SCALED.value
    e, copy = (x if x is None else x.view(_VIEWED.get(x.dtype, x.dtype)) for x in (residual.values, residual.copy))
    after = (share_of(residual.average), e if copy is None else copy, residual.scales_copy, residual.base)
    return (e, scales, slots, residual.decay, 0.0), after, kind


def share_of(average: float) -> float:
    """What `blend` takes, in float32 arithmetic."""
    return float(np.float32(average) if average < 0.5 else np.float32(average) - np.float32(1))


def _slots(residual: Residual, pieces: Pieces) -> Tensor:
    """(P,) i64: where the scale of each piece's block is."""

    def find() -> Tensor:
        homes = torch.from_numpy(residual.homes).to(pieces.columns.device)
        return torch.searchsorted(homes, pieces.columns[1].contiguous(), right=True) - 1

    return kept(residual.tables, "slots", [pieces], find)


def read(residual: Residual, parts: Sequence[Blocks]) -> Tensor:
    """(elements of all parts,) f32: decay e of these blocks, end to end."""
    pieces = _at_ends(parts, residual.values.device)
    (e, steps, slots, decay, _), _, kind = arguments(residual, residual.scales, pieces)
    out = torch.empty(sum(blocks.elements for blocks in parts), dtype=torch.float32, device=e.device)
    launch(_read, pieces.grid, e, steps, slots, pieces.columns, len(pieces), decay, out, RESIDUAL=kind, **pieces.shape)
    return out


def store_(left: Tensor, residual: Residual, parts: Sequence[Blocks]) -> None:
    """e <- average e + (1 - average) left of these blocks; left: (elements,) f32, end to end, which is overwritten."""
    pieces = _at_ends(parts, left.device)
    (e, steps, slots, *_), _, kind = arguments(residual, left, pieces)
    largest, how = left.new_empty(len(pieces)), {"RESIDUAL": kind, **pieces.shape}
    where = (e, steps, slots, pieces.columns, len(pieces))
    launch(_blend, pieces.grid, left, *where, share_of(residual.average), largest, **how)
    if residual.has_scales:
        of_block = torch.segment_reduce(largest, "max", lengths=pieces.counts) if pieces.is_cut else largest
        places = torch.cumsum(pieces.counts, 0) - 1  # of the last piece of each block
        steps[slots[places]] = of_block / 127
    word, words, keys = words_of(parts, pieces.columns)
    launch(_store, pieces.grid, left, *where, word, words, KEYS=keys, **how)


def undo_(x: Tensor, sent: Tensor, bad: Tensor, e: Tensor, parts: Sequence[Blocks]) -> None:
    """e <- (e + sent) - x in good blocks. bad: (B,) bool, of all parts."""
    ends = np.cumsum([0, *(len(blocks) for blocks in parts)])
    pieces = Pieces.of(parts, 1, x.device, [(at, 0) for at in ends[:-1].tolist()])
    launch(_undo, pieces.grid, x, sent, bad, e, pieces.columns, len(pieces), **pieces.shape)


def _at_ends(parts: Sequence[Blocks], device: torch.device) -> Pieces:
    """The pieces of some parts, whose values lie end to end."""
    moved = [blocks.having(starts=starts) for blocks, starts in zip(parts, end_to_end(parts), strict=True)]
    return Pieces.of(moved, 1, device, [(0, 0)] * len(parts))
