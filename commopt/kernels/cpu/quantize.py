"""The block quantisers on a CPU: numba, a slice of at most 2,048 elements at a time, through buffers that stay in the cache.

Each loop does one thing, so that LLVM can vectorise it. No fast-math: codes, scales and residuals equal the plain kernels' bit for
bit, so no product may melt into a fused multiply-add, and the largest magnitude is found among bit patterns, which are ordered
as the magnitudes are, with inf and NaN above all others. All in one file: numba's cache would not notice that a function which a
kernel calls in another file has changed.

Inside the loop over blocks no reference is counted: that is done atomically, and for blocks of 256 cost as much as all arithmetic.
So there are neither slices nor views, and helpers hardly branch: numba counts the arguments of many a function that does. They
take whole arrays and where to begin, as an unsigned number, since LLVM does not vectorise what may be an index from the end.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from commopt.kernels.cpu.compiled import F32, F64, I8, I32, U8, Places, exact
from commopt.kernels.reference.quantize import float8_values, natural_values
from commopt.wire.bucket import Blocks, Int64Array, UInt64Array

_SLICE = 2048
_LARGEST, _SMALLEST = np.float32(np.finfo(np.float32).max), np.float32(2.0**-126)
_LEVELS, _FLOAT8, _NATURAL = 0, 1, 2
_How = tuple[int, np.float32, int, bool, bool]  # kind, levels, bits, squared, is_given: see `compress_`
_ALL_BUT_SIGN, _MANTISSA = np.int32(0x7FFFFFFF), np.int32(0x7FFFFF)
_GOLDEN, _FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


# --- values, norms, draws


@exact
def _correct(x: F32, start: np.uint64, e: F32, home: np.uint64, has_residual: bool, n: int, c: F32) -> None:
    for i in range(n):
        c[i] = x[start + np.uint64(i)] + e[home + np.uint64(i)] if has_residual else x[start + np.uint64(i)]


@exact
def _largest_bits(c_bits: I32, n: int) -> Any:
    largest = np.int32(0)
    for i in range(n):
        largest = max(largest, np.int32(c_bits[i] & _ALL_BUT_SIGN))
    return largest


@exact
def _sum_squares(c: F32, n: int, folded: F64) -> Any:
    """The sum of squares by halving, which vectorises and has one order only."""
    for i in range(n):
        folded[i] = np.float64(c[i]) * np.float64(c[i])
    half = 1
    while 2 * half < n:
        half *= 2
    while n > 1:
        for i in range(n - half):
            folded[i] += folded[np.uint64(half) + np.uint64(i)]
        n, half = half, half // 2
    return folded[0]


@exact
def _draw(key: np.uint64, first: int, n: int, u: F32) -> None:
    """noise.uniform of n elements from `first` on."""
    counter = key + np.uint64(first + 1) * _GOLDEN
    for i in range(n):
        z = counter + np.uint64(i) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _FIRST
        z = (z ^ (z >> np.uint64(27))) * _SECOND
        z = z ^ (z >> np.uint64(31))
        u[i] = np.float32(np.int32(z >> np.uint64(40))) * np.float32(2.0**-24)


@exact
def _scale_of(kind: int, norm: np.float32, levels: np.float32) -> Any:
    if not norm <= _LARGEST:
        return np.float32(np.nan)
    if kind == _NATURAL:  # the power of two at or above the largest magnitude, where float32 has one
        if norm <= _SMALLEST:
            return np.float32(0.0) if norm == np.float32(0.0) else _SMALLEST
        mantissa, exponent = math.frexp(np.float64(norm))
        return np.float32(math.ldexp(1.0, min(exponent - 1 if mantissa == 0.5 else exponent, 127)))
    scale = np.float32(norm / levels)
    if not np.float32(scale * levels) <= _LARGEST:
        return np.float32(np.nan)
    return scale if scale >= _SMALLEST else np.float32(0.0)


# --- one code per element


@exact
def _encode_levels(c: F32, u: F32, n: int, scale: np.float32, levels: np.float32, tie: np.int32, codes: I8) -> None:
    for i in range(n):
        a = min(abs(c[i]) / scale, levels)
        below = np.int32(a)
        rest = a - np.float32(below)
        up = (u[i] < rest) | ((rest == np.float32(0.5)) & (np.int32(below & tie) != np.int32(0)))
        level = np.int32(below + np.int32(up))
        codes[i] = np.int8(np.int32(-level) if c[i] < np.float32(0.0) else level)


@exact
def _encode_float8(
    c: F32, c_bits: I32, u: F32, n: int, scale: np.float32, tie: np.int32, codes: I8, steps: tuple[F32, I32, F32, I32]
) -> None:
    ratio, ratio_bits, inverse_step, step_bits = steps
    for i in range(n):
        ratio[i] = min(abs(c[i]) / scale, np.float32(448.0))
    for i in range(n):  # 1 / step, where step = 2^(exponent - 3), and 2^-9 below the smallest normal number, 2^-6
        exponent = max(np.int32(ratio_bits[i] >> np.int32(23)), np.int32(121))
        step_bits[i] = np.int32(np.int32(np.int32(257) - exponent) << np.int32(23))
    for i in range(n):
        a = ratio[i] * inverse_step[i]
        below = np.int32(a)
        rest = a - np.float32(below)
        up = (u[i] < rest) | ((rest == np.float32(0.5)) & (np.int32(below & tie) != np.int32(0)))
        binade = np.int32(np.int32(136) - np.int32(step_bits[i] >> np.int32(23)))
        magnitude = np.int32(np.int32(binade << np.int32(3)) + np.int32(below + np.int32(up)))
        codes[i] = np.int8(magnitude | np.int32(np.int32(c_bits[i] >> np.int32(31)) & np.int32(128)))


@exact
def _encode_natural(c: F32, c_bits: I32, u: F32, n: int, scale: np.float32, codes: I8) -> None:
    top = np.int32(math.frexp(np.float64(scale))[1] + 126)  # exponents as float32 stores them
    lowest, zero = max(np.int32(top - 126), np.int32(1)), np.int32(top - 127)
    smallest = np.float32(math.ldexp(1.0, int(lowest) - 127))
    for i in range(n):
        exponent = np.int32(np.int32(c_bits[i] & _ALL_BUT_SIGN) >> np.int32(23))
        is_small = exponent < lowest
        mantissa = np.float32(np.int32(c_bits[i] & _MANTISSA)) * np.float32(2.0**-23)
        rest = abs(c[i]) / smallest if is_small else mantissa
        level = np.int32((np.int32(lowest - 1) if is_small else exponent) + np.int32(u[i] < rest))
        code = np.int32(
            np.int32(min(level, top) - zero) | np.int32(np.int32(c_bits[i] >> np.int32(31)) & np.int32(128))
        )
        codes[i] = np.int8(code if level >= lowest else np.int32(0))


@exact
def _leave(c: F32, codes: I8, n: int, scale: np.float32, table: F32, e: F32, home: np.uint64) -> None:
    has_table = table.size > 0
    for i in range(n):
        value = table[np.uint8(codes[i])] if has_table else np.float32(codes[i])
        e[home + np.uint64(i)] = c[i] - scale * value


# --- b bits per code: eight codes are a 64-bit word of bytes, whose upper bits are squeezed out pair by pair


@exact
def _squeeze(word: np.uint64, bits: np.uint64) -> Any:
    shift = np.uint64(8) - bits
    word = word & (np.uint64(0x0101010101010101) * ((np.uint64(1) << bits) - np.uint64(1)))
    word = (word & np.uint64(0x00FF00FF00FF00FF)) | ((word & np.uint64(0xFF00FF00FF00FF00)) >> shift)
    shift = shift + shift
    word = (word & np.uint64(0x0000FFFF0000FFFF)) | ((word & np.uint64(0xFFFF0000FFFF0000)) >> shift)
    shift = shift + shift
    return (word & np.uint64(0x00000000FFFFFFFF)) | ((word & np.uint64(0xFFFFFFFF00000000)) >> shift)


@exact
def _spread(word: np.uint64, bits: np.uint64) -> Any:
    """Undo `_squeeze`, and extend the signs."""
    one = np.uint64(1)
    shift = np.uint64(4) * (np.uint64(8) - bits)
    low = (one << (np.uint64(4) * bits)) - one
    word = (word & low) | ((word & ~low) << shift)
    shift, low = shift >> one, np.uint64(0x0000000100000001) * ((one << (np.uint64(2) * bits)) - one)
    word = (word & low) | ((word & ~low) << shift)
    shift, low = shift >> one, np.uint64(0x0001000100010001) * ((one << bits) - one)
    word = (word & low) | ((word & ~low) << shift)
    negative = (word >> (bits - one)) & np.uint64(0x0101010101010101)
    return word | (negative * (np.uint64(0x100) - (one << bits)))


@exact
def _pack_bytes(codes: I8, n: int, out: U8, first: np.uint64) -> None:
    for i in range(n):
        out[first + np.uint64(i)] = np.uint8(codes[i])


@exact
def _pack_halves(codes: I8, n: int, out: U8, first: np.uint64) -> None:
    for j in range((n + 1) // 2):
        i = np.uint64(2) * np.uint64(j)
        out[first + np.uint64(j)] = np.uint8((codes[i] & 15) | (codes[i + np.uint64(1)] << 4))


@exact
def _pack_words(words: UInt64Array, n: int, bits: int, packed: U8, out: U8, first: np.uint64) -> None:
    for j in range((n + 7) // 8):
        word = _squeeze(words[j], np.uint64(bits))
        for k in range(bits):
            packed[j * bits + k] = np.uint8(word & np.uint64(255))
            word >>= np.uint64(8)
    for i in range((n * bits + 7) // 8):
        out[first + np.uint64(i)] = packed[i]


@exact
def _clear(codes: I8, first: int, end: int) -> None:
    for i in range(first, end):
        codes[i] = 0


@exact
def _unpack_halves(source: U8, first: np.uint64, n: int, codes: I8) -> None:
    for j in range((n + 1) // 2):
        pair, i = np.int32(source[first + np.uint64(j)]), np.uint64(2) * np.uint64(j)
        codes[i] = np.int8(((pair & 15) ^ 8) - 8)
        codes[i + np.uint64(1)] = np.int8(((pair >> 4) ^ 8) - 8)


@exact
def _unpack_words(source: U8, first: np.uint64, n: int, bits: int, packed: U8, words: UInt64Array) -> None:
    """Up to 7 codes behind the first n are written too."""
    size, count = (n * bits + 7) // 8, (n + 7) // 8
    for i in range(size):
        packed[i] = source[first + np.uint64(i)]
    for i in range(size, count * bits):
        packed[i] = 0
    for j in range(count):
        word = np.uint64(0)
        for k in range(bits):
            word |= np.uint64(packed[j * bits + k]) << np.uint64(8 * k)
        words[j] = _spread(word, np.uint64(bits))


# --- all blocks


@exact
def _compress(
    x: F32, e: F32, has_residual: bool, own: Places, keys: UInt64Array, how: _How, table: F32, scales: F32, out: U8
) -> None:
    kind, levels, bits, squared, is_given = how
    starts, homes, lengths, byte_starts = own
    c, u = np.empty(_SLICE, np.float32), np.full(_SLICE, np.float32(0.5))
    folded, largest = np.empty(_SLICE, np.float64), np.empty(1, np.float32)
    ratio, inverse_step = np.empty(_SLICE, np.float32), np.empty(_SLICE, np.float32)
    codes, packed = np.zeros(_SLICE, np.int8), np.empty(_SLICE, np.uint8)
    c_bits, largest_bits, words = c.view(np.int32), largest.view(np.int32), codes.view(np.uint64)
    steps = (ratio, ratio.view(np.int32), inverse_step, inverse_step.view(np.int32))
    has_keys = keys.size > 0
    tie = np.int32(0 if has_keys else 1)  # to the nearest level, half to even: a draw of one half, and up from odd ones
    for b in range(lengths.size):
        start, home, length = starts[b], homes[b], lengths[b]
        if not is_given:
            total, largest_bits[0] = 0.0, 0
            for a in range(0, length, _SLICE):
                n = min(_SLICE, length - a)
                _correct(x, np.uint64(start + a), e, np.uint64(home + a), has_residual, n, c)
                if squared:
                    total += _sum_squares(c, n, folded)
                else:
                    largest_bits[0] = max(largest_bits[0], _largest_bits(c_bits, n))
            scales[b] = _scale_of(kind, np.float32(math.sqrt(total)) if squared else largest[0], levels)
        scale = scales[b]
        for a in range(0, length, _SLICE):
            n = min(_SLICE, length - a)
            if is_given or length > _SLICE:  # else it is still there
                _correct(x, np.uint64(start + a), e, np.uint64(home + a), has_residual, n, c)
            if np.float32(0.0) < scale <= _LARGEST:
                if has_keys:
                    _draw(keys[b], a, n, u)
                if kind == _LEVELS:
                    _encode_levels(c, u, n, scale, levels, tie, codes)
                elif kind == _FLOAT8:
                    _encode_float8(c, c_bits, u, n, scale, tie, codes, steps)
                else:
                    _encode_natural(c, c_bits, u, n, scale, codes)
            else:
                _clear(codes, 0, n)
            if has_residual and abs(scale) <= _LARGEST:
                _leave(c, codes, n, scale, table, e, np.uint64(home + a))
            first = np.uint64(byte_starts[b] + a * bits // 8)
            _clear(codes, n, (n + 7) // 8 * 8)
            if bits == 8:
                _pack_bytes(codes, n, out, first)
            elif bits == 4:
                _pack_halves(codes, n, out, first)
            else:
                _pack_words(words, n, bits, packed, out, first)


@exact
def _put(
    codes: I8, first: np.uint64, n: int, scale: np.float32, table: F32, add: bool, out: F32, start: np.uint64
) -> None:
    has_table = table.size > 0
    for i in range(n):
        code = codes[first + np.uint64(i)]
        value = scale * (table[np.uint8(code)] if has_table else np.float32(code))
        out[start + np.uint64(i)] = out[start + np.uint64(i)] + value if add else value


@exact
def _decompress(
    source: U8, scales: F32, own: Places, bits: int, table: F32, alpha: np.float32, add: bool, out: F32
) -> None:
    starts, lengths, byte_starts = own
    codes, packed = np.empty(_SLICE, np.int8), np.empty(_SLICE, np.uint8)
    words, whole_bytes = codes.view(np.uint64), source.view(np.int8)
    for b in range(lengths.size):
        scale = np.float32(scales[b] * alpha)
        for a in range(0, lengths[b], _SLICE):
            n = min(_SLICE, lengths[b] - a)
            first, start = np.uint64(byte_starts[b] + a * bits // 8), np.uint64(starts[b] + a)
            if bits == 8:
                _put(whole_bytes, first, n, scale, table, add, out, start)
                continue
            if bits == 4:
                _unpack_halves(source, first, n, codes)
            else:
                _unpack_words(source, first, n, bits, packed, words)
            _put(codes, np.uint64(0), n, scale, table, add, out, start)


# --- tensors


_NO_VALUES, _NO_KEYS = np.zeros(0, np.float32), np.zeros(0, np.uint64)
_KINDS = {
    "levels": (_LEVELS, _NO_VALUES),
    "float8": (_FLOAT8, float8_values().numpy()),
    "natural": (_NATURAL, natural_values().numpy()),
}


def byte_starts(blocks: Blocks, bits: int) -> Int64Array:
    """(B,) where each block's codes begin."""
    sizes = (blocks.lengths * bits + 7) // 8
    return np.asarray(np.cumsum(sizes) - sizes, dtype=np.int64)


