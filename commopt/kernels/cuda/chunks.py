"""DeMo on a GPU: one program a chunk transforms it, selects its largest coefficients and writes their code, or reads those of all ranks.

The code of places is that of `compress.indices`. As its bytes are shared by chunks, and by the threads of a program, bits are set by
atomics, in memory that is zero. No number depends on their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from commopt.kernels.cuda import headers
from commopt.kernels.cuda.pieces import ALL_BUT_SIGN, launch, note_bad
from commopt.kernels.reference.indices import widths_and_sizes
from commopt.wire.bucket import Blocks, Int64Array
from commopt.wire.payload import Layout, Payload, in_a_row, row_of

WIDEST = 64  # rows and columns of the chunks that are transformed here
LONGEST = 2048  # coefficients that a program has at a time
_BITS_READ = 256  # of a code, at a time
_INF = tl.constexpr(0x7F800000)  # the bits of inf; those of NaN are above
(
    _START,
    _HOME,
    _LENGTH,
    _SOURCE,
    _CODE,
    _PARAMETER,
    _STRIDE,
    _HEIGHT,
    _WIDTH,
    _LEFT,
    _RIGHT,
    _COUNT,
    _ENTRY,
    _LOW,
    _SIZE,
) = map(tl.constexpr, range(15))
_VALUES = {16: (torch.bfloat16, torch.int16), 32: (torch.float32, torch.float32)}  # on the wire, and as they are read


@dataclass(frozen=True)
class Chunks:
    """The chunks of a bucket, on the device.

    columns: (15, C) i64, in the order of the names above: where a chunk's coefficients begin in a flat tensor and in the momentum, how
    many there are; where it begins among the gradients, and its code in a message, in bytes; its parameter, that matrix's columns, its
    own rows and columns, and where in `cosines` are theirs; how many coefficients are sent, and how many come before them; the bits of
    the code's low parts, and its bytes. cosines: f32, the transforms of all sizes. layout: of a message. elements: of all chunks.
    longest, rows, width: the largest ones, as powers of two.
    """

    columns: Tensor
    cosines: Tensor
    layout: Layout
    elements: int
    longest: int
    rows: int
    width: int

    @classmethod
    def of(
        cls,
        blocks: Blocks,
        counts: Int64Array,
        shapes: Int64Array,
        transforms: dict[int, Tensor],
        value_bits: int,
        device: torch.device,
    ) -> Chunks:
        """blocks: the coefficients of each chunk; counts: how many are sent. shapes: (4, C) where each begins among the gradients, the
        columns there, and its own rows and columns. transforms: by size. value_bits: of what is sent, 16 or 32."""
        lows, sizes = widths_and_sizes(blocks.lengths, counts)
        sources, strides, heights, widths = shapes
        places = dict(zip(transforms, np.cumsum([0, *(n * n for n in transforms)]), strict=False))
        left, right = (np.asarray([places[n] for n in own.tolist()], dtype=np.int64) for own in (heights, widths))
        entries, code = int(counts.sum()), 4 + int(counts.sum()) * value_bits // 8
        columns = (
            *(blocks.starts, blocks.homes, blocks.lengths, sources, code + np.cumsum(sizes) - sizes, blocks.parameters),
            *(strides, heights, widths, left, right, counts, np.cumsum(counts) - counts, lows, sizes),
        )
        layout = ((torch.int32, 1), (_VALUES[value_bits][0], entries), (torch.uint8, int(sizes.sum())))
        table = torch.from_numpy(np.stack(columns).astype(np.int64)).to(device)
        flat = torch.cat(
            [torch.zeros(0, dtype=torch.float32, device=device), *(x.reshape(-1) for x in transforms.values())]
        )
        largest = [_power(own) for own in (blocks.lengths, heights, widths)]
        return cls(table, flat, layout, blocks.elements, *largest)

    def __len__(self) -> int:
        return self.columns.shape[1]

    @property
    def can_be_transformed(self) -> bool:
        return max(self.rows, self.width) <= WIDEST

    @property
    def value_bits(self) -> int:
        return 8 * self.layout[1][0].itemsize

    @property
    def _where(self) -> tuple[Tensor, int]:
        return self.columns, len(self)

    def add_transformed(self, x: Tensor, momentum: Tensor, decay: float, d: Tensor) -> None:
        """d <- decay momentum + C x"""
        how = {"ROWS": self.rows, "WIDTH": self.width}
        launch(_add_transformed, (len(self),), x, momentum, *self._where, self.cosines, decay, d, **how)

    def largest(self, d: Tensor) -> Payload:
        """The coefficients of each chunk that are largest by magnitude; NaN counts as largest, and the first of equals is taken."""
        (payload,) = in_a_row([self.layout], d.device)
        how = {"VALUE_BITS": self.value_bits, "LENGTH": min(self.longest, LONGEST), "IS_ONE": self.longest <= LONGEST}
        first = headers.noted_in([payload])
        launch(_select, (len(self),), d, *self._where, payload.buffer.view(torch.int32), first, **how)
        headers.write_(first, [payload])
        return payload

    def add_up(self, payloads: Sequence[Payload], own: int, d: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) the sum of what all ranks have sent, in rank order, and (1,) i32, 1 if bytes are not the code of any places.

        What rank `own` has sent is subtracted from d.
        """
        row, at = row_of(payloads)
        total, is_damaged = torch.empty_like(d), torch.zeros(1, dtype=torch.int32, device=d.device)
        where = (*self._where, len(at), own, at[0], at[1] - at[0] if len(at) > 1 else 0, d, total, is_damaged)
        how = {"VALUE_BITS": self.value_bits, "SIZE": _BITS_READ, "LENGTH": min(self.longest, LONGEST)}
        launch(_add_up, (len(self),), row, row.view(_VALUES[self.value_bits][1]), *where, **how)
        return total, is_damaged

    def put_signs(self, total: Tensor, ranks: int, d: Tensor, momentum: Tensor, x: Tensor) -> None:
        """momentum <- d; x <- the sign of C^-1 total / ranks; total is used up."""
        how = {"ROWS": self.rows, "WIDTH": self.width}
        where = (total, float(ranks), d, *self._where, self.cosines, momentum, x)
        launch(_put_signs, (len(self),), *where, **how)


