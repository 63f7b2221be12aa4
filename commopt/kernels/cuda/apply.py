"""The optimizer's side on a GPU, with the bits of `kernels.reference.apply`: one launch for all parameters that step alike.

Parameters are tensors of their own: where each begins is counted from the first of its dtype. So one table of pieces has them all.
"""

from collections.abc import Iterator, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from commopt.kernels.cuda import pieces as on_device
from commopt.kernels.cuda.pieces import Pieces, between, launch, piece
from commopt.kernels.reference.apply import Lamb, Move, freshen_
from commopt.wire.bucket import Blocks, ParameterIndex, alike

__all__ = ["blend_", "freshen_", "lamb_", "move_"]


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
    tl.store(out + start[:, None] + i, between(own, given, weight), mask=inside)


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
        tl.store(mean + at, between(u, m, weight), mask=inside)  # u <- u + weight (m - u)
    from_at = begin + at if HAS_BEGIN else x_at
    decayed = tl.load(from_at, mask=inside, other=0.0).to(tl.float32) * kept
    if ROUNDS:
        decayed = decayed.to(x.dtype.element_ty).to(tl.float32)
    _, root = _divisor(m, v, lacking, eps, least)
    tl.store(x_at, decayed + tl.div_rn(m * -rate, root), mask=inside)  # x <- kept start - rate m / root


@triton.jit
def _direction(m, v, x, lacking, eps, least, size, decay):
    """What divides m but for its bound, a = size m / root, and d = a + decay x."""
    root, bounded = _divisor(m, v, lacking, eps, least)
    adam = tl.div_rn(m * size, bounded)
    return root, adam, adam + x * decay


