"""Indices to bits and back in plain torch: the oracle of the fast kernels, and what runs on devices without one."""

import numpy as np
import torch
from torch import Tensor

from commopt.kernels.reference.runs import bits_of_bytes, bytes_of_bits
from commopt.wire.bucket import Int64Array

MAX_N = 2**40


def widths_and_sizes(ns: Int64Array, ks: Int64Array) -> tuple[Int64Array, Int64Array]:
    """(B,) the width l of the low part of each block's code, and (B,) its bytes."""
    if ns.shape != ks.shape or ns.ndim != 1 or not ((ks >= 0) & (ks <= ns) & (ns <= MAX_N)).all():
        raise ValueError(f"wanted 0 <= k <= n <= 2**40 for each block, got ns {ns}, ks {ks}")
    is_known = (ks == 0) | (ks == ns)
    # k l + k + ((n - k) >> l) is convex in l: one more bit costs k and saves half of (n - k) >> l, rounded up
    widths = np.maximum(_bit_lengths(ns - ks) - _bit_lengths(2 * ks), 0)
    widths += (ns - ks) >> widths > 2 * ks
    bits = ks * widths + ks + (ns - ks >> widths)
    return np.where(is_known, 0, widths), np.where(is_known, 0, bits + 7 >> 3)


def _bit_lengths(x: Int64Array) -> Int64Array:
    return np.frexp(x.astype(np.float64))[1].astype(np.int64)  # exact below 2**53


def _entries(
    ns: Int64Array, ks: Int64Array, widths: Int64Array, sizes: Int64Array, device: torch.device
) -> tuple[Tensor, ...]:
    """(sum of ks,) each: an entry's number i in its block, the block's number, n, bits of a low part, first bits of both, is it coded."""
    starts = 8 * (np.cumsum(sizes) - sizes)
    i = np.arange(int(ks.sum())) - np.repeat(np.cumsum(ks) - ks, ks)
    of_block = (np.arange(len(ks)), ns, widths, starts, starts + ks * widths, sizes > 0)
    return tuple(torch.from_numpy(x).to(device) for x in (i, *(np.repeat(x, ks) for x in of_block)))


def _are_valid(x: Tensor, block: Tensor, n: Tensor) -> bool:
    """Whether each block's indices ascend without repeats in [0, n)."""
    ascending = (x[1:] > x[:-1]) | (block[1:] != block[:-1])
    return bool(ascending.all() & (x >= 0).all() & (x < n).all())


def encode_(
    indices: Tensor, ns: Int64Array, ks: Int64Array, widths: Int64Array, sizes: Int64Array, out: Tensor
) -> bool:
    """Write the code of each block's indices; False if some are not ascending, repeated or outside [0, n)."""
    i, block, n, width, start, high_start, is_coded = _entries(ns, ks, widths, sizes, out.device)
    if not _are_valid(indices, block, n):
        return False
    rest = indices - i
    ones = [(high_start + (rest >> width) + i)[is_coded]]
    for j in range(max(widths, default=0)):
        is_one = (width > j) & (rest >> j & 1 == 1)
        ones.append((start + i * width + j)[is_one & is_coded])
    bits = torch.zeros(8 * out.numel(), dtype=torch.uint8, device=out.device)
    bits[torch.cat(ones)] = 1
    out.copy_(bytes_of_bits(bits, first_is_lowest=True))
    return True


def decode(code: Tensor, ns: Int64Array, ks: Int64Array, widths: Int64Array, sizes: Int64Array) -> Tensor | None:
    """(sum of ks,) i64: the indices of all blocks; None if some block is not the code of any."""
    i, block, n, width, start, high_start, is_coded = _entries(ns, ks, widths, sizes, code.device)
    bits = bits_of_bytes(code, first_is_lowest=True)
    block_of_byte = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)).to(code.device)
    high_starts = torch.from_numpy(8 * (np.cumsum(sizes) - sizes) + ks * widths).to(code.device)

    ones = bits.nonzero().view(-1)
    block_of_one = block_of_byte[ones >> 3]
    in_high = ones >= high_starts[block_of_one]
    if not torch.equal(block_of_one[in_high], block[is_coded]):  # one for each entry of each block
        return None
    rest = torch.zeros_like(i)
    rest[is_coded] = ones[in_high] - (high_start + i)[is_coded] << width[is_coded]
    for j in range(max(widths, default=0)):
        has_bit = width > j
        rest[has_bit] |= bits[(start + i * width + j)[has_bit]].long() << j
    x = rest + i
    return x if _are_valid(x, block, n) else None
