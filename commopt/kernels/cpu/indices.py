"""Indices to bits and back on a CPU: numba, 64 bits of the unary part at a time; the GIL is released.

Bit i of a code is bit i % 8 of its byte i // 8, the lowest first, so that eight bytes are one little-endian word.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from commopt.kernels.cpu.compiled import U8, Places, fast
from commopt.wire.bucket import Int64Array

_DE_BRUIJN = 0x03F79D71B4CB0A89  # its 64 windows of six bits are all different
_PLACE_OF_BIT = np.zeros(64, dtype=np.int64)
_PLACE_OF_BIT[[(_DE_BRUIJN << i & 0xFFFFFFFFFFFFFFFF) >> 58 for i in range(64)]] = np.arange(64)


@fast
def _word(code: U8, byte: int) -> Any:
    """The 64 bits from this byte on; zeros beyond the end of the code."""
    word = np.uint64(0)
    if byte + 8 <= code.size:
        octet = code[byte : byte + 8]  # LLVM makes one load of these eight, but not of code[byte + j]
        for j in range(8):
            word |= np.uint64(octet[j]) << np.uint64(8 * j)
        return word
    for j in range(code.size - byte):
        word |= np.uint64(code[byte + j]) << np.uint64(8 * j)
    return word


@fast
def _encode_block(indices: Int64Array, n: int, width: int, code: U8) -> bool:
    code[:] = 0
    low_mask, high_start = (1 << width) - 1, indices.size * width
    last = -1
    for i in range(indices.size):
        x = indices[i]
        if x <= last or x >= n:
            return False
        last = x
        if code.size == 0:
            continue
        rest = x - i
        place = high_start + (rest >> width) + i
        code[place >> 3] |= np.uint8(1 << (place & 7))
        place = i * width
        low = (rest & low_mask) << (place & 7)
        for byte in range(place >> 3, place + width + 7 >> 3):
            code[byte] |= np.uint8(low & 255)
            low >>= 8
    return True


@fast
def _decode_block(code: U8, n: int, width: int, out: Int64Array, place_of_bit: Int64Array) -> bool:
    if code.size == 0:
        for i in range(out.size):
            out[i] = i
        return True
    low_mask, high_start = (1 << width) - 1, out.size * width
    byte = high_start >> 3
    word = _word(code, byte) >> np.uint64(high_start & 7) << np.uint64(high_start & 7)
    i, last = 0, -1
    while True:
        while word != np.uint64(0):
            if i == out.size:
                return False
            others = word & (word - np.uint64(1))  # all but the lowest one
            x = 8 * byte - high_start + place_of_bit[(word ^ others) * np.uint64(_DE_BRUIJN) >> np.uint64(58)]
            word = others
            if width:
                place = i * width
                low = np.int64(_word(code, place >> 3) >> np.uint64(place & 7)) & low_mask
                x = (x - i << width | low) + i
            if x <= last or x >= n:
                return False
            out[i] = last = x
            i += 1
        byte += 8
        if byte >= code.size:
            return i == out.size
        word = _word(code, byte)


@fast
def _encode(indices: Int64Array, own: Places, out: U8) -> bool:
    ns, ks, widths, sizes = own
    i = byte = 0
    for b in range(ns.size):
        if not _encode_block(indices[i : i + ks[b]], ns[b], widths[b], out[byte : byte + sizes[b]]):
            return False
        i += ks[b]
        byte += sizes[b]
    return True


@fast
def _decode(code: U8, own: Places, out: Int64Array, place_of_bit: Int64Array) -> bool:
    ns, ks, widths, sizes = own
    i = byte = 0
    for b in range(ns.size):
        part = out[i : i + ks[b]]
        if not _decode_block(code[byte : byte + sizes[b]], ns[b], widths[b], part, place_of_bit):
            return False
        i += ks[b]
        byte += sizes[b]
    return True


def encode_(
    indices: Tensor, ns: Int64Array, ks: Int64Array, widths: Int64Array, sizes: Int64Array, out: Tensor
) -> bool:
    """Write the code of each block's indices; False where some are not ascending, repeated or outside [0, n)."""
    return bool(_encode(indices.numpy(), (ns, ks, widths, sizes), out.numpy()))


def decode(code: Tensor, ns: Int64Array, ks: Int64Array, widths: Int64Array, sizes: Int64Array) -> Tensor | None:
    """(sum of ks,) i64: the indices of all blocks; None where some block is not the code of any."""
    out = torch.empty(int(ks.sum()), dtype=torch.int64)
    is_code = _decode(code.numpy(), (ns, ks, widths, sizes), out.numpy(), _PLACE_OF_BIT)
    return out if is_code else None
