"""The kernels on a CPU: numba, one block at a time, so that sum and pack share the cache; the GIL is released.

Sum and pack are two functions on one block of at most 2,048 elements: as one loop nest LLVM vectorises neither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from commopt.kernels.cpu.compiled import F32, F64, U8, Places, fast
from commopt.kernels.cpu.rows import Row
from commopt.wire.bucket import Blocks, Int64Array
from commopt.wire.payload import Payload

_SLICE = 2048
_PUT, _ADD, _SUM = 0, 1, 2  # SUM: add to zero what comes first, and what has the same place to that
_LARGEST = np.float32(np.finfo(np.float32).max)


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


@fast
def _compress(x: F32, e: F32, own: Places, scales: F32, bits: U8, squared: bool, is_given: bool) -> None:
    starts, homes, lengths, scale_places, byte_starts = own
    positive = np.empty(_SLICE, np.uint8)
    for b in range(lengths.size):
        n = lengths[b]
        part_x, part_e = x[starts[b] : starts[b] + n], e[homes[b] : homes[b] + n]
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


_SIGN_OF_BIT = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1), 1.0, -1.0).astype(np.float32)


@fast
def _unpack_octets(bits: U8, scale: np.float32, out: F32, table: F32, add: bool) -> None:
    for j in range(out.size // 8):
        signs, octet = table[bits[j]], out[8 * j : 8 * j + 8]
        for k in range(8):
            octet[k] = octet[k] + scale * signs[k] if add else scale * signs[k]


@fast
def _unpack(bits: U8, scales: F32, own: Places, out: F32, alpha: np.float32, mode: int, table: F32) -> None:
    starts, _, lengths, scale_places, byte_starts = own
    add = mode != _PUT
    for b in range(lengths.size):
        n, scale = lengths[b], scales[scale_places[b]] * alpha
        values = out[starts[b] : starts[b] + n]
        if mode == _SUM and (b == 0 or starts[b] != starts[b - 1]):
            values[:] = np.float32(0.0)
        part = bits[byte_starts[b] : byte_starts[b] + (n + 7) // 8]
        _unpack_octets(part, scale, values, table, add)
        for i in range(n // 8 * 8, n):
            value = scale * table[part[i // 8]][i % 8]
            values[i] = values[i] + value if add else value


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
    _compress(x.numpy(), e, row.places, row.scales, row.codes, bool(squared), squared is None)


def compress_all_(
    x: Tensor, residual: Tensor | None, payloads: Sequence[Payload], parts: Sequence[Blocks], *, squared: bool
) -> None:
    """`compress_signs_` into messages, behind their headers."""
    row, e = Row.of(payloads, parts, 1), residual
    if e is None:
        starts, _, lengths, *places = row.places
        e = x.new_zeros(int(lengths.sum()))
        row = row._replace(places=(starts, np.cumsum(lengths) - lengths, lengths, *places))
    _compress(x.numpy(), e.numpy(), row.places, row.scales, row.codes, squared, False)


def unpack_signs_(bits: Tensor, scales: Tensor, blocks: Blocks, out: Tensor, *, alpha: float, add: bool) -> None:
    """out <- alpha * scale * sign, or out <- out + alpha * scale * sign, at the blocks' starts."""
    row, mode = Row.alone(scales, bits, blocks, 1), _ADD if add else _PUT
    _unpack(row.codes, row.scales, row.places, out.numpy(), np.float32(alpha), mode, _SIGN_OF_BIT)


def decompress_all_(
    payloads: Sequence[Payload], parts: Sequence[Blocks], out: Tensor, *, alpha: float, add: bool
) -> None:
    """`unpack_signs_` of messages behind headers, one after the other; those of the same blocks are added up, from zero unless `add`."""
    row, is_sum = Row.of(payloads, parts, 1), len(parts) > 1 and all(blocks is parts[0] for blocks in parts)
    mode = _ADD if add else _SUM if is_sum else _PUT
    _unpack(row.codes, row.scales, row.places, out.numpy(), np.float32(alpha), mode, _SIGN_OF_BIT)


def residual_arrays(residual: Tensor | None, blocks: Blocks) -> tuple[F32, Int64Array]:
    """The residual and where the blocks lie in it; without one, a block of zeros that is written and thrown away."""
    if residual is not None:
        return residual.numpy(), blocks.homes
    ends = np.cumsum(blocks.lengths)
    return np.zeros(blocks.elements, np.float32), ends - blocks.lengths
