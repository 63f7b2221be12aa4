"""Votes on a GPU, with the bits of `kernels.cpu.votes`: signs to bits with a coin for zeros, counts, and counts back to values."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from commopt.kernels.cuda.pieces import (
    ALL_BUT_SIGN,
    Pieces,
    between,
    drawn,
    key_of,
    launch,
    note_bad,
    piece,
    values,
    within,
    words_of,
)
from commopt.wire.bucket import Blocks, Int64Array, kept
from commopt.wire.payload import Payload, row_of


@triton.jit
def _coins(word, words, flip, flips, columns, count, p, live, i, KEYS: tl.constexpr):
    """(ROWS, LENGTH) i32, 0 or 1: a fair coin for each element, turned over where flip is 1; `kernels.reference.votes.coin_bits`."""
    at = within(columns, count, p, live, i)
    # 64 elements take the 64 bits of one word: its lowest byte comes first, and in it the highest bit
    bits = drawn(key_of(word, words, columns, count, p, live, KEYS), at // 64)
    coin = (bits >> (8 * (at // 8 % 8) + 7 - at % 8).to(tl.uint64)).to(tl.int32) & 1
    turned = tl.zeros_like(p).to(tl.int32) + flip
    if KEYS == 2:
        parameter = tl.load(columns + 5 * count + p, mask=live, other=0)
        turned = tl.load(flips + parameter, mask=live, other=0).to(tl.int32)
    return coin ^ turned[:, None]


@triton.jit
def _store_bits(is_one, out, codes, n, ROWS: tl.constexpr, LENGTH: tl.constexpr):
    """Eight to the byte, the first one in the highest bit; is_one: (ROWS, LENGTH) i32, 0 or 1."""
    octets = tl.reshape(is_one, (ROWS, LENGTH // 8, 8)) * (128 >> tl.arange(0, 8))[None, None, :]
    j = tl.arange(0, LENGTH // 8)[None, :]
    tl.store(out + codes[:, None] + j, tl.sum(octets, 2).to(tl.uint8), mask=j < ((n + 7) // 8)[:, None])


@triton.jit(do_not_specialize=["word"])
def _pack(
    x,
    columns,
    count,
    word,
    words,
    flip,
    flips,
    bits,
    first,
    state,
    weight,
    IS_BLENDED: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    p, live, start, home, n, scale_at, codes = piece(columns, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)
    value = values(x, start, n, i)
    if IS_BLENDED:
        value = between(values(state, home, n, i), value, weight)
    c = value.to(tl.int32, bitcast=True)
    coin = _coins(word, words, flip, flips, columns, count, p, live, i, KEYS)
    vote = tl.where((c & ALL_BUT_SIGN) == 0, coin, (c > 0).to(tl.int32))
    _store_bits(tl.where(i[None, :] < n[:, None], vote, 0), bits, codes, n, ROWS, LENGTH)
    note_bad(first, live & (tl.max(c & ALL_BUT_SIGN, 1) >= 0x7F800000), columns, count, p)


@triton.jit(do_not_specialize=["word"])
def _count(
    bits,
    columns,
    count,
    ranks,
    stride,
    word,
    words,
    flip,
    flips,
    needed,
    base,
    row_bytes,
    out,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    p, live, start, home, n, scale_at, codes = piece(columns, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)
    inside = i[None, :] < n[:, None]
    votes = tl.zeros((ROWS, LENGTH), tl.int32)
    if KEYS > 0:  # one more voter decides ties
        votes += _coins(word, words, flip, flips, columns, count, p, live, i, KEYS)
    for rank in range(ranks):
        octets = tl.load(bits + (codes + rank * stride)[:, None] + (i // 8)[None, :], mask=inside, other=0)
        votes += (octets.to(tl.int32) >> (7 - i % 8)[None, :]) & 1
    at = codes - base
    for k in tl.static_range(WIDTH):
        is_one = (votes >= needed).to(tl.int32) if WIDTH == 1 else (votes >> k) & 1
        _store_bits(tl.where(inside, is_one, 0), out + k * row_bytes, at, n, ROWS, LENGTH)


@triton.jit
def _unpack(
    planes,
    columns,
    count,
    places,
    values,
    out,
    also,
    HAS_TWO: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    p, live, start, home, n, scale_at, codes = piece(columns, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)
    inside = i[None, :] < n[:, None]
    votes = tl.zeros((ROWS, LENGTH), tl.int32)
    for k in tl.static_range(WIDTH):
        at = tl.load(places + k * count + p, mask=live, other=0)
        octets = tl.load(planes + at[:, None] + (i // 8)[None, :], mask=inside, other=0).to(tl.int32)
        votes |= ((octets >> (7 - i % 8)[None, :]) & 1) << k
    value = tl.load(values + votes)
    tl.store(out + start[:, None] + i[None, :], value, mask=inside)
    if HAS_TWO:
        tl.store(also + start[:, None] + i[None, :], value, mask=inside)


def pack_all_(
    x: Tensor,
    payloads: Sequence[Payload],
    parts: Sequence[Blocks],
    flips: Int64Array,
    first: Tensor,
    blended: tuple[Tensor, float] | None = None,
) -> None:
    """`pack_votes_` of several messages behind their headers; first: (1,) i32, where bad blocks are noted (`note_bad`).

    flips: (1,) or (P,), 1 where coins are turned over, as many as the blocks have words. blended: a state and a weight, for votes on
    s + weight (x - s).
    """
    row, at = row_of(payloads)
    pieces = Pieces.of(parts, 1, x.device, [(0, place + 4) for place in at])
    tossed, keys = _tossed(parts[0], flips, x.device)
    state, weight = blended or (x, 0.0)
    flags = {"IS_BLENDED": blended is not None, "KEYS": keys, **pieces.shape}
    launch(_pack, pieces.grid, x, pieces.columns, len(pieces), *tossed, row, first, state, float(weight), **flags)


def count_all_(payloads: Sequence[Payload], blocks: Blocks, flips: Int64Array | None, width: int, out: Tensor) -> None:
    """out <- how many votes each element has, as `width` planes of bits; with width 1, whether it has most of them.

    payloads: of the ranks, with the same blocks. flips: as in `pack_all_`, if the coins of the blocks have a vote; else None.
    """
    row, at = row_of(payloads)
    pieces = Pieces.of([blocks], 1, row.device, [(0, at[0] + 4)])
    tossed, keys = _tossed(blocks, flips, row.device) if flips is not None else ((0, row, 0, row), 0)
    stride = at[1] - at[0] if len(at) > 1 else 0
    where = (
        pieces.columns,
        len(pieces),
        len(at),
        stride,
        *tossed,
        len(at) // 2 + 1,
        at[0] + 4,
        out.numel() // width,
        out,
    )
    launch(_count, pieces.grid, row, *where, WIDTH=width, KEYS=keys, **pieces.shape)


def unpack_all_(
    payloads: Sequence[Payload],
    parts: Sequence[Blocks],
    width: int,
    values: Tensor,
    out: Tensor,
    also: Tensor | None = None,
) -> None:
    """`unpack_counts_` of several messages, which have no header, into one tensor or two."""
    row, at = row_of(payloads)
    every = [
        Pieces.of(parts, 1, out.device, [(0, a + k * blocks.sign_bytes) for a, blocks in zip(at, parts, strict=True)])
        for k in range(width)
    ]
    codes = kept(parts[0].tables, "planes", every, lambda: torch.stack([pieces.columns[4] for pieces in every]))
    where = (every[0].columns, len(every[0]), codes, values, out, out if also is None else also)
    launch(_unpack, every[0].grid, row, *where, HAS_TWO=also is not None, WIDTH=width, **every[0].shape)


def _tossed(blocks: Blocks, flips: Int64Array, device: torch.device) -> tuple[tuple[int, Tensor, int, Tensor], int]:
    """Arguments of `_coins`, and which keys they are."""
    turned = torch.from_numpy(flips.astype("int32"))
    word, words, keys = words_of([blocks], turned)
    if keys == 2:
        return (0, words.to(device), 0, turned.to(device)), keys
    there = kept(blocks.tables, "no flips", (), lambda: torch.zeros(1, dtype=torch.int32, device=device))
    return (word, there, int(flips[0]), there), keys
