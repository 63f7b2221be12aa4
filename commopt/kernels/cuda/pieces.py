"""What all Triton kernels have in common: the table of blocks on the device, how they start, and random bits.

A kernel's program takes ROWS pieces of at most LENGTH elements, each within one block: short blocks are pieces, longer ones are cut.
What the kernels need of a piece is a column of one table, which is made once for each layout. One table holds the blocks of several
messages that lie in one buffer, so that one launch writes or reads them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from commopt.wire.bucket import Blocks, Int64Array, kept
from commopt.wire.payload import LAST as LAST_NUMBER
from commopt.wire.payload import Payload, row_of

LONGEST = 2048  # elements of a piece
PER_PROGRAM = 2048  # elements of a program
LAST = tl.constexpr(LAST_NUMBER)  # less the first bad parameter is what kernels note, in memory that is zero at first
# out <- value, out <- out + values, out <- 0 + values
PUT, ADD, SUM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
SECOND = tl.constexpr(0x94D049BB133111EB)
LARGEST = tl.constexpr(3.4028234663852886e38)
ALL_BUT_SIGN = tl.constexpr(0x7FFFFFFF)
NAN = tl.constexpr(float("nan"))


@dataclass(frozen=True)
class Messages:
    """Scales and codes of several messages, in one buffer or two.

    parts: the blocks of each. scales: f32; codes: u8. at: where the scales and the codes of each begin in them.
    """

    parts: Sequence[Blocks]
    scales: Tensor
    codes: Tensor
    at: tuple[tuple[int, int], ...] = ((0, 0),)

    @classmethod
    def of(cls, payloads: Sequence[Payload], parts: Sequence[Blocks]) -> Messages:
        """Of payloads with a header of four bytes, which scales follow, and codes."""
        row, places = row_of(payloads)
        at = [(1 + place // 4, place + 4 + 4 * len(blocks)) for place, blocks in zip(places, parts, strict=True)]
        return cls(parts, row.view(torch.float32), row, tuple(at))

    def pieces(self, bits: int) -> Pieces:
        return Pieces.of(self.parts, bits, self.codes.device, self.at)

    def apart(self, add: bool) -> tuple[Messages, int, int, int, int]:
        """What a kernel that decodes loops over: messages, how many ranks have sent one with the same blocks, and how far apart their
        scales and their codes are; and its mode: one of PUT, ADD and SUM.
        """
        if len(self.parts) > 1 and all(blocks is self.parts[0] for blocks in self.parts):
            (scale, code), (next_scale, next_code) = self.at[:2]
            first = Messages(self.parts[:1], self.scales, self.codes, self.at[:1])
            mode = ADD if add else SUM
            return first, len(self.parts), next_scale - scale, next_code - code, mode.value
        return self, 1, 0, 0, (ADD if add else PUT).value


@dataclass(frozen=True)
class Pieces:
    """The pieces of the blocks of some messages, on the device.

    columns: (8, P) i64, where a piece begins among the values and in the state, its length, where its block's scale is and where its
    codes begin, the block's parameter, what its random key is named by, and how many elements of the block come before the piece.
    scales, counts, ends, sizes: (B,) i64, where each block's scale is, pieces of it, those up to it, and its length. length: the
    longest piece's, as a power of two. align: what places and lengths are multiples of, 8 or 1.
    """

    columns: Tensor
    scales: Tensor
    counts: Tensor
    ends: Tensor
    sizes: Tensor
    length: int
    align: int

    @classmethod
    def of(cls, parts: Sequence[Blocks], bits: int, device: torch.device, at: Sequence[tuple[int, int]]) -> Pieces:
        """The pieces of blocks whose codes have so many bits for each element, from a whole byte on; made once.

        parts: the blocks of each message. at: where its scales and its codes begin in theirs.
        """
        arrays = [x for blocks in parts for x in (blocks.starts, blocks.homes, blocks.named)]
        return kept(parts[0].tables, (bits, device, *at), arrays, lambda: cls._cut(parts, bits, device, at))

    @classmethod
    def _cut(cls, parts: Sequence[Blocks], bits: int, device: torch.device, at: Sequence[tuple[int, int]]) -> Pieces:
        def joined(arrays: Sequence[Int64Array]) -> Int64Array:
            return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]

        lengths = joined([blocks.lengths for blocks in parts])
        starts, homes = joined([blocks.starts for blocks in parts]), joined([blocks.homes for blocks in parts])
        parameters, named = joined([blocks.parameters for blocks in parts]), joined([blocks.named for blocks in parts])
        sizes = [(blocks.lengths * bits + 7) // 8 for blocks in parts]
        scale_at = joined([place + np.arange(len(own)) for (place, _), own in zip(at, sizes, strict=True)])
        code_at = joined([place + np.cumsum(own) - own for (_, place), own in zip(at, sizes, strict=True)])
        counts = np.maximum(-(-lengths // LONGEST), 1)  # (B,) pieces
        block = np.repeat(np.arange(len(lengths)), counts)
        within = (np.arange(len(block)) - np.repeat(np.cumsum(counts) - counts, counts)) * LONGEST
        own = np.minimum(lengths[block] - within, LONGEST)
        ranges = [starts[block] + within, homes[block] + within, own]
        codes = code_at[block] + within * bits // 8
        columns = np.stack([*ranges, scale_at[block], codes, parameters[block], named[block], within])
        is_even = len(block) > 0 and not (columns[:3] % 8).any()
        longest = max(int(own.max(initial=1)), 16)
        table, scales, per_block, ends, whole = (
            torch.from_numpy(x).to(device) for x in (columns, scale_at, counts, np.cumsum(counts), lengths)
        )
        shape = (1 << (longest - 1).bit_length(), 8 if is_even else 1)
        return cls(table, scales, per_block, ends, whole, *shape)

    def __len__(self) -> int:
        return self.columns.shape[1]

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


def address(x: Tensor) -> int:
    """Where a tensor's first element lies in memory, in bytes."""
    return x.data_ptr()