def _power(sizes: Int64Array) -> int:
    return 1 << (max(16, int(sizes.max(initial=1))) - 1).bit_length()


@triton.jit
def _of(columns, count, which: tl.constexpr):
    return tl.load(columns + which * count + tl.program_id(0))


@triton.jit
def _small(columns, count, which: tl.constexpr):
    """A number within a chunk."""
    return _of(columns, count, which).to(tl.int32)


@triton.jit
def _cosines(cosines, n, k, i, IS_TURNED: tl.constexpr):
    """(SIZE,) column i of the transform of n elements, or of its inverse, and zeros below."""
    return tl.load(cosines + (i * n + k if IS_TURNED else k * n + i), mask=k < n, other=0.0)


@triton.jit
def _by_rows(
    x, stride, scale, columns, count, cosines, ROWS: tl.constexpr, WIDTH: tl.constexpr, IS_INVERSE: tl.constexpr
):
    """(ROWS, WIDTH) C X / scale, or C^-1 X / scale; x: (height, width) in memory."""
    height, width = _small(columns, count, _HEIGHT), _small(columns, count, _WIDTH)
    cosines += _of(columns, count, _LEFT)
    k, j, total = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.zeros((ROWS, WIDTH), tl.float32)
    for i in range(height):
        row = tl.div_rn(tl.load(x + i * stride + j, mask=j < width, other=0.0), scale)
        total = tl.fma(_cosines(cosines, height, k, i, IS_INVERSE)[:, None], row[None, :], total)
    return total


@triton.jit
def _by_columns(x, columns, count, cosines, ROWS: tl.constexpr, WIDTH: tl.constexpr, IS_INVERSE: tl.constexpr):
    """(ROWS, WIDTH) X C^T, or X C^-T; x: (height, width) in memory, end to end."""
    height, width = _small(columns, count, _HEIGHT), _small(columns, count, _WIDTH)
    cosines += _of(columns, count, _RIGHT)
    i, k, total = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.zeros((ROWS, WIDTH), tl.float32)
    for j in range(width):
        column = tl.load(x + i * width + j, mask=i < height, other=0.0)
        total = tl.fma(column[:, None], _cosines(cosines, width, k, j, IS_INVERSE)[None, :], total)
    return total


@triton.jit
def _inside(columns, count, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """A chunk's rows and columns, whether they are there, and where they lie among its coefficients."""
    i, j, width = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :], _small(columns, count, _WIDTH)
    return i, j, (i < _small(columns, count, _HEIGHT)) & (j < width), i * width + j


