"""Codes of the block quantisers to values on a CPU: numba, a slice of at most 2,048 elements at a time; see `quantize`."""

from typing import Any

import numpy as np

from commopt.kernels.cpu.compiled import F32, I8, U8, Places, exact
from commopt.wire.bucket import Int64Array, UInt64Array

_SLICE, _LARGEST = 2048, np.float32(np.finfo(np.float32).max)
PUT, ADD, SUM = 0, 1, 2  # SUM: add to zero what comes first, and what has the same place to that


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
def _zero(out: F32, start: np.uint64, n: int) -> None:
    for i in range(n):
        out[start + np.uint64(i)] = np.float32(0.0)


@exact
def decompress(
    source: U8, scales: F32, places: Places, bits: int, table: F32, alpha: np.float32, mode: int, out: F32
) -> None:
    starts, _, lengths, scale_places, byte_starts = places
    codes, packed = np.empty(_SLICE, np.int8), np.empty(_SLICE, np.uint8)
    words, whole_bytes = codes.view(np.uint64), source.view(np.int8)
    for b in range(lengths.size):
        scale, add = np.float32(scales[scale_places[b]] * alpha), mode != PUT
        if mode == SUM and (b == 0 or starts[b] != starts[b - 1]):
            _zero(out, np.uint64(starts[b]), lengths[b])
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


@exact
def spread(values: F32, factors: F32, starts: Int64Array, lengths: Int64Array, out: F32) -> None:
    at = np.uint64(0)
    for b in range(lengths.size):
        start, factor = np.uint64(starts[b]), factors[b]
        for i in range(lengths[b]):
            out[start + np.uint64(i)] = values[at + np.uint64(i)] * factor
        at += np.uint64(lengths[b])


@exact
def _leave_out(x: F32, start: np.uint64, q: F32, n: int, left: F32) -> None:
    for i in range(n):
        left[i] = x[start + np.uint64(i)] - q[i]


@exact
def _recall(e: F32, home: np.uint64, n: int, left: F32) -> None:
    for i in range(n):
        left[i] = e[home + np.uint64(i)]


@exact
def _products(left: F32, q: F32, n: int, over: float, squares: float) -> Any:
    """One after the other, on top of what there is: float sums depend on the order."""
    for i in range(n):
        over += np.float64(left[i]) * np.float64(q[i])
        squares += np.float64(q[i]) * np.float64(q[i])
    return over, squares


@exact
def _refit(left: F32, q: F32, n: int, less: np.float32, e: F32, home: np.uint64) -> None:
    for i in range(n):
        e[home + np.uint64(i)] = left[i] + less * q[i]


@exact
def fit(x: F32, e: F32, has_residual: bool, places: Places, bits: int, source: U8, scales: F32) -> None:
    starts, homes, lengths, scale_places, byte_starts = places
    codes, packed = np.empty(_SLICE, np.int8), np.empty(_SLICE, np.uint8)
    words, whole_bytes, none = codes.view(np.uint64), source.view(np.int8), np.empty(0, np.float32)
    q, left = np.empty(_SLICE, np.float32), np.empty(_SLICE, np.float32)
    for b in range(lengths.size):
        length, scale = lengths[b], scales[scale_places[b]]
        if not abs(scale) <= _LARGEST:
            continue
        over, squares, less = 0.0, 0.0, np.float32(0.0)
        for turn in range(2 if has_residual else 1):
            for a in range(0, length, _SLICE):
                n, first = min(_SLICE, length - a), np.uint64(byte_starts[b] + a * bits // 8)
                if turn == 0 or length > _SLICE:  # else it is still there
                    if bits == 8:
                        _put(whole_bytes, first, n, scale, none, False, q, np.uint64(0))
                    else:
                        _unpack_words(source, first, n, bits, packed, words)
                        _put(codes, np.uint64(0), n, scale, none, False, q, np.uint64(0))
                    if has_residual:
                        _recall(e, np.uint64(homes[b] + a), n, left)
                    else:
                        _leave_out(x, np.uint64(starts[b] + a), q, n, left)
                if turn == 0:
                    over, squares = _products(left, q, n, over, squares)
                else:
                    _refit(left, q, n, less, e, np.uint64(homes[b] + a))
            if turn == 0:
                factor = np.float32(1.0 + over / squares if squares > 0.0 else 1.0)
                scales[scale_places[b]], less = scale * factor, np.float32(1.0) - factor