def compress_(
    x: Tensor,
    residual: Tensor | None,
    blocks: Blocks,
    scales: Tensor,
    codes: Tensor,
    *,
    kind: str,
    levels: int = 1,
    bits: int = 8,
    squared: bool = False,
    stochastic: bool = True,
    is_given: bool = False,
) -> None:
    """Scales of c = x + residual unless they `is_given`, codes of c / scale, and residual <- c - what they stand for.

    kind: "levels", round(c / scale) in `bits` bits, scale = norm / levels with the L2 norm if `squared`, or else the largest
    magnitude; "float8", e4m3 patterns, scale = max|c| / levels; "natural", powers of two as scales, signs and exponents below
    the scale's as codes. A block that is not finite gets scale NaN, and keeps its residual.
    """
    number, table = _KINDS[kind]
    e = _NO_VALUES if residual is None else residual.numpy()
    keys = blocks.keys if stochastic and blocks.keys is not None else _NO_KEYS
    own = (blocks.starts, blocks.homes, blocks.lengths, byte_starts(blocks, bits))
    how = (number, np.float32(levels), bits, squared, is_given)
    _compress(x.numpy(), e, residual is not None, own, keys, how, table, scales.numpy(), codes.numpy())


def decompress_(
    codes: Tensor, scales: Tensor, blocks: Blocks, out: Tensor, *, kind: str, bits: int = 8, alpha: float, add: bool
) -> None:
    """out <- (alpha * scale) * what a code stands for, or out <- out + that, at the blocks' starts."""
    _, table = _KINDS[kind]
    own = (blocks.starts, blocks.lengths, byte_starts(blocks, bits))
    _decompress(codes.numpy(), scales.numpy(), own, bits, table, np.float32(alpha), add, out.numpy())
