"""The block quantisers on a CPU: numba, a slice of at most 2,048 elements at a time, through buffers that stay in the cache.

Each loop does one thing, so that LLVM can vectorise it. No fast-math: codes, scales and residuals equal the plain kernels' bit for
bit, so no product may melt into a fused multiply-add, and the largest magnitude is found among bit patterns, which are ordered
as the magnitudes are, with inf and NaN above all others. All in one file: numba's cache would not notice that a function which a
kernel calls in another file has changed.

Inside the loop over blocks no reference is counted: that is done atomically, and for blocks of 256 cost as much as all arithmetic.
So there are neither slices nor views, and helpers hardly branch: numba counts the arguments of many a function that does. They
take whole arrays and where to begin, as an unsigned number, since LLVM does not vectorise what may be an index from the end.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from commopt.kernels.cpu.compiled import F32, F64, I8, I32, U8, Places, exact, fma
from commopt.wire.bucket import Int64Array, UInt64Array

_SLICE = 2048
_LARGEST, _SMALLEST = np.float32(np.finfo(np.float32).max), np.float32(2.0**-126)
LEVELS, FLOAT8, NATURAL = 0, 1, 2
# kind, levels, bits, squared, stochastic, is_given: see `quantize.compress_`
How = tuple[int, np.float32, int, bool, bool, bool]
# bits of a residual that is not plain, else 0; decay, share of `_blend`; what is stored in 16 and in 8 bits, scales and their places
Stored = tuple[int, np.float32, np.float32, NDArray[np.uint16], I8, F32, Int64Array]
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
def _mix(z: np.uint64) -> Any:
    z = (z ^ (z >> np.uint64(30))) * _FIRST
    z = (z ^ (z >> np.uint64(27))) * _SECOND
    return z ^ (z >> np.uint64(31))


@exact
def _draw(key: np.uint64, first: int, n: int, u: F32) -> None:
    """noise.uniform of n elements from `first` on."""
    counter = key + np.uint64(first + 1) * _GOLDEN
    for i in range(n):
        z = _mix(counter + np.uint64(i) * _GOLDEN)
        u[i] = np.float32(np.int32(z >> np.uint64(40))) * np.float32(2.0**-24)


@exact
def _scale_of(kind: int, norm: np.float32, levels: np.float32) -> Any:
    if not norm <= _LARGEST:
        return np.float32(np.nan)
    if kind == NATURAL:  # the power of two at or above the largest magnitude, where float32 has one
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


# --- residuals that are decayed, averaged, or stored in fewer bits; of blocks no longer than a slice


@exact
def _recall32(e: F32, home: np.uint64, n: int, old: F32) -> None:
    for i in range(n):
        old[i] = e[home + np.uint64(i)]


@exact
def _recall16(e: NDArray[np.uint16], home: np.uint64, n: int, old_bits: I32) -> None:
    for i in range(n):
        old_bits[i] = np.int32(np.uint32(e[home + np.uint64(i)]) << np.uint32(16))


@exact
def _recall8(e: I8, home: np.uint64, n: int, step: np.float32, old: F32) -> None:
    for i in range(n):
        old[i] = np.float32(e[home + np.uint64(i)]) * step


@exact
def _decay(old: F32, decay: np.float32, n: int, decayed: F32) -> None:
    for i in range(n):
        decayed[i] = old[i] * decay


@exact
def _blend(left: F32, old: F32, share: np.float32, n: int) -> None:
    """left <- average old + (1 - average) left; share: average, or from 1/2 on average - 1."""
    for i in range(n):
        left[i] = fma(share, old[i] - left[i], old[i] if share < np.float32(0.0) else left[i])


@exact
def _store32(new: F32, n: int, e: F32, home: np.uint64) -> None:
    for i in range(n):
        e[home + np.uint64(i)] = new[i]


@exact
def _store16(new_bits: I32, n: int, e: NDArray[np.uint16], home: np.uint64) -> None:
    for i in range(n):  # the nearest bfloat16
        bits = np.uint32(new_bits[i])
        e[home + np.uint64(i)] = np.uint16(
            (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        )


@exact
def _store8(new: F32, u: F32, n: int, step: np.float32, e: I8, home: np.uint64) -> None:
    inverse = np.float32(1.0) / step if step > np.float32(0.0) else np.float32(0.0)
    inverse = inverse if inverse <= _LARGEST else np.float32(0.0)
    for i in range(n):
        level = np.floor(new[i] * inverse + u[i])
        e[home + np.uint64(i)] = np.int8(np.int32(min(max(level, np.float32(-127.0)), np.float32(127.0))))


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


# --- all blocks


@exact
def compress(
    x: F32,
    e: F32,
    has_residual: bool,
    stored: Stored,
    places: Places,
    keys: UInt64Array,
    how: How,
    table: F32,
    scales: F32,
    out: U8,
) -> None:
    kind, levels, bits, squared, stochastic, is_given = how
    storage, decay, share, e16, e8, store_scales, slots = stored
    starts, homes, lengths, scale_places, byte_starts = places
    c, u = np.empty(_SLICE, np.float32), np.full(_SLICE, np.float32(0.5))
    folded, largest = np.empty(_SLICE, np.float64), np.empty(1, np.float32)
    ratio, inverse_step = np.empty(_SLICE, np.float32), np.empty(_SLICE, np.float32)
    old, left = np.empty(_SLICE, np.float32), np.empty(_SLICE, np.float32)
    codes, packed = np.zeros(_SLICE, np.int8), np.empty(_SLICE, np.uint8)
    c_bits, largest_bits, words = c.view(np.int32), largest.view(np.int32), codes.view(np.uint64)
    old_bits, left_bits = old.view(np.int32), left.view(np.int32)
    steps = (ratio, ratio.view(np.int32), inverse_step, inverse_step.view(np.int32))
    has_keys = stochastic and keys.size > 0
    tie = np.int32(0 if has_keys else 1)  # to the nearest level, half to even: a draw of one half, and up from odd ones
    rest = left if storage else e
    for b in range(lengths.size):
        start, home, length, scale_place = starts[b], homes[b], lengths[b], scale_places[b]
        at_home = np.uint64(home)
        if storage:
            home = 0
            if storage == 8:
                _recall8(e8, at_home, length, store_scales[slots[b]], old)
            elif storage == 16:
                _recall16(e16, at_home, length, old_bits)
            else:
                _recall32(e, at_home, length, old)
            _decay(old, decay, length, left)
        if not is_given:
            total, largest_bits[0] = 0.0, 0
            for a in range(0, length, _SLICE):
                n = min(_SLICE, length - a)
                _correct(x, np.uint64(start + a), rest, np.uint64(home + a), has_residual, n, c)
                if squared:
                    total += _sum_squares(c, n, folded)
                else:
                    largest_bits[0] = max(largest_bits[0], _largest_bits(c_bits, n))
            scales[scale_place] = _scale_of(kind, np.float32(math.sqrt(total)) if squared else largest[0], levels)
        scale = scales[scale_place]
        for a in range(0, length, _SLICE):
            n = min(_SLICE, length - a)
            if is_given or length > _SLICE:  # else it is still there
                _correct(x, np.uint64(start + a), rest, np.uint64(home + a), has_residual, n, c)
            if np.float32(0.0) < scale <= _LARGEST:
                if has_keys:
                    _draw(keys[b], a, n, u)
                if kind == LEVELS:
                    _encode_levels(c, u, n, scale, levels, tie, codes)
                elif kind == FLOAT8:
                    _encode_float8(c, c_bits, u, n, scale, tie, codes, steps)
                else:
                    _encode_natural(c, c_bits, u, n, scale, codes)
            else:
                _clear(codes, 0, n)
            if has_residual and abs(scale) <= _LARGEST:
                _leave(c, codes, n, scale, table, rest, np.uint64(home + a))
            first = np.uint64(byte_starts[b] + a * bits // 8)
            _clear(codes, n, (n + 7) // 8 * 8)
            if bits == 8:
                _pack_bytes(codes, n, out, first)
            elif bits == 4:
                _pack_halves(codes, n, out, first)
            else:
                _pack_words(words, n, bits, packed, out, first)
        if storage and abs(scale) <= _LARGEST:
            _blend(left, old, share, length)
            if storage == 8:
                largest_bits[0] = _largest_bits(left_bits, length)
                step = largest[0] / np.float32(127.0)
                store_scales[slots[b]] = step
                if keys.size > 0:
                    _draw(_mix(keys[b]), 0, length, u)
                _store8(left, u, length, step, e8, at_home)
            elif storage == 16:
                _store16(left_bits, length, e16, at_home)
            else:
                _store32(left, length, e, at_home)
