"""Votes on a CPU: signs to bits with a coin for zeros, and counts back to values; numba, one block at a time, the GIL is released.

Magnitudes are compared as bit patterns, which are ordered as they are, with inf and NaN above all others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from commopt.kernels.cpu.compiled import F32, I32, U8, Bool, Places, fast
from commopt.wire.bucket import Blocks, UInt64Array

_ALL_BUT_SIGN, _INFINITE = np.int32(0x7FFFFFFF), np.int32(0x7F800000)
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
def _pack(x: I32, own: Places, keys: UInt64Array, flips: U8, bits: U8, noted: U8, is_bad: Bool) -> None:
    starts, lengths, byte_starts = own
    octets = noted.view(np.uint64)
    for b in range(lengths.size):
        n = lengths[b]
        part = x[starts[b] : starts[b] + n]
        n_bytes = (n + 7) // 8
        row = bits[byte_starts[b] : byte_starts[b] + n_bytes]
        noted[n : 8 * n_bytes] = 0
        _note(part, False, noted)
        for j in range(n_bytes):
            row[j] = _byte_of(octets, j)
        smallest, largest = _bounds(part)
        if smallest == np.int32(0):
            _note(part, True, noted)
            word = np.uint64(0)
            for j in range(n_bytes):
                if j % 8 == 0:
                    word = _coin_word(keys[b], j // 8)
                coins = np.uint8((word >> np.uint64(8 * (j % 8))) & np.uint64(255)) ^ flips[b]
                row[j] |= _byte_of(octets, j) & coins
        is_bad[b] = largest >= _INFINITE


@fast
def _unpack(
    planes: U8, width: int, own: Places, values: F32, out: F32, octets: UInt64Array, counts: UInt64Array
) -> None:
    starts, lengths, byte_starts = own
    row_bytes = planes.size // width
    each = counts.view(np.uint8)
    for b in range(lengths.size):
        n, first = lengths[b], byte_starts[b]
        n_bytes = (n + 7) // 8
        for j in range(n_bytes):
            counts[j] = octets[planes[first + j]]
        for k in range(1, width):
            row = planes[k * row_bytes + first : k * row_bytes + first + n_bytes]
            for j in range(n_bytes):
                counts[j] += octets[row[j]] << np.uint64(k)
        part = out[starts[b] : starts[b] + n]
        for i in range(n):
            part[i] = values[each[i]]


def pack_votes_(x: Tensor, blocks: Blocks, flips: NDArray[np.uint8], bits: Tensor) -> Tensor:
    """Write a bit for each sign, 1 for x > 0, and the block's coin, turned over where flips is 255, for x = 0.

    Returns (B,) bool: which blocks hold a NaN or an inf. blocks: with keys; flips: (B,) u8, 0 or 255; bits: (sign_bytes,) u8.
    """
    assert blocks.keys is not None
    is_bad = np.empty(len(blocks), dtype=np.bool_)
    noted = np.empty(_padded(blocks), dtype=np.uint8)
    own = (blocks.starts, blocks.lengths, blocks.byte_starts)
    _pack(x.numpy().view(np.int32), own, blocks.keys, flips, bits.numpy(), noted, is_bad)
    return torch.from_numpy(is_bad)


def unpack_counts_(planes: Tensor, width: int, blocks: Blocks, values: Tensor, out: Tensor) -> None:
    """out <- values[count] at the blocks' starts; plane k of `width`, one behind the other, holds bit k of each count.

    planes: (width * sign_bytes,) u8, width at most 8; values: (2^width,) f32.
    """
    counts = np.empty(_padded(blocks) // 8, dtype=np.uint64)
    own = (blocks.starts, blocks.lengths, blocks.byte_starts)
    _unpack(planes.numpy(), width, own, values.numpy(), out.numpy(), _OCTETS, counts)


def _padded(blocks: Blocks) -> int:
    """Elements of the longest block, in whole bytes of bits."""
    return int(blocks.lengths.max(initial=0) + 7) // 8 * 8