def words_of(parts: Sequence[Blocks], columns: Tensor) -> tuple[int, Tensor, int]:
    """What keys are drawn by: one word, as a signed number, or (P,) on the device; and which: 0 for none, 1 for one, 2 for many."""
    words = parts[0].words
    if words is None:
        return 0, columns, 0
    if len(words) == 1:
        return int(words.view(np.int64)[0]), columns, 1
    return 0, torch.from_numpy(words.view(np.int64)).to(columns.device), 2


@triton.jit
def piece(columns, count, ROWS: tl.constexpr, ALIGN: tl.constexpr):
    """(ROWS,) each: the number of a piece, whether there is one, and where its values, state, scale and codes begin, behind its length."""
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = p < count
    start = tl.load(columns + p, mask=live, other=0)
    home = tl.load(columns + count + p, mask=live, other=0)
    n = tl.load(columns + 2 * count + p, mask=live, other=0)
    if ALIGN > 1:
        start, home, n = tl.multiple_of(start, ALIGN), tl.multiple_of(home, ALIGN), tl.multiple_of(n, ALIGN)
    scale = tl.load(columns + 3 * count + p, mask=live, other=0)
    codes = tl.load(columns + 4 * count + p, mask=live, other=0)
    return p, live, start, home, n, scale, codes


@triton.jit
def values(x, start, n, i):
    """(ROWS, LENGTH) f32, and zeros behind the ends."""
    return tl.load(x + start[:, None] + i[None, :], mask=i[None, :] < n[:, None], other=0.0)


@triton.jit
def corrected(x, e, start, home, n, i, HAS_RESIDUAL: tl.constexpr):
    """(ROWS, LENGTH) f32: c = x + residual, with one in float32, and zeros behind the ends."""
    c = values(x, start, n, i)
    if HAS_RESIDUAL:
        c += values(e, home, n, i)
    return c


@triton.jit
def between(x, y, weight):
    """x + weight (y - x), from the nearer end and rounded once, as torch's lerp."""
    is_near = tl.abs(weight) < 0.5
    return tl.fma(y - x, tl.where(is_near, weight, weight - 1) + tl.zeros_like(x), tl.where(is_near, x, y))


@triton.jit
def note_bad(first, is_bad, columns, count, p):
    """Raise `first` to LAST less the first parameter of a piece that is bad."""
    lowest = tl.min(tl.load(columns + 5 * count + p, mask=is_bad, other=LAST), 0).to(tl.int32)
    if lowest != LAST:
        tl.atomic_max(first, -lowest + LAST)


@triton.jit
def mix(z):
    """`noise.mix`"""
    z = (z ^ (z >> 30)) * FIRST
    z = (z ^ (z >> 27)) * SECOND
    return z ^ (z >> 31)


@triton.jit
def key_of(word, words, columns, count, p, live, KEYS: tl.constexpr):
    """(ROWS,) u64: the random key of each piece's block, `noise.keys`."""
    if KEYS == 2:
        own = tl.load(words + tl.load(columns + 5 * count + p, mask=live, other=0), mask=live, other=0).to(tl.uint64)
    else:
        own = tl.zeros_like(p).to(tl.uint64) + word.to(tl.uint64)
    place = tl.load(columns + 6 * count + p, mask=live, other=0)
    return mix(own + (place + 1).to(tl.uint64) * GOLDEN)


@triton.jit
def within(columns, count, p, live, i):
    """(ROWS, LENGTH) i64: the numbers of elements in their blocks."""
    return tl.load(columns + 7 * count + p, mask=live, other=0)[:, None] + i[None, :]


@triton.jit
def drawn(key, at):
    """(ROWS, LENGTH) u64: word `at` of each row's key, `noise.bits`."""
    return mix(key[:, None] + (at + 1).to(tl.uint64) * GOLDEN)


@triton.jit
def uniform(key, at):
    """(ROWS, LENGTH) f32 in [0, 1), `noise.uniform`"""
    return (drawn(key, at) >> 40).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