@triton.jit
def _add_transformed(x, momentum, columns, count, cosines, decay, d, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    i, j, inside, at = _inside(columns, count, ROWS, WIDTH)
    x += _of(columns, count, _SOURCE)
    d += _of(columns, count, _START)
    half = _by_rows(x, _of(columns, count, _STRIDE), 1.0, columns, count, cosines, ROWS, WIDTH, False)
    tl.store(d + at, half, mask=inside)
    tl.debug_barrier()
    y = _by_columns(d, columns, count, cosines, ROWS, WIDTH, False)
    kept = tl.load(momentum + _of(columns, count, _HOME) + at, mask=inside, other=0.0)
    tl.debug_barrier()
    tl.store(d + at, y + decay * kept, mask=inside)


@triton.jit
def _put_signs(total, ranks, d, columns, count, cosines, momentum, x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    i, j, inside, at = _inside(columns, count, ROWS, WIDTH)
    start = _of(columns, count, _START)
    kept = tl.load(d + start + at, mask=inside, other=0.0)
    tl.store(momentum + _of(columns, count, _HOME) + at, kept, mask=inside)
    total += start
    half = _by_rows(total, _small(columns, count, _WIDTH), ranks, columns, count, cosines, ROWS, WIDTH, True)
    tl.debug_barrier()
    tl.store(total + at, half, mask=inside)
    tl.debug_barrier()
    y = _by_columns(total, columns, count, cosines, ROWS, WIDTH, True)
    place = _of(columns, count, _SOURCE) + i * _of(columns, count, _STRIDE) + j
    tl.store(x + place, (y > 0).to(tl.float32) - (y < 0).to(tl.float32), mask=inside)


@triton.jit
def _bits(d, begin, n, LENGTH: tl.constexpr):
    """(LENGTH,) the bits of coefficients, their magnitudes, which are ordered as their bits are, and whether they are in the chunk."""
    i = begin + tl.arange(0, LENGTH)
    bits = tl.load(d + i, mask=i < n, other=0.0).to(tl.int32, bitcast=True)
    return bits, bits & ALL_BUT_SIGN, i < n


@triton.jit
def _how_many(d, n, least, LENGTH: tl.constexpr):
    """How many magnitudes are at least so large."""
    found = 0
    for begin in range(0, n, LENGTH):
        bits, magnitudes, inside = _bits(d, begin, n, LENGTH)
        found += tl.sum((inside & (magnitudes >= least)).to(tl.int32), 0)
    return found


@triton.jit
def _cut_of(d, n, k, LENGTH: tl.constexpr, IS_ONE: tl.constexpr):
    """The k-th largest magnitude, bit by bit, and how many of those that equal it are among the k; IS_ONE: n is at most LENGTH."""
    bits, magnitudes, inside = _bits(d, 0, n, LENGTH)
    magnitudes = tl.where(inside, magnitudes, -1)
    cut = 0
    for bit in range(31):
        higher = cut | (1 << (30 - bit))
        if IS_ONE:
            reached = tl.sum((magnitudes >= higher).to(tl.int32), 0)
        else:
            reached = _how_many(d, n, higher, LENGTH)
        cut = tl.where(reached >= k, higher, cut)
    return cut, k - _how_many(d, n, cut + 1, LENGTH)


@triton.jit
def _rounded(bits, magnitudes, VALUE_BITS: tl.constexpr):
    """(LENGTH,) u32 the bits that are sent of each value, and whether they are those of a NaN or an inf."""
    if VALUE_BITS == 32:
        return bits.to(tl.uint32, bitcast=True), magnitudes >= _INF
    word = bits.to(tl.uint32, bitcast=True)
    near = tl.where(magnitudes > _INF, 0x7FC0, (word + 0x7FFF + ((word >> 16) & 1)) >> 16)
    return near, (near & 0x7FFF) >= 0x7F80


@triton.jit
def _set(words, base, bit, pattern, mask):
    """Write up to 32 bits from bit `base` + `bit` on."""
    words += base >> 5
    bit += (base & 31).to(tl.int32)
    shift = (bit & 31).to(tl.uint32)
    low = (pattern << shift).to(tl.int32, bitcast=True)
    high = (pattern >> 1 >> (31 - shift)).to(tl.int32, bitcast=True)
    tl.atomic_or(words + (bit >> 5), low, mask=mask & (low != 0))
    tl.atomic_or(words + (bit >> 5) + 1, high, mask=mask & (high != 0))


@triton.jit
def _select(d, columns, count, words, first, VALUE_BITS: tl.constexpr, LENGTH: tl.constexpr, IS_ONE: tl.constexpr):
    n, k, low_bits = _small(columns, count, _LENGTH), _small(columns, count, _COUNT), _small(columns, count, _LOW)
    size, code = _small(columns, count, _SIZE), 8 * _of(columns, count, _CODE)
    value_at = 32 + VALUE_BITS * _of(columns, count, _ENTRY)
    d += _of(columns, count, _START)
    cut, room = _cut_of(d, n, k, LENGTH, IS_ONE)
    chosen_before, equal_before, is_bad = 0, 0, 0
    for begin in range(0, n, LENGTH):
        bits, magnitudes, inside = _bits(d, begin, n, LENGTH)
        is_equal = (inside & (magnitudes == cut)).to(tl.int32)
        has_room = equal_before + tl.cumsum(is_equal, 0) <= room
        chosen = inside & ((magnitudes > cut) | ((is_equal > 0) & has_room))
        i = chosen_before + tl.cumsum(chosen.to(tl.int32), 0) - 1
        sent, is_wrong = _rounded(bits, magnitudes, VALUE_BITS)
        _set(words, value_at, VALUE_BITS * i, sent, chosen)
        if size > 0:
            rest = begin + tl.arange(0, LENGTH) - i
            low = (rest & ((1 << low_bits) - 1)).to(tl.uint32, bitcast=True)
            _set(words, code, k * low_bits + (rest >> low_bits) + i, tl.full((LENGTH,), 1, tl.uint32), chosen)
            _set(words, code, i * low_bits, low, chosen)
        chosen_before += tl.sum(chosen.to(tl.int32), 0)
        equal_before += tl.sum(is_equal, 0)
        is_bad |= tl.max((chosen & is_wrong).to(tl.int32), 0)
    p = tl.program_id(0) + tl.arange(0, 1)
    note_bad(first, (tl.zeros((1,), tl.int32) + is_bad) > 0, columns, count, p)


@triton.jit
def _low_part(codes, code, size, place, low_bits, mask):
    """The bits of a code from `place` on, at most 20."""
    found = tl.zeros_like(place)
    for k in tl.static_range(4):
        byte = (place >> 3) + k
        found |= tl.load(codes + code + byte, mask=mask & (byte < size), other=0).to(tl.int64) << (8 * k)
    return (found >> (place & 7)) & ((1 << low_bits) - 1)


@triton.jit
def _add_up(
    codes,
    values,
    columns,
    count,
    ranks,
    own,
    at,
    stride,
    d,
    total,
    is_damaged,
    VALUE_BITS: tl.constexpr,
    SIZE: tl.constexpr,
    LENGTH: tl.constexpr,
):
    n, k = _of(columns, count, _LENGTH), _of(columns, count, _COUNT)
    low_bits, size, code = _of(columns, count, _LOW), _of(columns, count, _SIZE), _of(columns, count, _CODE)
    start, entry = _of(columns, count, _START), _of(columns, count, _ENTRY)
    for begin in range(0, n, LENGTH):
        i = begin + tl.arange(0, LENGTH)
        tl.store(total + start + i, tl.zeros((LENGTH,), tl.float32), mask=i < n)
    high, end = k * low_bits, tl.where(size > 0, 8 * size, k)  # without a code all coefficients are sent
    for rank in range(ranks):
        tl.debug_barrier()  # the sums of the ranks before are there
        message = at + rank * stride
        found, is_wrong = 0, 0
        for begin in range(high, end, SIZE):
            bit = begin + tl.arange(0, SIZE)
            byte = tl.load(codes + message + code + (bit >> 3), mask=bit < 8 * size, other=255).to(tl.int64)
            is_one = (bit < end) & (((byte >> (bit & 7)) & 1) > 0)
            i = found + tl.cumsum(is_one.to(tl.int32), 0) - 1
            low = _low_part(codes, message + code, size, i * low_bits, low_bits, is_one & (i < k))
            place = ((bit - high - i) << low_bits | low) + i
            is_entry = is_one & (i < k) & (place < n)
            is_wrong |= tl.max((is_one & (is_entry == 0)).to(tl.int32), 0)
            value = tl.load(values + (message + 4) // (VALUE_BITS // 8) + entry + i, mask=is_entry, other=0)
            if VALUE_BITS == 16:
                value = (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
            sum_ = tl.load(total + start + place, mask=is_entry, other=0.0)
            tl.store(total + start + place, sum_ + value, mask=is_entry)
            if rank == own:
                rest = tl.load(d + start + place, mask=is_entry, other=0.0)
                tl.store(d + start + place, rest - value, mask=is_entry)
            found += tl.sum(is_one.to(tl.int32), 0)
        if (found != k) | (is_wrong > 0):
            tl.store(is_damaged, 1)
