"""Indices to bits and back on a GPU: see `compress.indices` for the code. Sizes are known, so nothing has to be waited for.

To code, each entry sets its bits. To decode, the ones of all bytes' high parts are counted, and each one then knows which entry it is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from commopt.kernels.cuda.entries import PER_PROGRAM, Entries, block_of, span
from commopt.kernels.cuda.pieces import launch
from commopt.wire.bucket import Int64Array

BYTES = 256  # of codes, of a program
_WIDEST = tl.constexpr(40)  # bits of a low part: `kernels.reference.indices.MAX_N`


@triton.jit
def entry(table, blocks, total, STEPS: tl.constexpr, SIZE: tl.constexpr):
    """(SIZE,) each: an entry, is it one, its number in its block, the block, how many are there, the block's length, and the bounds
    of its code in bytes."""
    j = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    live = j < total
    b = tl.minimum(block_of(table, blocks, j, STEPS), blocks - 1)
    first, end = span(table, b, live)
    live &= j < end  # `total` may be a bound
    n = tl.load(table + 5 * blocks + b, mask=live, other=0)
    code, code_end = span(table + blocks, b, live)
    return j, live, j - first, b, end - first, n, code, code_end


@triton.jit
def _is_ascending(indices, j, i, n, live):
    """The index of entry i of its block, and whether it is above the one before, and in [0, n)."""
    x = tl.load(indices + j, mask=live, other=0)
    last = tl.load(indices + j - 1, mask=live & (i > 0), other=-1)
    return x, (x > last) & (x >= 0) & (x < n)


@triton.jit(do_not_specialize=["total"])
def _encode(indices, table, blocks, total, words, is_bad, STEPS: tl.constexpr, SIZE: tl.constexpr):
    j, live, i, b, k, n, code, code_end = entry(table, blocks, total, STEPS, SIZE)
    width = tl.load(table + 4 * blocks + b, mask=live, other=0)
    x, is_valid = _is_ascending(indices, j, i, n, live)
    tl.store(is_bad + tl.zeros_like(j), tl.full((SIZE,), 1, tl.int32), mask=live & ~is_valid)
    live &= is_valid & (code_end > code)
    rest = x - i
    high = 8 * code + k * width + (rest >> width) + i
    tl.atomic_or(words + (high >> 5), (tl.zeros_like(high) + 1 << (high & 31)).to(tl.int32), mask=live)
    low = rest & ((tl.zeros_like(width) + 1 << width) - 1)
    place = 8 * code + i * width
    shift = place & 31
    for word in tl.static_range(3):  # 40 bits from any bit on lie in up to three words
        if word == 0:
            part = low << shift
        elif word == 1:
            part = low >> (32 - shift)
        else:
            part = low >> (63 - shift) >> 1
        part = (part & 0xFFFFFFFF).to(tl.int32)
        tl.atomic_or(words + (place >> 5) + word, part, mask=live & (part != 0))


@triton.jit
def _high_bytes(code, table, blocks, total, STEPS: tl.constexpr, SIZE: tl.constexpr):
    """(SIZE,) each: a byte's number, its block, its bits if they are of the high part, and where the block's low and high parts begin."""
    j = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    live = j < total
    b = tl.minimum(block_of(table + blocks, blocks, j, STEPS), blocks - 1)
    first, end = span(table, b, live)
    start, _ = span(table + blocks, b, live)
    low = 8 * start
    high = low + (end - first) * tl.load(table + 4 * blocks + b, mask=live, other=0)
    byte = tl.load(code + j, mask=live & (8 * j + 8 > high), other=0).to(tl.int32)
    byte &= 255 << tl.minimum(tl.maximum(high - 8 * j, 0), 8).to(tl.int32)
    return j, b, byte & 255, low, high


@triton.jit
def _ones(byte):
    pairs = byte - ((byte >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (fours + (fours >> 4)) & 15


@triton.jit(do_not_specialize=["total"])
def _count_ones(code, table, blocks, total, out, STEPS: tl.constexpr, SIZE: tl.constexpr):
    j, b, byte, low, high = _high_bytes(code, table, blocks, total, STEPS, SIZE)
    tl.store(out + 1 + tl.program_id(0), tl.sum(_ones(byte), 0).to(tl.int64))


@triton.jit(do_not_specialize=["total"])
def _decode(
    code,
    table,
    blocks,
    total,
    before,
    count,
    out,
    is_bad,
    WIDEST: tl.constexpr,
    STEPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    j, b, byte, low_start, high_start = _high_bytes(code, table, blocks, total, STEPS, SIZE)
    live = byte > 0
    first, end = span(table, b, live)
    coded, _ = span(table + 3 * blocks, b, live)
    width = tl.load(table + 4 * blocks + b, mask=live, other=0)
    ones = _ones(byte)
    i = tl.load(before + tl.program_id(0)) + tl.cumsum(ones, 0) - ones - coded
    for bit in tl.static_range(8):
        is_one = ((byte >> bit) & 1) != 0
        is_entry = is_one & (i >= 0) & (i < end - first)
        tl.store(is_bad + tl.zeros_like(j), tl.full((SIZE,), 1, tl.int32), mask=is_one & ~is_entry)
        place = low_start + i * width
        low = tl.zeros_like(place)
        for k in tl.static_range((WIDEST + 14) // 8):  # from any bit of the first byte on
            has_bits = is_entry & (place % 8 + width > 8 * k) & ((place >> 3) + k < total)
            part = tl.load(code + (place >> 3) + k, mask=has_bits, other=0).to(tl.int64)
            low |= part << (8 * k)
        low = (low >> (place & 7)) & ((tl.zeros_like(width) + 1 << width) - 1)
        x = ((8 * j + bit - high_start - i << width) | low) + i
        tl.store(out + first + i, x, mask=is_entry & (first + i < count))
        i += is_one.to(tl.int64)


@triton.jit(do_not_specialize=["total", "programs"])
def _check(table, blocks, total, ones, programs, out, is_bad, STEPS: tl.constexpr, SIZE: tl.constexpr):
    """Write the indices of blocks of which all are sent, and see whether those of the others ascend; none are left outside of a block."""
    j, live, i, b, k, n, code, code_end = entry(table, blocks, total, STEPS, SIZE)
    is_coded = code_end > code
    x, is_valid = _is_ascending(out, j, i, n, live)
    coded = tl.load(table + 4 * blocks - 1 + tl.zeros_like(j), mask=live, other=0)
    found = tl.load(ones + programs + tl.zeros_like(j), mask=live, other=0)
    is_wrong = (is_coded & ~is_valid) | (found != coded)
    tl.store(is_bad + tl.zeros_like(j), tl.full((SIZE,), 1, tl.int32), mask=live & is_wrong)
    x = tl.where(is_coded, tl.minimum(tl.maximum(x, 0), n - 1), i)
    tl.store(out + j, x, mask=live)


def _grid(count: int) -> tuple[int]:
    return (triton.cdiv(count, PER_PROGRAM),)


def encoded(indices: Tensor, entries: Entries, is_bad: Tensor | None = None) -> Tensor:
    """(code bytes,) u8: the code of (K,) i64; is_bad: (1,) i32, set to 1 if some are not ascending, repeated or outside [0, n)."""
    words = torch.zeros(entries.code_bytes // 4 + 3, dtype=torch.int32, device=indices.device)
    is_bad = words[-1:] if is_bad is None else is_bad  # no bit of a code is there
    how = {"STEPS": entries.steps, "SIZE": PER_PROGRAM}
    launch(_encode, _grid(entries.count), indices, *entries.where, entries.count, words, is_bad, **how)
    return words.view(torch.uint8)[: entries.code_bytes]


def decoded(code: Tensor, entries: Entries) -> tuple[Tensor, Tensor]:
    """(K,) i64: the indices of all blocks, which are in [0, n); and (1,) i64, 1 if some block is not the code of any, else 0."""
    out = torch.empty(entries.count, dtype=torch.int64, device=code.device)
    how = {"STEPS": entries.steps, "SIZE": BYTES}
    grid, where = (triton.cdiv(entries.code_bytes, BYTES),), (code, *entries.where, entries.code_bytes)
    counts = torch.zeros(grid[0] + 2, dtype=torch.int64, device=code.device)
    is_bad = counts[-1:]
    launch(_count_ones, grid, *where, counts, **how)
    ones = counts.cumsum(0)
    launch(_decode, grid, *where, ones, entries.count, out, is_bad, WIDEST=_WIDEST.value, **how)
    how["SIZE"] = PER_PROGRAM
    launch(_check, _grid(entries.count), *entries.where, entries.count, ones, grid[0], out, is_bad, **how)
    return out, is_bad


def _entries(ns: Int64Array, ks: Int64Array, sizes: Int64Array, device: torch.device) -> Entries:
    totals = (int(ks.sum()), int(sizes.sum()), int((ks + 7 >> 3).sum()))
    return Entries.of(torch.from_numpy(ks).to(device), torch.from_numpy(ns).to(device), totals)


def encode_(
    indices: Tensor, ns: Int64Array, ks: Int64Array, widths: Int64Array, sizes: Int64Array, out: Tensor
) -> bool:
    """See `kernels.cpu.indices.encode_`; waits for the GPU."""
    is_bad = torch.zeros(1, dtype=torch.int32, device=out.device)
    out.copy_(encoded(indices, _entries(ns, ks, sizes, out.device), is_bad))
    return not int(is_bad)


def decode(code: Tensor, ns: Int64Array, ks: Int64Array, widths: Int64Array, sizes: Int64Array) -> Tensor | None:
    """See `kernels.cpu.indices.decode`; waits for the GPU."""
    indices, is_bad = decoded(code, _entries(ns, ks, sizes, code.device))
    return None if int(is_bad) else indices
