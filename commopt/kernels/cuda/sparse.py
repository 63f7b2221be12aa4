"""The values of sparse messages on a GPU: scales, codes and what is left, and the sum of what several ranks sent."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from commopt.kernels.cuda.draws import WIDE, draw, draw_and_take_, drawn_, find_bad_, keep_, note_sum_, take_sent_
from commopt.kernels.cuda.entries import PER_PROGRAM, Entries, block_of, lengths_of, pieces_of, span
from commopt.kernels.cuda.indices import decoded, encoded
from commopt.kernels.cuda.pieces import LARGEST, NAN, launch, note_bad, piece
from commopt.kernels.cuda.select import Chosen, largest_, reaching_, velocity_places
from commopt.wire.bucket import Blocks
from commopt.wire.residual import Accumulated

__all__ = [
    "Chosen",
    "Entries",
    "add_",
    "code_",
    "decoded",
    "draw",
    "draw_and_take_",
    "drawn_",
    "encoded",
    "find_bad_",
    "keep_",
    "largest_",
    "lengths_of",
    "note_sum_",
    "reaching_",
    "take_sent_",
    "values_of",
]
_NO_SCALE, _MAX, _MEAN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
TILE = 1024  # entries of a program that takes whole blocks
# 1.5 * 2^23: what is added to it is rounded to the nearest whole number, and to even ones
ROUND = tl.constexpr(12582912.0)


@triton.jit
def _block(
    values,
    table,
    blocks,
    is_bad,
    columns,
    count,
    pieces_up_to,
    first_bad,
    counts,
    finite,
    scales,
    SCALE: tl.constexpr,
    HAS_HEADER: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What a message says of each block: its scale, how many entries it has, and in the header whether it is bad.

    SCALE: the largest magnitude of the block's finite values or their mean, (B,) f32; also with NaN for bad blocks.
    """
    b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = b < blocks
    first, end = span(table, b, live)
    bad = live & (tl.load(is_bad + b, mask=live, other=0) != 0)
    if HAS_COUNTS:
        tl.store(counts + b, tl.where(bad, -1 - (end - first), end - first).to(tl.int32), mask=live)
    if HAS_HEADER:
        at, _ = span(pieces_up_to, b, live)
        note_bad(first_bad, bad, columns, count, at)
    if SCALE != _NO_SCALE:
        total = tl.zeros((ROWS,), tl.float64 if SCALE == _MEAN else tl.float32)
        for done in range(0, tl.max(end - first, 0), CHUNK):
            j = (first + done)[:, None] + tl.arange(0, CHUNK)[None, :]
            size = tl.abs(tl.load(values + j, mask=j < end[:, None], other=0.0))
            size = tl.where(size <= LARGEST, size, 0.0)
            if SCALE == _MEAN:
                total += tl.sum(size.to(tl.float64), 1)
            else:
                total = tl.maximum(total, tl.max(size, 1))
        if SCALE == _MEAN:
            total /= tl.maximum(end - first, 1).to(tl.float64)
        scale = total.to(tl.float32)
        tl.store(finite + b, scale, mask=live)
        tl.store(scales + b, tl.where(bad, NAN, scale), mask=live)


