"""Indices to bits and back in plain torch: the oracle of the fast kernels, and what runs on devices without one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from commopt.kernels.reference.runs import bits_of_bytes, bytes_of_bits
from commopt.wire.bucket import Int64Array


@dataclass(frozen=True)
class _Entries:
    """For each of the (sum of ks,) entries, facts about its block, and its number i in it."""

    block: Tensor
    i: Tensor
    n: Tensor
    width: Tensor  # bits of its low part
    start: Tensor  # the first bit of the block's code
    high_start: Tensor  # where its high part begins
    coded: Tensor  # bool: false where the block needs no code

    @classmethod
    def of(
        cls, ns: Int64Array, ks: Int64Array, widths: Int64Array, sizes: Int64Array, device: torch.device
    ) -> _Entries:
        starts = 8 * (np.cumsum(sizes) - sizes)
        i = np.arange(int(ks.sum())) - np.repeat(np.cumsum(ks) - ks, ks)
        of_block = (np.arange(len(ks)), ns, widths, starts, starts + ks * widths)
        block, n, width, start, high_start = (torch.from_numpy(np.repeat(x, ks)).to(device) for x in of_block)
        coded = torch.from_numpy(np.repeat(sizes > 0, ks)).to(device)
        return cls(block, torch.from_numpy(i).to(device), n, width, start, high_start, coded)

    def are_valid(self, x: Tensor) -> bool:
        """Whether each block's indices ascend without repeats in [0, n)."""
        ascending = (x[1:] > x[:-1]) | (self.block[1:] != self.block[:-1])
        return bool(ascending.all() & (x >= 0).all() & (x < self.n).all())


def encode_(
    indices: Tensor, ns: Int64Array, ks: Int64Array, widths: Int64Array, sizes: Int64Array, out: Tensor
) -> bool:
    """Write the code of each block's indices; False if some are not ascending, repeated or outside [0, n)."""
    entries = _Entries.of(ns, ks, widths, sizes, out.device)
    if not entries.are_valid(indices):
        return False
    rest = indices - entries.i
    high = entries.high_start + (rest >> entries.width) + entries.i
    ones = [high[entries.coded]]
    for j in range(max(widths, default=0)):
        is_one = (entries.width > j) & (rest >> j & 1 == 1)
        ones.append((entries.start + entries.i * entries.width + j)[is_one & entries.coded])
    bits = torch.zeros(8 * out.numel(), dtype=torch.uint8, device=out.device)
    bits[torch.cat(ones)] = 1
    out.copy_(bytes_of_bits(bits, first_is_lowest=True))
    return True


def decode(code: Tensor, ns: Int64Array, ks: Int64Array, widths: Int64Array, sizes: Int64Array) -> Tensor | None:
    """(sum of ks,) i64: the indices of all blocks; None if some block is not the code of any."""
    entries = _Entries.of(ns, ks, widths, sizes, code.device)
    bits = bits_of_bytes(code, first_is_lowest=True)
    block_of_byte = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)).to(code.device)
    high_starts = torch.from_numpy(8 * (np.cumsum(sizes) - sizes) + ks * widths).to(code.device)

    ones = bits.nonzero().view(-1)
    block = block_of_byte[ones >> 3]
    in_high = ones >= high_starts[block]
    if not torch.equal(block[in_high], entries.block[entries.coded]):  # one for each entry of each block
        return None
    rest = torch.zeros_like(entries.i)
    rest[entries.coded] = (
        ones[in_high] - (entries.high_start + entries.i)[entries.coded] << entries.width[entries.coded]
    )
    for j in range(max(widths, default=0)):
        has_bit = entries.width > j
        place = (entries.start + entries.i * entries.width + j)[has_bit]
        rest[has_bit] |= bits[place].long() << j
    x = rest + entries.i
    return x if entries.are_valid(x) else None
