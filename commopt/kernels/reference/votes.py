"""Votes in plain torch: the oracle of the fast kernels, what runs on devices without one, and what needs no kernel."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from commopt.kernels.reference.runs import bad_runs, corrected, element_indices, first_bad, packed, put_, unpacked
from commopt.wire import noise
from commopt.wire.bucket import Blocks


def pack_votes_(
    x: Tensor,
    parts: Sequence[Blocks],
    tossed: tuple[NDArray[np.uint64], NDArray[np.uint8]],
    row: Tensor,
    at: tuple[int, ...],
    state: Tensor | None = None,
    weight: float = 0.0,
) -> int:
    """See `kernels.cpu.votes.pack_votes_`."""
    found = []
    for blocks, place in zip(parts, at, strict=True):
        values = corrected(x, None, blocks)
        if state is not None:
            values = state[element_indices(blocks.homes, blocks.lengths, x.device)].lerp(values, weight)
        zeros = packed(values.eq(0), blocks.lengths)
        bits = packed(values > 0, blocks.lengths) | zeros & coin_bits(*keyed(blocks, tossed), x.device)
        row[place + 4 :][: blocks.sign_bytes] = bits
        found.append(first_bad(bad_runs(values, blocks.lengths), blocks))
    return min((k for k in found if k >= 0), default=-1)


def keyed(blocks: Blocks, tossed: tuple[NDArray[np.uint64], NDArray[np.uint8]]) -> tuple[Blocks, NDArray[np.uint8]]:
    """The blocks with the keys of their coins, and (B,) u8: 255 where these are turned over."""
    words, flips = tossed
    own = words[blocks.parameters if len(words) > 1 else np.zeros_like(blocks.parameters)]
    keys = noise.mix(own + np.uint64(noise.GOLDEN) * (blocks.named.astype(np.uint64) + np.uint64(1)))
    return blocks.having(keys=keys), flips[blocks.parameters if len(flips) > 1 else np.zeros_like(blocks.parameters)]


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
    """See `kernels.cpu.votes.unpack_counts_`."""
    for blocks, place in zip(parts, at, strict=True):
        if state is not None:
            homes = element_indices(blocks.homes, blocks.lengths, out.device)
            state[homes] = state[homes].lerp(corrected(out, None, blocks), weight)
        planes = row[place:][: width * blocks.sign_bytes].view(width, -1)
        digits = [unpacked(plane, blocks.lengths).long() << k for k, plane in enumerate(planes)]
        for one in (out,) if also is None else (out, also):
            put_(values[torch.stack(digits).sum(0)], blocks, one, add=False)


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