@triton.jit
def _norms(
    x,
    columns,
    count,
    momentum,
    variance,
    fresh,
    mask,
    lacking,
    eps,
    least,
    size,
    decay,
    fresh_lacking,
    sums,
    IS_FROZEN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """sums: (4, P), of each piece the squares of x, d and a, and the largest (sqrt(v) + eps) / (sqrt(w) + eps)."""
    p, live, start, home, n, scale_at, codes = piece(columns, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)[None, :]
    inside, at = i < n[:, None], home[:, None] + i
    own = tl.load(x + start[:, None] + i, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(momentum + at, mask=inside, other=0.0)
    v = tl.load(variance + at, mask=inside, other=1.0)
    root, adam, d = _direction(m, v, own, lacking, eps, least, size, decay)
    tl.store(sums + p, tl.sum(own * own, 1), mask=live)
    tl.store(sums + count + p, tl.sum(d * d, 1), mask=live)
    if IS_FROZEN:
        w = tl.load(fresh + at, mask=inside, other=1.0)
        counts = inside & (tl.load(mask + at, mask=inside, other=0) != 0) if HAS_MASK else inside
        ratio = tl.div_rn(root, tl.div_rn(tl.sqrt_rn(w), tl.zeros_like(w) + fresh_lacking) + eps)
        tl.store(sums + 2 * count + p, tl.sum(adam * adam, 1), mask=live)
        tl.store(sums + 3 * count + p, tl.max(tl.where(counts, ratio, 0.0), 1), mask=live)


@triton.jit
def _rates(
    sums,
    columns,
    count,
    counts,
    ends,
    coeff,
    terms,
    share_of_terms,
    factor,
    rates,
    lr,
    low,
    high,
    beta,
    least,
    most,
    change,
    IS_FROZEN: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """rates: (B,) lr times the rate of each tensor, from the sums of its pieces in their order."""
    b = tl.program_id(0)
    end = tl.load(ends + b)
    begin = end - tl.load(counts + b)
    k = tl.load(columns + 5 * count + begin)
    i = tl.arange(0, WIDTH)
    xs, ds = tl.zeros((WIDTH,), tl.float64), tl.zeros((WIDTH,), tl.float64)
    adams, ratios = tl.zeros((WIDTH,), tl.float64), tl.zeros((WIDTH,), tl.float32)
    for first in range(begin, end, WIDTH):
        at, inside = sums + first + i, first + i < end
        xs += tl.load(at, mask=inside, other=0.0).to(tl.float64)
        ds += tl.load(at + count, mask=inside, other=0.0).to(tl.float64)
        if IS_FROZEN:
            adams += tl.load(at + 2 * count, mask=inside, other=0.0).to(tl.float64)
            ratios = tl.maximum(ratios, tl.load(at + 3 * count, mask=inside, other=0.0))
    weight, whole = tl.sqrt(tl.sum(xs, 0)), tl.sqrt(tl.sum(ds, 0))
    mean, number = tl.load(coeff + k), tl.load(terms + k)
    if IS_FROZEN:
        before, ratio = tl.load(factor + k), tl.max(ratios, 0).to(tl.float64)
        share = tl.where(whole > 0, tl.minimum(tl.sqrt(tl.sum(adams, 0)) / whole, 1.0), 1.0)
        f = tl.minimum(tl.maximum(ratio * share + 1 - share, least), most)
        f = tl.minimum(tl.maximum(f, before * (1 - change)), before * (1 + change))
        f = tl.where(ratio == 0, before, f)  # all of it is masked
        tl.store(factor + k, f)
        rate = tl.where(number > 0, mean / tl.load(share_of_terms + k), 1.0) * f
    else:
        rate = tl.minimum(tl.maximum(weight / whole, low), high)
        rate = tl.where((weight > 0) & (whole > 0), rate, 1.0)
        tl.store(coeff + k, tl.where(rate == 1, mean, mean + (1 - beta) * (rate - mean)))
        tl.store(terms + k, number + (rate != 1).to(tl.int64))
    tl.store(rates + b, (lr * rate).to(tl.float32))


@triton.jit
def _along(
    x,
    columns,
    count,
    momentum,
    variance,
    lacking,
    eps,
    least,
    size,
    decay,
    rates,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """x <- x - rate d"""
    p, live, start, home, n, scale_at, codes = piece(columns, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)[None, :]
    inside, at, x_at = i < n[:, None], home[:, None] + i, x + start[:, None] + i
    own = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(momentum + at, mask=inside, other=0.0)
    v = tl.load(variance + at, mask=inside, other=1.0)
    _, _, d = _direction(m, v, own, lacking, eps, least, size, decay)
    tl.store(x_at, own - tl.load(rates + scale_at, mask=live, other=0.0)[:, None] * d, mask=inside)


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
    given = (momentum if start is None else start, momentum if mean is None else mean)
    flags = {"HAS_BEGIN": start is not None, "HAS_MEAN": mean is not None, "ROUNDS": how.rounds}
    numbers = tuple(map(float, (*how.root, how.rate, how.kept, how.weight)))
    for first, pieces in _together(parameters, index):
        table = (first, pieces.columns, len(pieces))
        launch(_move, pieces.grid, *table, momentum, variance, *given, *numbers, **flags, **pieces.shape)


def lamb_(
    parameters: Mapping[str, Tensor], index: ParameterIndex, state: Mapping[str, Tensor], how: Lamb, mask: Tensor | None
) -> None:
    """Step all of these parameters by 1-bit LAMB; state: of `OnebitLamb`, of which it changes coeff, coeffs and factor.

    mask: (n,) bool, False for elements that do not count in the factor.
    """
    share_of_terms = 1 - how.beta ** state["coeffs"].double() if how.is_frozen else state["coeff"]
    moments = (state["momentum"], state["variance"])
    of_direction = tuple(map(float, (*how.root, how.size, how.decay)))
    of_rate = tuple(map(float, (how.lr, *how.bounds, how.beta, *how.factor)))
    hidden = moments[0] if mask is None else mask.view(torch.uint8)
    for first, pieces in _together(parameters, index):
        table = (pieces.columns, len(pieces))
        sums, rates = (moments[0].new_empty(n) for n in (4 * len(pieces), len(pieces.counts)))
        flags = {"IS_FROZEN": how.is_frozen, "HAS_MASK": mask is not None, **pieces.shape}
        others = (*moments, state["fresh_variance"], hidden, *of_direction, float(how.fresh_lacking), sums)
        launch(_norms, pieces.grid, first, *table, *others, **flags)
        kept = (state["coeff"], state["coeffs"], share_of_terms, state["factor"])
        of_block = (pieces.counts, pieces.ends, *kept, rates, *of_rate)
        launch(_rates, (len(rates),), sums, *table, *of_block, IS_FROZEN=how.is_frozen, WIDTH=256)
        launch(_along, pieces.grid, first, *table, *moments, *of_direction, rates, **pieces.shape)


def _together(parameters: Mapping[str, Tensor], index: ParameterIndex) -> Iterator[tuple[Tensor, Pieces]]:
    """The first parameter of each dtype, and the pieces of them all, whose places are counted from its first element.

    Those that do not lie in the order of their elements are stepped as a copy, which is put back.
    """
    live = (name for name, p in parameters.items() if p.numel())
    for (_, is_dense), names in alike(
        live, lambda name: (parameters[name].dtype, parameters[name].is_contiguous())
    ).items():
        own = [parameters[name] for name in names]
        xs = own if is_dense else torch.cat([p.reshape(-1) for p in own]).split([p.numel() for p in own])
        begins = [on_device.address(x) for x in xs]
        starts = tuple((begin - begins[0]) // xs[0].element_size() for begin in begins)
        yield xs[0], Pieces.of([index.places(tuple(names), starts)], 8, xs[0].device, [(0, 0)])
        for p, x in zip(own, xs, strict=True) if not is_dense else ():
            p.copy_(x.view(p.shape))
