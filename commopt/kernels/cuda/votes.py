"""Votes on a GPU, with the bits of `kernels.cpu.votes`: signs to bits with a coin for zeros, and counts back to values."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from commopt.kernels.cuda.pieces import ALL_BUT_SIGN, Pieces, corrected, drawn, keys_on, launch, piece
from commopt.wire.bucket import Blocks


@triton.jit
def _pack(
    x,
    places,
    within,
    keys,
    flips,
    count,
    bits,
    is_bad,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    p, live, start, home, n, block, codes = piece(places, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)
    c = corrected(x, x, start, home, n, i, False)
    key = tl.load(keys + block, mask=live, other=0)
    flip = tl.load(flips + block, mask=live, other=0).to(tl.int32)
    at = tl.load(within + p, mask=live, other=0)[:, None] + i[None, :]
    # 64 elements take the 64 bits of one word: its lowest byte comes first, and in it the highest bit
    coin = (drawn(key, at // 64) >> (8 * (at // 8 % 8) + 7 - at % 8).to(tl.uint64)).to(tl.int32) ^ flip[:, None]
    word = c.to(tl.int32, bitcast=True)
    vote = tl.where((word & ALL_BUT_SIGN) == 0, coin & 1, (word > 0).to(tl.int32))
    vote = tl.where(i[None, :] < n[:, None], vote, 0)
    packed = tl.sum(tl.reshape(vote, (ROWS, LENGTH // 8, 8)) * (128 >> tl.arange(0, 8))[None, None, :], 2)
    j = tl.arange(0, LENGTH // 8)[None, :]
    tl.store(bits + codes[:, None] + j, packed.to(tl.uint8), mask=j < ((n + 7) // 8)[:, None])
    largest = tl.max(word & ALL_BUT_SIGN, 1)
    tl.store(is_bad + block, tl.full((ROWS,), 1, tl.uint8), mask=live & (largest >= 0x7F800000))


@triton.jit
def _unpack(
    planes,
    row_bytes,
    places,
    count,
    values,
    out,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    p, live, start, home, n, block, codes = piece(places, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)
    inside = i[None, :] < n[:, None]
    votes = tl.zeros((ROWS, LENGTH), tl.int32)
    for k in tl.static_range(0, WIDTH):
        octets = tl.load(planes + k * row_bytes + codes[:, None] + (i // 8)[None, :], mask=inside, other=0)
        votes |= ((octets.to(tl.int32) >> (7 - i % 8)[None, :]) & 1) << k
    tl.store(out + start[:, None] + i[None, :], tl.load(values + votes), mask=inside)


def pack_votes_(x: Tensor, blocks: Blocks, flips: NDArray[np.uint8], bits: Tensor) -> Tensor:
    """See `kernels.cpu.votes.pack_votes_`."""
    assert blocks.keys is not None
    pieces, is_bad = Pieces.of(blocks, 1, x.device), torch.zeros(len(blocks), dtype=torch.uint8, device=x.device)
    drawn_by = (keys_on(blocks.keys, x.device), torch.from_numpy(flips).to(x.device))
    where = (pieces.places, pieces.within, *drawn_by, len(pieces), bits, is_bad)
    launch(_pack, pieces.grid, x, *where, **pieces.shape)
    return is_bad.bool()


def unpack_counts_(planes: Tensor, width: int, blocks: Blocks, values: Tensor, out: Tensor) -> None:
    """See `kernels.cpu.votes.unpack_counts_`."""
    pieces = Pieces.of(blocks, 1, out.device)
    where = (pieces.places, len(pieces), values, out)
    launch(_unpack, pieces.grid, planes, planes.numel() // width, *where, WIDTH=width, **pieces.shape)
