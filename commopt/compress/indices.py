"""Which k of n elements a sparse payload holds: ascending indices, in a number of bytes that every rank knows beforehand.

Elias-Fano codes (Elias 1974; Fano 1971) of what an index x_i, the i-th of its block, leaves after the i smaller ones:

    r_i  = x_i - i                                 in [0, n - k], ascending, possibly repeated
    low  = the l lower bits of each r_i            k l bits, one after the other
    high = ones at places (r_i >> l) + i           k + ((n - k) >> l) bits

with the l that makes the sum smallest: the smallest one with (n - k) >> l <= 2 k. With l = 0, from density 1/3 on,
this is the bitmap of n bits. None or all of the elements take no byte. So sizes follow from n and k alone: payloads need no
exchange of lengths. Bit j of a code is bit j % 8 of its byte j // 8, the lowest first; spare bits at the end are zero.

A code is within 0.6 bits an index of the entropy. Gaps in Rice codes take 0.4 bits less on average, but how much depends on the draw,
and the longest such code with parameter l is as long as Elias-Fano's, to the bit: where sizes have to be known beforehand nothing is
gained, and only Elias-Fano is decoded a word at a time.
"""

import numpy as np
import torch
from torch import Tensor

from commopt import kernels
from commopt.kernels.reference.indices import widths_and_sizes
from commopt.wire.bucket import Int64Array


def index_bytes(n: int, k: int) -> int:
    """Bytes of the code of k distinct indices in [0, n)."""
    return int(all_index_bytes(np.asarray([n]), np.asarray([k]))[0])


def all_index_bytes(ns: Int64Array, ks: Int64Array) -> Int64Array:
    """(B,) bytes of each block's code."""
    return widths_and_sizes(ns, ks)[1]


def encode_all(indices: Tensor, ns: Int64Array, ks: Int64Array) -> Tensor:
    """(sum of all_index_bytes(ns, ks),) u8: the codes of many blocks, one after the other, each starting at a byte.

    indices: (sum of ks,) i64, contiguous. Raises ValueError unless they ascend without repeats in [0, n) within each block.
    """
    widths, sizes = widths_and_sizes(ns, ks)
    _check("indices", indices, torch.int64, int(ks.sum()))
    out = torch.empty(int(sizes.sum()), dtype=torch.uint8, device=indices.device)
    if not kernels.of("indices", out.device).encode_(indices, ns, ks, widths, sizes, out):
        raise ValueError("indices must ascend without repeats in [0, n)")
    return out


def decode_all(code: Tensor, ns: Int64Array, ks: Int64Array) -> Tensor:
    """(sum of ks,) i64: the indices of many blocks. Raises ValueError if a block's bytes are not the code of any."""
    widths, sizes = widths_and_sizes(ns, ks)
    _check("code", code, torch.uint8, int(sizes.sum()))
    indices: Tensor | None = kernels.of("indices", code.device).decode(code, ns, ks, widths, sizes)
    if indices is None:
        raise ValueError("these bytes are not the code of any indices: they are damaged, or n or k is wrong")
    return indices


def _check(name: str, x: Tensor, dtype: torch.dtype, length: int) -> None:
    if x.dtype != dtype or x.shape != (length,) or not x.is_contiguous():
        raise ValueError(f"{name}: wanted ({length},) {dtype}, contiguous, got {tuple(x.shape)} {x.dtype}")
