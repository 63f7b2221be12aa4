"""Votes in plain torch: the oracle of the fast kernels, what runs on devices without one, and what needs no kernel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from commopt.kernels.reference.runs import bad_runs, corrected, element_indices, packed, put_, unpacked
from commopt.wire import noise
from commopt.wire.bucket import Blocks


def pack_votes_(x: Tensor, blocks: Blocks, flips: NDArray[np.uint8], bits: Tensor) -> Tensor:
    """See `kernels.cpu.votes.pack_votes_`."""
    values = corrected(x, None, blocks)
    zeros = packed(values.eq(0), blocks.lengths)
    bits.copy_(packed(values > 0, blocks.lengths) | zeros & coin_bits(blocks, flips, x.device))
    return bad_runs(values, blocks.lengths)


def unpack_counts_(planes: Tensor, width: int, blocks: Blocks, values: Tensor, out: Tensor) -> None:
    """See `kernels.cpu.votes.unpack_counts_`."""
    digits = [unpacked(row, blocks.lengths).long() << k for k, row in enumerate(planes.view(width, -1))]
    put_(values[torch.stack(digits).sum(0)], blocks, out, add=False)


def coin_bits(blocks: Blocks, flips: NDArray[np.uint8], device: torch.device) -> Tensor:
    """(sign_bytes,) u8: one fair bit for each element, from the blocks' keys, inverted where flips is 255.

    64 elements of a block take the 64 bits of one mixed counter; its lowest byte comes first.
    """
    assert blocks.keys is not None
    n_bytes = (blocks.lengths + 7) // 8
    words = (n_bytes + 7) // 8
    of_words = noise.bits(blocks.keys, words).astype("<u8").view(np.uint8)
    kept = element_indices(8 * (np.cumsum(words) - words), n_bytes, torch.device("cpu")).numpy()
    return torch.from_numpy(of_words[kept] ^ np.repeat(flips, n_bytes)).to(device)


def count_votes(rows: Sequence[Tensor], width: int, start: int = 0) -> list[Tensor]:
    """start + how many of the rows have each bit set, as `width` planes: bit k of every count is in plane k.

    A ripple-carry adder whose wires are rows of bits: eight elements to the byte, no element is ever unpacked.
    rows: each (n,) u8; start + len(rows) must be below 2^width.
    """
    planes = [torch.full_like(rows[0], 255 if start >> k & 1 else 0) for k in range(width)]
    carry, spare = torch.empty_like(rows[0]), torch.empty_like(rows[0])
    for row in rows:
        carry.copy_(row)
        for plane in planes:
            torch.bitwise_and(plane, carry, out=spare)
            plane ^= carry
            carry, spare = spare, carry
    return planes
