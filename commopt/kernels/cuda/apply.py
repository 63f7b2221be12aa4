"""The optimizer's side on a GPU, with the bits of `kernels.reference.apply`: one launch for all parameters that step alike.

Parameters are tensors of their own: where each begins is counted from the first of its dtype. So one table of pieces has them all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from commopt.kernels.cuda import pieces as on_device
from commopt.kernels.cuda.pieces import Pieces, launch, piece
from commopt.kernels.reference.apply import Move
from commopt.wire.bucket import Blocks, ParameterIndex


@triton.jit
def _between(x, y, weight):
    """x + weight (y - x), from the nearer end and rounded once, as torch's lerp."""
    is_near = tl.abs(weight) < 0.5
    return tl.fma(y - x, tl.where(is_near, weight, weight - 1) + tl.zeros_like(x), tl.where(is_near, x, y))


@triton.jit
def _divisor(m, v, lacking, eps, least):
    """sqrt(v) / lacking + eps, and the same raised to `least` |m|."""
    root = tl.div_rn(tl.sqrt_rn(v), tl.zeros_like(v) + lacking) + eps
    return root, tl.maximum(root, tl.abs(m) * least)


@triton.jit
def _blend(
    x, y, out, columns, count, weight, ROWS: tl.constexpr, LENGTH: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    p, live, start, home, n, scale_at, codes = piece(columns, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)[None, :]
    inside = i < n[:, None]
    own = tl.load(x + home[:, None] + i, mask=inside, other=0.0)
    given = tl.load(y + start[:, None] + i, mask=inside, other=0.0)
    tl.store(out + start[:, None] + i, _between(own, given, weight), mask=inside)


@triton.jit
def _move(
    x,
    columns,
    count,
    momentum,
    variance,
    begin,
    mean,
    lacking,
    eps,
    least,
    rate,
    kept,
    weight,
    HAS_BEGIN: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    ROUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    p, live, start, home, n, scale_at, codes = piece(columns, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)[None, :]
    inside, at, x_at = i < n[:, None], home[:, None] + i, x + start[:, None] + i
    m = tl.load(momentum + at, mask=inside, other=0.0)
    v = tl.load(variance + at, mask=inside, other=1.0)
    if HAS_MEAN:
        u = tl.load(mean + at, mask=inside, other=0.0)
        tl.store(mean + at, _between(u, m, weight), mask=inside)  # u <- u + weight (m - u)
    from_at = begin + at if HAS_BEGIN else x_at
    decayed = tl.load(from_at, mask=inside, other=0.0).to(tl.float32) * kept
    if ROUNDS:
        decayed = decayed.to(x.dtype.element_ty).to(tl.float32)
    _, root = _divisor(m, v, lacking, eps, least)
    tl.store(x_at, decayed + tl.div_rn(m * -rate, root), mask=inside)  # x <- kept start - rate m / root


def blend_(x: Tensor, y: Tensor, out: Tensor, places: Blocks, weight: float) -> None:
    """See `kernels.reference.apply.blend_`."""
    pieces = Pieces.of([places], 8, x.device, [(0, 0)])
    launch(_blend, pieces.grid, x, y, out, pieces.columns, len(pieces), float(weight), **pieces.shape)


def move_(
    parameters: Mapping[str, Tensor],
    index: ParameterIndex,
    momentum: Tensor,
    variance: Tensor,
    how: Move,
    start: Tensor | None = None,
    mean: Tensor | None = None,
) -> None:
    """See `kernels.reference.apply.move_`."""
    dense = {name: p.contiguous() for name, p in parameters.items()}
    given = (momentum if start is None else start, momentum if mean is None else mean)
    flags = {"HAS_BEGIN": start is not None, "HAS_MEAN": mean is not None, "ROUNDS": how.rounds}
    numbers = tuple(map(float, (*how.root, how.rate, how.kept, how.weight)))
    for first, pieces in _of_each_dtype(dense, index):
        table = (first, pieces.columns, len(pieces))
        launch(_move, pieces.grid, *table, momentum, variance, *given, *numbers, **flags, **pieces.shape)
    for name, p in parameters.items():
        if dense[name] is not p:
            p.copy_(dense[name])


def _of_each_dtype(parameters: Mapping[str, Tensor], index: ParameterIndex) -> Iterator[tuple[Tensor, Pieces]]:
    """The first parameter of each dtype, and the pieces of them all, whose places are counted from its first element."""
    by_dtype: dict[torch.dtype, dict[str, Tensor]] = defaultdict(dict)
    for name, p in parameters.items():
        if p.numel():
            by_dtype[p.dtype][name] = p
    for own in by_dtype.values():
        first = next(iter(own.values()))
        begin, size = on_device.address(first), first.element_size()
        starts = tuple((on_device.address(p) - begin) // size for p in own.values())
        yield first, Pieces.of([index.places(tuple(own), starts)], 8, first.device, [(0, 0)])
