"""The kernels on a CPU: numba, one block at a time, so that sum and pack share the cache; the GIL is released.

Sum and pack are two functions on one block of at most 2,048 elements: as one loop nest LLVM vectorises neither.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from commopt.kernels.cpu.compiled import F32, F64, U8, Bool, Places, exact, fast, fma, from_nearer
from commopt.kernels.cpu.rows import Row
from commopt.wire.bucket import Blocks, Int64Array
from commopt.wire.payload import Payload
from commopt.wire.residual import Blended

_SLICE = 2048
_PUT, _ADD, _SUM = 0, 1, 2  # SUM: add to zero what comes first, and what has the same place to that
_LARGEST = np.float32(np.finfo(np.float32).max)
States = tuple[F32, F32]
Weights = tuple[np.float32, np.float32, np.float32, np.float32]  # of two states, see `from_nearer`
_NO_STATES: States = (np.zeros(0, np.float32), np.zeros(0, np.float32))
_NO_MASK: Bool = np.zeros(0, np.bool_)
_NO_WEIGHTS: Weights = (np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0))


@fast
def _sum_abs(x: F32, e: F32) -> Any:
    total = np.float32(0.0)
    for i in range(x.size):
        total += abs(x[i] + e[i])
    return total


@fast
def _sum_squares(x: F32, e: F32) -> Any:
    total = np.float32(0.0)
    for i in range(x.size):
        c = x[i] + e[i]
        total += c * c
    return total


@fast
def _signs(x: F32, e: F32, scale: np.float32, keep: bool, positive: U8) -> None:
    for i in range(x.size):
        c = x[i] + e[i]
        is_positive = c >= np.float32(0.0)
        if keep:
            e[i] = c - (scale if is_positive else -scale)
        positive[i] = np.uint8(is_positive)


@fast
def _gather_bits(positive: U8, bits: U8) -> None:
    # eight bytes of 0 or 1 become the top byte of the product, the first one its highest bit
    words = positive.view(np.uint64)
    for j in range(bits.size):
        bits[j] = np.uint8((words[j] * np.uint64(0x8040201008040201)) >> np.uint64(56))


@fast
def _block_sum(x: F32, e: F32, squared: bool) -> float:
    total = 0.0
    for a in range(0, x.size, _SLICE):
        part_x, part_e = x[a : a + _SLICE], e[a : a + _SLICE]
        total += float(_sum_squares(part_x, part_e)) if squared else float(_sum_abs(part_x, part_e))
    return total


@fast
def _pack_block(x: F32, e: F32, scale: np.float32, bits: U8, positive: U8) -> None:
    keep = bool(abs(scale) <= _LARGEST)
    for a in range(0, x.size, _SLICE):
        z = min(a + _SLICE, x.size)
        n_bytes = (z - a + 7) // 8
        if (z - a) % 8:
            positive[z - a : 8 * n_bytes] = 0
        _signs(x[a:z], e[a:z], scale, keep, positive)
        _gather_bits(positive[: 8 * n_bytes], bits[a // 8 : a // 8 + n_bytes])


@exact
def _blend(x: F32, start: np.uint64, s: F32, home: np.uint64, n: int, weights: Weights, c: F32) -> None:
    """c <- s + weight (x - s)"""
    weight, share, _, _ = weights
    for i in range(n):
        own, given = s[home + np.uint64(i)], x[start + np.uint64(i)]
        c[i] = fma(share, given - own, given if share != weight else own)


@exact
def _blend_twice(x: F32, start: np.uint64, states: States, home: np.uint64, n: int, weights: Weights, c: F32) -> None:
    s, t = states
    weight, share, second_weight, second_share = weights
    for i in range(n):
        own, given = s[home + np.uint64(i)], x[start + np.uint64(i)]
        first = fma(share, given - own, given if share != weight else own)
        own = t[home + np.uint64(i)]
        c[i] = fma(second_share, first - own, first if second_share != second_weight else own)


@fast
def _compress(
    x: F32, e: F32, own: Places, scales: F32, bits: U8, squared: bool, is_given: bool, states: States, weights: Weights
) -> None:
    starts, homes, lengths, scale_places, byte_starts = own
    positive = np.empty(_SLICE, np.uint8)
    blended = np.empty(lengths.max() if states[0].size and lengths.size else 0, np.float32)
    for b in range(lengths.size):
        n = lengths[b]
        part_x, part_e = x[starts[b] : starts[b] + n], e[homes[b] : homes[b] + n]
        if states[1].size:
            _blend_twice(x, np.uint64(starts[b]), states, np.uint64(homes[b]), n, weights, blended)
        elif states[0].size:
            _blend(x, np.uint64(starts[b]), states[0], np.uint64(homes[b]), n, weights, blended)
        if states[0].size:
            part_x = blended[:n]
        part_bits = bits[byte_starts[b] : byte_starts[b] + (n + 7) // 8]
        if not is_given:
            mean = _block_sum(part_x, part_e, squared) / n
            scale = np.float32(math.sqrt(mean) if squared else mean)
            # false for NaN and inf; isfinite may be folded away under reassoc
            scales[scale_places[b]] = scale if abs(scale) <= _LARGEST else np.float32(np.nan)
        _pack_block(part_x, part_e, scales[scale_places[b]], part_bits, positive)


@fast
def _sums(x: F32, e: F32, own: Places, squared: bool, out: F64) -> None:
    starts, homes, lengths = own
    for b in range(lengths.size):
        n = lengths[b]
        out[b] = _block_sum(x[starts[b] : starts[b] + n], e[homes[b] : homes[b] + n], squared)


@fast
def _unpack_block(bits: U8, first: np.uint64, scale: np.float32, out: F32, start: np.uint64, n: int, add: bool) -> None:
    for j in range(n // 8):
        byte, at = np.int32(bits[first + np.uint64(j)]), start + np.uint64(8 * j)
        if add:
            for k in range(8):
                out[at + np.uint64(k)] += scale if byte & np.int32(128 >> k) else -scale
        else:
            for k in range(8):
                out[at + np.uint64(k)] = scale if byte & np.int32(128 >> k) else -scale
    for i in range(n // 8 * 8, n):
        is_positive = np.int32(bits[first + np.uint64(i // 8)]) & np.int32(128 >> (i % 8))
        value = scale if is_positive else -scale
        out[start + np.uint64(i)] = out[start + np.uint64(i)] + value if add else value


@fast
def _copy(x: F32, start: np.uint64, n: int, out: F32, home: np.uint64) -> None:
    for i in range(n):
        out[home + np.uint64(i)] = x[start + np.uint64(i)]


@fast
def _hide(x: F32, start: np.uint64, n: int, mask: Bool, home: np.uint64) -> None:
    for i in range(n):
        x[start + np.uint64(i)] = x[start + np.uint64(i)] if mask[home + np.uint64(i)] else np.float32(0.0)


@fast
def _unpack(bits: U8, scales: F32, own: Places, out: F32, also: F32, mask: Bool, alpha: np.float32, mode: int) -> None:
    starts, homes, lengths, scale_places, byte_starts = own
    for b in range(lengths.size):
        n, start = lengths[b], np.uint64(starts[b])
        if mode == _SUM and (b == 0 or starts[b] != starts[b - 1]):
            out[starts[b] : starts[b] + n] = np.float32(0.0)
        _unpack_block(bits, np.uint64(byte_starts[b]), scales[scale_places[b]] * alpha, out, start, n, mode != _PUT)
        if mask.size:
            _hide(out, start, n, mask, np.uint64(homes[b]))
        if also.size:
            _copy(out, start, n, also, np.uint64(homes[b]))


def block_sums(x: Tensor, residual: Tensor | None, blocks: Blocks, *, squared: bool) -> F64:
    """(B,) f64: sum of |c| or of c squared per block, with c = x + residual."""
    out = np.empty(len(blocks))
    e, homes = residual_arrays(residual, blocks)
    _sums(x.numpy(), e, (blocks.starts, homes, blocks.lengths), squared, out)
    return out


def compress_signs_(
    x: Tensor, residual: Tensor | None, blocks: Blocks, scales: Tensor, bits: Tensor, *, squared: bool | None
) -> None:
    """Write the sign bits of c = x + residual (1 for c >= 0), and residual <- c - scale * sign where the scale is finite.

    A block's scale is its mean magnitude, or its root mean square if `squared`, and NaN if it is not finite; None: scales are given.
    """
    e, homes = residual_arrays(residual, blocks)
    row = Row.alone(scales, bits, blocks, 1, homes)
    _compress(x.numpy(), e, row.places, row.scales, row.codes, bool(squared), squared is None, _NO_STATES, _NO_WEIGHTS)


def compress_all_(
    x: Tensor, residual: Tensor | Blended | None, payloads: Sequence[Payload], parts: Sequence[Blocks], *, squared: bool
) -> int:
    """`compress_signs_` into messages, behind their headers. Returns the first bad parameter, or -1."""
    row, states, weights = Row.of(payloads, parts, 1), _NO_STATES, _NO_WEIGHTS
    if isinstance(residual, Blended):
        first, second = (*residual.states, (x[:0], 0.0))[:2]
        states, weights = (first[0].numpy(), second[0].numpy()), (*from_nearer(first[1]), *from_nearer(second[1]))
        residual = residual.known
    if residual is None:
        starts, _, lengths, *places = row.places
        residual = x.new_zeros(int(lengths.sum()))
        row = row._replace(places=(starts, np.cumsum(lengths) - lengths, lengths, *places))
    _compress(x.numpy(), residual.numpy(), row.places, row.scales, row.codes, squared, False, states, weights)
    return row.first_bad()


def unpack_signs_(bits: Tensor, scales: Tensor, blocks: Blocks, out: Tensor, *, alpha: float, add: bool) -> None:
    """out <- alpha * scale * sign, or out <- out + alpha * scale * sign, at the blocks' starts."""
    row, mode = Row.alone(scales, bits, blocks, 1), _ADD if add else _PUT
    _unpack(row.codes, row.scales, row.places, out.numpy(), _NO_STATES[0], _NO_MASK, np.float32(alpha), mode)


def decompress_all_(
    payloads: Sequence[Payload],
    parts: Sequence[Blocks],
    out: Tensor,
    *,
    alpha: float,
    add: bool,
    also: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """`unpack_signs_` of messages behind headers, one after the other; those of the same blocks are added up, from zero unless `add`.

    also: gets what out has, at the blocks' homes. mask: bool, likewise; where it is False, values are zero.
    """
    row, is_sum = Row.of(payloads, parts, 1), len(parts) > 1 and all(blocks is parts[0] for blocks in parts)
    mode = _ADD if add else _SUM if is_sum else _PUT
    other, hidden = _NO_STATES[0] if also is None else also.numpy(), _NO_MASK if mask is None else mask.numpy()
    _unpack(row.codes, row.scales, row.places, out.numpy(), other, hidden, np.float32(alpha), mode)


def residual_arrays(residual: Tensor | None, blocks: Blocks) -> tuple[F32, Int64Array]:
    """The residual and where the blocks lie in it; without one, a block of zeros that is written and thrown away."""
    if residual is not None:
        return residual.numpy(), blocks.homes
    ends = np.cumsum(blocks.lengths)
    return np.zeros(blocks.elements, np.float32), ends - blocks.lengths
