"""The elements that sparse messages hold, on a GPU: how many of each block, and where a message has them.

Kernels take entries, or bytes of codes, as they lie in the message, and search for the block of each. So no table has a number for each
entry. If only the GPU knows how many there are, it need not tell the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from commopt.kernels.cuda.pieces import Pieces, launch
from commopt.wire.bucket import Blocks, Int64Array, kept

PER_PROGRAM = 1024  # entries, or bytes, of a program


@dataclass(frozen=True)
class Entries:
    """How many elements of each block a message holds; or of each message's blocks, if messages lie one behind the other.

    table: (7, B) i64, by block: the entries up to its end, the bytes of the codes of their places, of their signs, and the entries that
    are coded; the width of the codes' low parts (`compress.indices`), how long the block is, and its own entries. count, code_bytes,
    sign_bytes: of all. messages: how many there are.
    """

    table: Tensor
    count: int
    code_bytes: int
    sign_bytes: int
    messages: int = 1

    @classmethod
    def of(
        cls,
        ks: Tensor,
        lengths: Tensor,
        totals: tuple[int, int, int] | Callable[[Tensor], tuple[int, int, int]] | None = None,
        ends: Tensor | None = None,
    ) -> Entries:
        """Of N messages of the same blocks.

        ks: (N B,) integers, -1 - k for bad blocks; with `ends`, (B,) i64, each block's are the difference of two of them.
        lengths: (B,) i64. totals: what the messages' sizes are, or find out from the table; else the host reads them.
        """
        count = len(ks) if ends is None else len(ends)
        table = torch.empty(7, count, dtype=torch.int64, device=ks.device)
        what = (ks, lengths if ends is None else ends, lengths, count, len(lengths), table)
        launch(_sizes, (triton.cdiv(count, PER_PROGRAM),), *what, HAS_ENDS=ends is not None, SIZE=PER_PROGRAM)
        table[:4].cumsum_(1)
        if totals is None:
            totals = tuple(table[:3, -1].tolist()) if count else (0, 0, 0)
        elif callable(totals):
            totals = totals(table)
        return cls(table, *totals, count // max(1, len(lengths)))

    @classmethod
    def known(
        cls,
        blocks: Blocks,
        key: object,
        sizes: Callable[[], tuple[Int64Array, int]],
        device: torch.device,
        messages: int = 1,
    ) -> Entries:
        """Of messages whose sizes follow from `key`; made once. sizes(): (B,) elements of each block, and the bytes of their places."""

        def find() -> Entries:
            ks, code_bytes = sizes()
            totals = (int(ks.sum()) * messages, code_bytes * messages, int((ks + 7 >> 3).sum()) * messages)
            return cls.of(torch.from_numpy(np.tile(ks, messages)).to(device), lengths_of(blocks, device), totals)

        return kept(blocks.tables, ("entries", key, messages), (), find)

    def __len__(self) -> int:
        return self.table.shape[1]

    @property
    def where(self) -> tuple[Tensor, int]:
        """What kernels take: the table, and how many blocks it has."""
        return self.table, len(self)

    @property
    def ks(self) -> Tensor:
        """(B,) i64: the entries of each block."""
        return self.table[6]

    @property
    def ends(self) -> Tensor:
        """(B,) i64: the entries up to each block's end."""
        return self.table[0]

    @property
    def steps(self) -> int:
        """Of a search for a block."""
        return len(self).bit_length()


def pieces_of(blocks: Blocks, device: torch.device) -> Pieces:
    """The pieces of some blocks, of which a piece's scale is its block's number."""
    return Pieces.of([blocks], 1, device, ((0, 0),))


def lengths_of(blocks: Blocks, device: torch.device) -> Tensor:
    """(B,) i64"""
    return pieces_of(blocks, device).sizes


@triton.jit
def _sizes(ks, ends, lengths, count, blocks, table, HAS_ENDS: tl.constexpr, SIZE: tl.constexpr):
    """`kernels.reference.indices.widths_and_sizes`; one more bit for the low part as long as it saves any."""
    b = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    live = b < count
    n = tl.load(lengths + b % blocks, mask=live, other=0)
    if HAS_ENDS:
        first, end = span(ends, b, live)
        k = tl.load(ks + end, mask=live, other=0) - tl.load(ks + first, mask=live, other=0)
    else:
        k = tl.load(ks + b, mask=live, other=0).to(tl.int64)
        k = tl.minimum(tl.where(k < 0, -1 - k, k), n)  # a damaged message may say more
    width = tl.zeros_like(k)
    for bit in range(41):
        width += (((n - k) >> bit) > 2 * k).to(tl.int64)
    is_coded = (k > 0) & (k < n)
    width = tl.where(is_coded, width, 0)
    size = tl.where(is_coded, (k * width + k + ((n - k) >> width) + 7) >> 3, 0)
    tl.store(table + b, k, mask=live)
    tl.store(table + count + b, size, mask=live)
    tl.store(table + 2 * count + b, (k + 7) >> 3, mask=live)
    tl.store(table + 3 * count + b, tl.where(is_coded, k, 0), mask=live)
    tl.store(table + 4 * count + b, width, mask=live)
    tl.store(table + 5 * count + b, n, mask=live)
    tl.store(table + 6 * count + b, k, mask=live)


@triton.jit
def block_of(ends, count, j, STEPS: tl.constexpr):
    """The first block that ends behind j."""
    block = tl.zeros_like(j)
    for step in tl.static_range(STEPS):
        probe = block + (1 << (STEPS - 1 - step))
        is_in = probe <= count
        end = tl.load(ends + probe - 1, mask=is_in, other=0)
        block = tl.where(is_in & (end <= j), probe, block)
    return block


@triton.jit
def span(ends, b, live):
    """Where block b begins and ends."""
    return tl.load(ends + b - 1, mask=live & (b > 0), other=0), tl.load(ends + b, mask=live, other=0)