@triton.jit(do_not_specialize=["units"])
def _code(
    values,
    indices,
    table,
    blocks,
    units,
    is_bad,
    scales,
    columns,
    count,
    pieces_up_to,
    out,
    e,
    BITS: tl.constexpr,
    PER: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    STEPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Code the values, and take from the residual what the codes stand for. A unit has PER entries: of signs eight, which are one byte."""
    ends = table if PER == 1 else table + 2 * blocks
    unit = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    live = unit < units
    b = tl.minimum(block_of(ends, blocks, unit, STEPS), blocks - 1)
    first, end = span(table, b, live)
    start, _ = span(ends, b, live)
    j = (first + (unit - start) * PER)[:, None] + tl.arange(0, PER)[None, :]
    inside = live[:, None] & (j < end[:, None])
    value = tl.load(values + j, mask=inside, other=0.0)
    bad = (tl.load(is_bad + b, mask=live, other=0) != 0)[:, None]
    scale = tl.load(scales + b, mask=live, other=0.0)[:, None] if BITS < 32 else 0.0
    at = unit[:, None] + tl.zeros_like(j)
    if BITS == 32:
        sent = value
        tl.store(out + at, tl.where(bad, NAN, value), mask=inside)
    elif BITS == 1:
        positive = inside & (value >= 0)
        sent = tl.where(positive, scale, -scale)
        bits = tl.sum(positive.to(tl.int32) << tl.arange(0, PER)[None, :], 1)
        tl.store(out + unit, bits.to(tl.uint8), mask=live)
    else:
        ratio = tl.div_rn(value, tl.where(scale > 0, scale, 1.0) + tl.zeros_like(value))
        if BITS == 16:
            code = ratio.to(tl.float16)
            sent = tl.where(bad, 0.0, code.to(tl.float32)) * scale
        else:
            code = (tl.where(tl.abs(ratio) <= LARGEST, ratio, 0.0) * 127.0 + ROUND) - ROUND
            sent = code * tl.div_rn(scale, tl.zeros_like(scale) + 127.0)
            code = code.to(tl.int8)
        tl.store(out + at, code, mask=inside)
    if HAS_RESIDUAL:
        piece_of, _ = span(pieces_up_to, b, live)
        home = tl.load(columns + count + piece_of, mask=live, other=0)[:, None] + tl.load(
            indices + j, mask=inside, other=0
        )
        left = tl.load(e + home, mask=inside, other=0.0) - sent
        tl.store(e + home, left, mask=inside & ~bad)


@triton.jit(do_not_specialize=["total", "sign_bytes"])
def _values(
    codes,
    scales,
    table,
    blocks,
    total,
    sign_bytes,
    is_damaged,
    out,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """(total,) f32: what codes stand for; NaN if the message is damaged, or has other sizes than its counts say."""
    j = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    live = j < total
    b = tl.minimum(block_of(table, blocks, j, STEPS), blocks - 1)
    first, end = span(table, b, live)
    last = blocks - 1 + tl.zeros_like(j)
    if BITS == 1:
        fits = tl.load(table + 2 * blocks + last, mask=live, other=0) == sign_bytes
    else:
        fits = tl.load(table + last, mask=live, other=0) == total
    if BITS == 32:
        value = tl.load(codes + j, mask=live, other=0.0)
    else:
        scale = tl.load(scales + b, mask=live, other=0.0)
        if BITS == 1:
            start, _ = span(table + 2 * blocks, b, live)
            byte = start + (j - first) // 8
            bits = tl.load(codes + byte, mask=live & (byte < sign_bytes), other=0).to(tl.int32)
            value = tl.where((bits >> ((j - first) % 8).to(tl.int32)) & 1 != 0, scale, -scale)
        else:
            value = tl.load(codes + j, mask=live, other=0).to(tl.float32)
            value *= scale if BITS == 16 else tl.div_rn(scale, tl.zeros_like(scale) + 127.0)
    damaged = tl.load(is_damaged + tl.zeros_like(j), mask=live, other=0) != 0
    tl.store(out + j, tl.where(fits & ~damaged, value, NAN), mask=live)


@triton.jit
def _lower_bound(indices, first, end, x, steps):
    """The first entry in [first, end) whose index is x or more, or end."""
    for _ in range(steps):
        middle = (first + end) // 2
        open_ = first < end
        is_below = open_ & (tl.load(indices + middle, mask=open_, other=0) < x)
        end = tl.where(open_ & ~is_below, middle, end)
        first = tl.where(is_below, middle + 1, first)
    return first


@triton.jit(do_not_specialize=["steps", "total"])
def _bounds(
    indices,
    table,
    blocks,
    total,
    columns,
    count,
    messages,
    pieces_up_to,
    steps,
    out,
    own_blocks,
    LENGTH: tl.constexpr,
    SIZE: tl.constexpr,
):
    """(2, N P) i64: the first entry of each message's piece, and the first behind it."""
    q = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    live = q < messages * count
    p = q % count
    own = tl.load(columns + 3 * count + p, mask=live, other=0)
    first, end = span(table, q // count * own_blocks + own, live)
    first, end = tl.minimum(first, total), tl.minimum(end, total)
    within = tl.load(columns + 7 * count + p, mask=live, other=0)
    tl.store(out + q, _lower_bound(indices, first, end, within, steps), mask=live)
    tl.store(out + messages * count + q, _lower_bound(indices, first, end, within + LENGTH, steps), mask=live)


@triton.jit(do_not_specialize=["messages", "cleared"])
def _add(
    indices,
    values,
    bounds,
    columns,
    count,
    messages,
    alpha,
    out,
    u,
    u_columns,
    moved,
    cleared,
    ADD: tl.constexpr,
    MOVES: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Add what each message has of a piece, one message after the other; the indices of one are distinct.

    MOVES: before that u <- moved, and 0 where the message `cleared` has values that are not 0.
    """
    p, live, start, home, n, block, codes = piece(columns, count, ROWS, ALIGN)
    within = tl.load(columns + 7 * count + p, mask=live, other=0)[:, None]
    i = tl.arange(0, LENGTH)
    if MOVES:
        own = tl.load(u_columns + count + p, mask=live, other=0)
        after = tl.load(moved + start[:, None] + i[None, :], mask=i[None, :] < n[:, None], other=0.0)
        tl.store(u + own[:, None] + i[None, :], after, mask=i[None, :] < n[:, None])
    if not ADD:
        tl.store(out + start[:, None] + i[None, :], tl.zeros((ROWS, LENGTH), tl.float32), mask=i[None, :] < n[:, None])
        tl.debug_barrier()
    for message in range(messages):
        first = tl.load(bounds + message * count + p, mask=live, other=0)
        end = tl.load(bounds + (messages + message) * count + p, mask=live, other=0)
        for done in range(0, tl.max(end - first, 0), CHUNK):
            j = (first + done)[:, None] + tl.arange(0, CHUNK)[None, :]
            is_entry = j < end[:, None]
            place = tl.load(indices + j, mask=is_entry, other=0) - within
            is_entry &= (place >= 0) & (place < n[:, None])
            at = out + start[:, None] + place
            value = tl.load(values + j, mask=is_entry, other=0.0).to(tl.float32)
            tl.store(at, tl.load(at, mask=is_entry, other=0.0) + value * alpha, mask=is_entry)
            if MOVES and message == cleared:
                is_entry &= value != 0
                at = u + own[:, None] + place
                tl.store(at, tl.load(at, mask=is_entry, other=0.0) * 0.0, mask=is_entry)
        tl.debug_barrier()


def code_(
    chosen: Chosen,
    blocks: Blocks,
    entries: Entries,
    residual: Tensor | None,
    bits: int,
    scales: Tensor,
    out: Tensor,
    *,
    first: Tensor | None = None,
    counts: Tensor | None = None,
) -> None:
    """Write scales (B,) f32, unless `bits` is 32, and codes, whose values are taken from the residual of good blocks.

    first: the header, (1,) i32, where bad blocks are noted. counts: (B,) i32 <- how many entries each block has, or -1 less that.
    """
    values, indices, is_bad = chosen.values, chosen.indices, chosen.is_bad
    pieces, table = pieces_of(blocks, values.device), entries.where
    finite = is_bad if bits == 32 else torch.empty_like(scales)
    chunk = min(TILE, triton.next_power_of_2(max(1, entries.count // max(1, len(entries)))))
    kind = {32: _NO_SCALE, 1: _MEAN}.get(bits, _MAX).value
    how = {"SCALE": kind, "HAS_HEADER": first is not None, "HAS_COUNTS": counts is not None}
    notes = (is_bad if first is None else first, is_bad if counts is None else counts, finite, scales)
    where = (pieces.columns, len(pieces), pieces.ends, *notes)
    grid = (triton.cdiv(len(entries), TILE // chunk),)
    if bits < 32 or first is not None or counts is not None:
        launch(_block, grid, values, *table, is_bad, *where, **how, ROWS=TILE // chunk, CHUNK=chunk)
    per = 8 if bits == 1 else 1
    units, size = entries.sign_bytes if bits == 1 else entries.count, PER_PROGRAM // per
    how = {"BITS": bits, "PER": per, "HAS_RESIDUAL": residual is not None, "STEPS": entries.steps, "SIZE": size}
    to = (pieces.columns, len(pieces), pieces.ends, out, values if residual is None else residual)
    launch(_code, (triton.cdiv(units, size),), values, indices, *table, units, is_bad, finite, *to, **how)


def values_of(codes: Tensor, scales: Tensor, entries: Entries, bits: int, is_damaged: Tensor) -> Tensor:
    """(K,) f32: what the codes stand for; is_damaged: (1,) i32."""
    out = torch.empty(entries.count, dtype=torch.float32, device=codes.device)
    how = {"BITS": bits, "STEPS": entries.steps, "SIZE": PER_PROGRAM}
    where = (*entries.where, entries.count, codes.numel(), is_damaged, out)
    launch(_values, (triton.cdiv(entries.count, PER_PROGRAM),), codes, scales, *where, **how)
    return out


def add_(
    indices: Tensor,
    values: Tensor,
    blocks: Blocks,
    entries: Entries,
    out: Tensor,
    *,
    alpha: float,
    add: bool,
    given: Accumulated | None = None,
    cleared: int = -1,
) -> None:
    """out <- alpha * the sum of all messages' values, or out + that; added in the messages' order, on which float sums depend.

    given: its velocity <- what was written of it, and 0 where the message `cleared`, -1 for none, has values that are not 0.
    """
    pieces = pieces_of(blocks, out.device)
    n, count = entries.messages, len(pieces)
    bounds = torch.empty(2, n * count, dtype=torch.int64, device=out.device)
    steps = int(blocks.lengths.max(initial=0)).bit_length() + 1
    where = (pieces.columns, count, n, pieces.ends, steps, bounds, len(blocks))
    size = {"LENGTH": pieces.length, "SIZE": WIDE}
    launch(_bounds, (triton.cdiv(n * count, WIDE),), indices, *entries.where, entries.count, *where, **size)
    how = {"ADD": add, "MOVES": given is not None, "CHUNK": max(2, WIDE // pieces.rows), **pieces.shape}
    momentum = (out, pieces.columns, out)
    if given is not None:
        columns, how["ALIGN"] = velocity_places(given, blocks, pieces)
        momentum = (given.velocity, columns, given.moved)
    launch(_add, pieces.grid, indices, values, bounds, pieces.columns, count, n, alpha, out, *momentum, cleared, **how)
