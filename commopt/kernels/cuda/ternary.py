"""TernGrad on a GPU: the scales of whole parameters, and sums back to values."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from commopt.kernels.cuda.pieces import ALL_BUT_SIGN, LARGEST, Pieces, launch, piece, values
from commopt.wire.bucket import Blocks
from commopt.wire.payload import Payload, row_of
from commopt.wire.residual import end_to_end


@triton.jit
def _moments(x, columns, count, out, ROWS: tl.constexpr, LENGTH: tl.constexpr, ALIGN: tl.constexpr):
    """(3, P) f64 of each piece: sum, sum of squares, and largest magnitude."""
    p, live, start, home, n, scale_at, codes = piece(columns, count, ROWS, ALIGN)
    c = values(x, start, n, tl.arange(0, LENGTH))
    wide = c.to(tl.float64)
    largest = tl.max(c.to(tl.int32, bitcast=True) & ALL_BUT_SIGN, 1).to(tl.float32, bitcast=True)
    tl.store(out + p, tl.sum(wide, 1), mask=live)
    tl.store(out + count + p, tl.sum(wide * wide, 1), mask=live)
    tl.store(out + 2 * count + p, tl.where(largest <= LARGEST, largest.to(tl.float64), float("inf")), mask=live)


@triton.jit
def _bounds(moments, count, ends, sizes, clip, bounds, scales, WIDTH: tl.constexpr):
    """Of one parameter: the bound of its values, and the largest magnitude of those clamped to it; NaN and inf become NaN."""
    b = tl.program_id(0)
    first, end, k = tl.load(ends + b - 1, mask=b > 0, other=0), tl.load(ends + b), tl.arange(0, WIDTH)
    total, squares = tl.zeros((WIDTH,), tl.float64), tl.zeros((WIDTH,), tl.float64)
    largest = tl.zeros((WIDTH,), tl.float64)
    for at in range(first, end, WIDTH):
        there = at + k < end
        total += tl.load(moments + at + k, mask=there, other=0.0)
        squares += tl.load(moments + count + at + k, mask=there, other=0.0)
        largest = tl.maximum(largest, tl.load(moments + 2 * count + at + k, mask=there, other=0.0))
    size = tl.load(sizes + b).to(tl.float64)
    is_good = tl.max(largest, 0) <= LARGEST
    sum_, square = tl.where(is_good, tl.sum(total, 0), 0.0), tl.where(is_good, tl.sum(squares, 0), 0.0)
    mean = sum_ / tl.maximum(size, 1.0)
    variance = tl.maximum(square / tl.maximum(size, 1.0) - mean * mean, 0.0)
    most = tl.max(largest, 0)
    bound = tl.where((clip > 0) & (size > 1), clip * tl.sqrt(variance).to(tl.float32), float("inf"))
    scale = tl.minimum(bound, most.to(tl.float32))
    tl.store(bounds + b, bound)
    tl.store(scales + b, tl.where(is_good, scale, float("nan")))


@triton.jit
def _most(words, ranks, stride, k, there):
    """The largest scale of any rank, NaN if one is: as bit patterns, among which NaN is above all others."""
    largest = tl.zeros_like(k).to(tl.int32)
    for rank in range(ranks):
        largest = tl.maximum(largest, tl.load(words + rank * stride + k, mask=there, other=0) & ALL_BUT_SIGN)
    return largest.to(tl.float32, bitcast=True)


@triton.jit
def _agree(words, ranks, stride, places, blocks, parameters, out, WIDTH: tl.constexpr):
    """The scale of each block, and behind them that of each parameter."""
    k = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    of_block = tl.load(places + k, mask=k < blocks, other=0)
    tl.store(out + k, _most(words, ranks, stride, of_block, k < blocks), mask=k < blocks)
    tl.store(out + blocks + k, _most(words, ranks, stride, k, k < parameters), mask=k < parameters)


@triton.jit
def _spread(sums, scales, columns, count, ranks, x, ROWS: tl.constexpr, LENGTH: tl.constexpr, ALIGN: tl.constexpr):
    """x <- scale / ranks * sum"""
    p, live, start, home, n, block, codes = piece(columns, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)
    scale = tl.load(scales + block, mask=live, other=0.0)
    share = tl.div_rn(scale, tl.zeros_like(scale) + ranks)
    tl.store(x + start[:, None] + i[None, :], values(sums, home, n, i) * share[:, None], mask=i[None, :] < n[:, None])


@triton.jit
def _share(x, columns, count, ranks, out, ROWS: tl.constexpr, LENGTH: tl.constexpr, ALIGN: tl.constexpr):
    """out <- x / ranks"""
    p, live, start, home, n, scale_at, codes = piece(columns, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)
    share = tl.div_rn(values(x, start, n, i), tl.zeros((ROWS, LENGTH), tl.float32) + ranks)
    tl.store(out + home[:, None] + i[None, :], share, mask=i[None, :] < n[:, None])


def shares(x: Tensor, blocks: Blocks, ranks: int) -> Tensor:
    """(elements,) f32: blocks of x over the number of ranks, at their homes."""
    pieces, out = _pieces([blocks], x), x.new_empty(blocks.elements)
    launch(_share, pieces.grid, x, pieces.columns, len(pieces), float(ranks), out, **pieces.shape)
    return out


def bounds_(x: Tensor, parameters: Blocks, clip: float, scales: Tensor) -> Tensor:
    """(B,) f32: clip times the standard deviation of each parameter, inf for no clamp; and the largest magnitude below it to `scales`."""
    pieces = _pieces([parameters], x)
    moments, bounds = x.new_empty(3, len(pieces), dtype=torch.float64), torch.empty_like(scales)
    launch(_moments, pieces.grid, x, pieces.columns, len(pieces), moments, **pieces.shape)
    where = (moments, len(pieces), pieces.ends, pieces.sizes, float(clip), bounds, scales)
    launch(_bounds, (len(parameters),), *where, WIDTH=1024)
    return bounds


def agree_(payloads: Sequence[Payload], places: Tensor, out: Tensor) -> None:
    """The largest of what the ranks have sent: for each block, and behind them for each parameter.

    places: (B,) i64, which parameter each block is part of. out: (B + P or more,) f32.
    """
    row, at = row_of(payloads)
    words, blocks, parameters, width = row.view(torch.int32), len(places), payloads[0].nbytes // 4, 1024
    stride = (at[1] - at[0]) // 4 if len(at) > 1 else 0
    grid = (triton.cdiv(max(blocks, parameters), width),)
    launch(_agree, grid, words[at[0] // 4 :], len(at), stride, places, blocks, parameters, out, WIDTH=width)


def spread_(sums: Tensor, scales: Tensor, ranks: int, parts: Sequence[Blocks], x: Tensor) -> None:
    """x <- scale / ranks * sum. sums: of all parts, end to end. scales: (B,) f32 of their blocks."""
    moved = [blocks.having(homes=homes) for blocks, homes in zip(parts, end_to_end(parts), strict=True)]
    pieces = _pieces(moved, x)
    launch(_spread, pieces.grid, sums, scales, pieces.columns, len(pieces), float(ranks), x, **pieces.shape)


def _pieces(parts: Sequence[Blocks], x: Tensor) -> Pieces:
    ends = [0]
    for blocks in parts:
        ends.append(ends[-1] + len(blocks))
    return Pieces.of(parts, 1, x.device, [(at, 0) for at in ends[:-1]])
