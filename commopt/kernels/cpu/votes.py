"""Votes on a CPU: signs to bits with a coin for zeros, and counts back to values; numba, block after block in the order of memory.

Magnitudes are compared as bit patterns, which are ordered as they are, with inf and NaN above all others.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from commopt.kernels.cpu.compiled import F32, I32, U8, Bool, Places, exact, fast, fma, from_nearer
from commopt.wire.bucket import Blocks, UInt64Array, kept

_ALL_BUT_SIGN, _INFINITE = np.int32(0x7FFFFFFF), np.int32(0x7F800000)
_NOTHING, _NONE = np.zeros(0, np.float32), np.iinfo(np.int64).max
Tossed = tuple[UInt64Array, U8]
Weights = tuple[np.float32, np.float32]  # see `from_nearer`
_GOLDEN, _FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
# (256,) u64: the eight bits of a byte as eight bytes of 0 or 1, the most significant bit first
_OCTETS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).copy().view(np.uint64).reshape(-1)


@fast
def _bounds(x: I32) -> Any:
    smallest, largest = _ALL_BUT_SIGN, np.int32(0)
    for i in range(x.size):
        size = np.int32(x[i] & _ALL_BUT_SIGN)
        smallest, largest = min(smallest, size), max(largest, size)
    return smallest, largest


@fast
def _note(x: I32, zeros: bool, noted: U8) -> None:
    for i in range(x.size):
        noted[i] = np.uint8((x[i] & _ALL_BUT_SIGN) == np.int32(0) if zeros else x[i] > np.int32(0))


@fast
def _byte_of(octets: UInt64Array, j: int) -> Any:
    # eight bytes of 0 or 1 become the top byte of the product, the first one its highest bit
    return np.uint8((octets[j] * np.uint64(0x8040201008040201)) >> np.uint64(56))


@fast
def _coin_word(key: np.uint64, j: int) -> Any:
    z = key + np.uint64(j + 1) * _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * _FIRST
    z = (z ^ (z >> np.uint64(27))) * _SECOND
    return z ^ (z >> np.uint64(31))


@fast
def _key(words: UInt64Array, parameter: int, place: int) -> Any:
    z = words[0 if words.size == 1 else parameter] + np.uint64(place + 1) * _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * _FIRST
    z = (z ^ (z >> np.uint64(27))) * _SECOND
    return z ^ (z >> np.uint64(31))


@fast
def _coins(key: np.uint64, flip: np.uint8, j: int) -> Any:
    """Byte j of a block's coins, of which each word has eight."""
    return np.uint8((_coin_word(key, j // 8) >> np.uint64(8 * (j % 8))) & np.uint64(255)) ^ flip


@exact
def _blend(x: F32, start: np.uint64, s: F32, home: np.uint64, n: int, weights: Weights, c: F32) -> None:
    """c <- s + weight (x - s)"""
    weight, share = weights
    for i in range(n):
        own, given = s[home + np.uint64(i)], x[start + np.uint64(i)]
        c[i] = fma(share, given - own, given if share != weight else own)


@exact
def _follow(s: F32, home: np.uint64, x: F32, start: np.uint64, n: int, weights: Weights) -> None:
    """s <- s + weight (x - s)"""
    weight, share = weights
    for i in range(n):
        own, given = s[home + np.uint64(i)], x[start + np.uint64(i)]
        s[home + np.uint64(i)] = fma(share, given - own, given if share != weight else own)


@fast
def _pack(x: F32, own: Places, tossed: Tossed, bits: U8, state: F32, weights: Weights, is_bad: Bool) -> None:
    starts, homes, lengths, parameters, places, byte_starts, _ = own
    words, flips = tossed
    longest = (lengths.max() + 7) // 8 * 8 if lengths.size else 0
    noted, blended = np.empty(longest, np.uint8), np.empty(longest, np.float32)
    octets, signs, given = noted.view(np.uint64), blended.view(np.int32), x.view(np.int32)
    for b in range(lengths.size):
        n, part = lengths[b], signs[: lengths[b]]
        if state.size:
            _blend(x, np.uint64(starts[b]), state, np.uint64(homes[b]), n, weights, blended)
        else:
            part = given[starts[b] : starts[b] + n]
        n_bytes = (n + 7) // 8
        row = bits[byte_starts[b] : byte_starts[b] + n_bytes]
        noted[n : 8 * n_bytes] = 0
        _note(part, False, noted)
        for j in range(n_bytes):
            row[j] = _byte_of(octets, j)
        smallest, largest = _bounds(part)
        if smallest == np.int32(0):
            _note(part, True, noted)
            key, flip = _key(words, parameters[b], places[b]), flips[0 if flips.size == 1 else parameters[b]]
            for j in range(n_bytes):
                row[j] |= _byte_of(octets, j) & _coins(key, flip, j)
        is_bad[b] = largest >= _INFINITE


@fast
def _toss(own: Places, tossed: Tossed, bits: U8) -> None:
    _, _, lengths, parameters, places, byte_starts, _ = own
    words, flips = tossed
    for b in range(lengths.size):
        key, flip = _key(words, parameters[b], places[b]), flips[0 if flips.size == 1 else parameters[b]]
        for j in range((lengths[b] + 7) // 8):
            bits[byte_starts[b] + j] = _coins(key, flip, j)


@fast
def _read_few(
    planes: U8, first: np.uint64, stride: np.uint64, n_octets: int, v: F32, out: F32, start: np.uint64
) -> None:
    """Counts of three bits at most, by choosing between eight values."""
    for j in range(n_octets):
        low, at = np.int32(planes[first + np.uint64(j)]), start + np.uint64(8 * j)
        middle = np.int32(planes[first + stride + np.uint64(j)])
        high = np.int32(planes[first + np.uint64(2) * stride + np.uint64(j)])
        for k in range(8):
            bit = np.int32(128 >> k)
            is_low, is_middle = (low & bit) != np.int32(0), (middle & bit) != np.int32(0)
            below = (v[3] if is_low else v[2]) if is_middle else (v[1] if is_low else v[0])
            above = (v[7] if is_low else v[6]) if is_middle else (v[5] if is_low else v[4])
            out[at + np.uint64(k)] = above if (high & bit) != np.int32(0) else below


@fast
def _read_one(planes: U8, first: np.uint64, n_octets: int, v: F32, out: F32, start: np.uint64) -> None:
    for j in range(n_octets):
        byte, at = np.int32(planes[first + np.uint64(j)]), start + np.uint64(8 * j)
        for k in range(8):
            out[at + np.uint64(k)] = v[1] if byte & np.int32(128 >> k) else v[0]


@fast
def _read(
    planes: U8, first: int, stride: int, width: int, begin: int, n: int, values: F32, out: F32, start: int, counts: U8
) -> None:
    """out <- values[count], for elements of a block from `begin`, which is a multiple of eight, to n."""
    octets = counts.view(np.uint64)
    for j in range(begin // 8, (n + 7) // 8):
        octets[j] = _OCTETS[planes[first + j]]
        for k in range(1, width):
            octets[j] += _OCTETS[planes[first + k * stride + j]] << np.uint64(k)
    for i in range(begin, n):
        out[start + i] = values[counts[i]]


@fast
def _unpack(
    planes: U8, width: int, own: Places, values: F32, out: F32, also: F32, state: F32, weights: Weights
) -> None:
    starts, homes, lengths, _, _, byte_starts, strides = own
    counts = np.empty((lengths.max() + 7) // 8 * 8 if lengths.size else 0, np.uint8)
    for b in range(lengths.size):
        n, start, first, stride = lengths[b], starts[b], byte_starts[b], strides[b]
        if state.size:
            _follow(state, np.uint64(homes[b]), out, np.uint64(start), n, weights)
        done = n // 8 * 8 if width == 1 or width == 3 else 0
        if width == 1:
            _read_one(planes, np.uint64(first), n // 8, values, out, np.uint64(start))
        elif width == 3:
            _read_few(planes, np.uint64(first), np.uint64(stride), n // 8, values, out, np.uint64(start))
        _read(planes, first, stride, width, done, n, values, out, start, counts)
        if also.size:
            for i in range(n):
                also[np.uint64(start) + np.uint64(i)] = out[np.uint64(start) + np.uint64(i)]


def pack_votes_(
    x: Tensor,
    parts: Sequence[Blocks],
    tossed: Tossed,
    row: Tensor,
    at: tuple[int, ...],
    state: Tensor | None = None,
    weight: float = 0.0,
) -> int:
    """Write a bit for each sign, 1 for x > 0, and for x = 0 the coin of its place, into messages behind headers of four bytes.

    Returns the first parameter with a NaN or an inf, or -1. tossed: `noise.words` of coins, one or (P,), and u8 likewise, 255 where they
    are turned over. at: where messages begin in the row. state: (elements,), for votes on s + weight (x - s).
    """
    own = _places(parts, tuple(place + 4 for place in at))
    is_bad = np.empty(len(own[0]), dtype=np.bool_)
    _pack(x.numpy(), own, tossed, row.numpy(), _array(state), from_nearer(weight), is_bad)
    return int(own[3][is_bad].min(initial=_NONE)) if is_bad.any() else -1


def toss_(blocks: Blocks, tossed: Tossed, bits: Tensor) -> None:
    """Write a fair bit for each element, as `reference.votes.coin_bits` of the blocks' keys."""
    _toss(_places([blocks], (0,)), tossed, bits.numpy())


def unpack_counts_(
    row: Tensor,
    at: tuple[int, ...],
    width: int,
    parts: Sequence[Blocks],
    values: Tensor,
    out: Tensor,
    also: Tensor | None = None,
    state: Tensor | None = None,
    weight: float = 0.0,
) -> None:
    """out <- values[count] at the blocks' starts; plane k of the `width` of a message holds bit k of each count.

    at: where messages begin in the row. values: (2^width,) f32, width at most 8. also: gets what out has. state: (elements,), becomes
    s + weight (out - s) before.
    """
    own = _places(parts, at)
    _unpack(row.numpy(), width, own, values.numpy(), out.numpy(), _array(also), _array(state), from_nearer(weight))


def _array(x: Tensor | None) -> F32:
    return _NOTHING if x is None else x.numpy()


def _places(parts: Sequence[Blocks], at: tuple[int, ...]) -> Places:
    """(B,) each, in the order of memory: starts, homes, lengths, parameters, what coins are named by, first byte, bytes of a plane."""

    def arrange() -> Places:
        columns = [
            (own.starts, own.homes, own.lengths, own.parameters, own.named, first + own.byte_starts)
            for own, first in zip(parts, at, strict=True)
        ]
        strides = np.repeat([own.sign_bytes for own in parts], [len(own) for own in parts])
        every = [*map(np.concatenate, zip(*columns, strict=True)), strides]
        order = np.argsort(every[0], kind="stable")
        return tuple(np.ascontiguousarray(column[order]) for column in every)

    by = [x for blocks in parts for x in (blocks.starts, blocks.homes, blocks.lengths, blocks.places)]
    return kept(parts[0].tables, ("votes", at), by, arrange)
