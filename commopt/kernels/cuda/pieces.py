"""What all Triton kernels have in common: the table of blocks on the device, and random bits.

A kernel's program takes ROWS pieces of at most LENGTH elements, each within one block: short blocks are pieces, longer ones are cut.
What the kernels need of a piece is a column of one table, which is made once for each layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from commopt.wire.bucket import Blocks, UInt64Array

LONGEST = 2048  # elements of a piece
PER_PROGRAM = 2048  # elements of a program

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
SECOND = tl.constexpr(0x94D049BB133111EB)
LARGEST = tl.constexpr(3.4028234663852886e38)
ALL_BUT_SIGN = tl.constexpr(0x7FFFFFFF)
NAN = tl.constexpr(float("nan"))


@dataclass(frozen=True)
class Pieces:
    """The pieces of some blocks, on the device.

    places: (5, P) i64, where each piece begins among the values and in the state, its length, its block's number, and where its codes
    begin. within: (P,) i64, how many elements of its block come before it. counts, ends, sizes: (B,) i64, pieces of each block, and of
    those up to it, and its length. length: the longest piece's, as a power of two. align: what all places and lengths are multiples
    of, 8 or 1.
    """

    places: Tensor
    within: Tensor
    counts: Tensor
    ends: Tensor
    sizes: Tensor
    length: int
    align: int

    @classmethod
    def of(cls, blocks: Blocks, bits: int, device: torch.device) -> Pieces:
        """The pieces of blocks whose codes have so many bits for each element, end to end, each block from a whole byte on."""
        kept: dict[Any, Any] = vars(blocks).setdefault("_pieces", {})
        own = (blocks.starts, blocks.homes)
        starts, homes, found = kept.get((bits, device), (None, None, None))
        if starts is not own[0] or homes is not own[1]:  # `Blocks.having` has changed them
            found = cls._cut(blocks, bits, device)
            vars(blocks)["_pieces"] = {**kept, (bits, device): (*own, found)}
        return found  # type: ignore[no-any-return]

    @classmethod
    def _cut(cls, blocks: Blocks, bits: int, device: torch.device) -> Pieces:
        counts = np.maximum(-(-blocks.lengths // LONGEST), 1)  # (B,)
        block = np.repeat(np.arange(len(blocks)), counts)
        within = (np.arange(len(block)) - np.repeat(np.cumsum(counts) - counts, counts)) * LONGEST
        lengths = np.minimum(blocks.lengths[block] - within, LONGEST)
        sizes = (blocks.lengths * bits + 7) // 8
        codes = (np.cumsum(sizes) - sizes)[block] + within * bits // 8
        places = np.stack([blocks.starts[block] + within, blocks.homes[block] + within, lengths, block, codes])
        is_even = len(block) > 0 and not (places[:3] % 8).any()
        longest = max(int(lengths.max(initial=1)), 16)
        at, before, per, ends, all_of = (
            torch.from_numpy(x).to(device) for x in (places, within, counts, np.cumsum(counts), blocks.lengths)
        )
        return cls(at, before, per, ends, all_of, 1 << (longest - 1).bit_length(), 8 if is_even else 1)

    def __len__(self) -> int:
        return self.places.shape[1]

    @property
    def is_cut(self) -> bool:
        """Whether some block is more than one piece."""
        return len(self) > len(self.counts)

    @property
    def rows(self) -> int:
        return max(1, PER_PROGRAM // self.length)

    @property
    def grid(self) -> tuple[int]:
        return (triton.cdiv(len(self), self.rows),)

    @property
    def shape(self) -> dict[str, int]:
        """What every kernel is compiled for."""
        return {"ROWS": self.rows, "LENGTH": self.length, "ALIGN": self.align}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start a kernel, unless there is nothing to do."""
    if grid[0]:
        start(kernel, grid, arguments, constants)


def start(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Start a kernel on the current stream. There are no fused multiply-adds, which would change residuals."""
    kernel[grid](*arguments, **constants, num_warps=8, enable_fp_fusion=False)


def keys_on(keys: UInt64Array, device: torch.device) -> Tensor:
    """(B,) i64: the blocks' random keys."""
    return torch.from_numpy(keys.view(np.int64)).to(device)


@triton.jit
def piece(places, count, ROWS: tl.constexpr, ALIGN: tl.constexpr):
    """(ROWS,) each: is it one, and the columns of the table."""
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = p < count
    start = tl.load(places + p, mask=live, other=0)
    home = tl.load(places + count + p, mask=live, other=0)
    n = tl.load(places + 2 * count + p, mask=live, other=0)
    if ALIGN > 1:
        start, home, n = tl.multiple_of(start, ALIGN), tl.multiple_of(home, ALIGN), tl.multiple_of(n, ALIGN)
    block = tl.load(places + 3 * count + p, mask=live, other=0)
    codes = tl.load(places + 4 * count + p, mask=live, other=0)
    return p, live, start, home, n, block, codes


@triton.jit
def corrected(x, e, start, home, n, i, HAS_RESIDUAL: tl.constexpr):
    """(ROWS, LENGTH) f32: c = x + residual, and zeros behind the ends."""
    inside = i[None, :] < n[:, None]
    c = tl.load(x + start[:, None] + i[None, :], mask=inside, other=0.0)
    if HAS_RESIDUAL:
        c += tl.load(e + home[:, None] + i[None, :], mask=inside, other=0.0)
    return c


@triton.jit
def drawn(key, i):
    """mix(key + (i + 1) GOLDEN), of each row's key: `noise.bits`."""
    z = key.to(tl.uint64)[:, None] + (i + 1).to(tl.uint64) * GOLDEN  # i: (ROWS, LENGTH)
    z = (z ^ (z >> 30)) * FIRST
    z = (z ^ (z >> 27)) * SECOND
    return z ^ (z >> 31)
