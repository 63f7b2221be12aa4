"""The optimizer's side of methods that make updates themselves, in plain torch: for CPUs, and for devices without a fast kernel.

Parameters are tensors of their own, and state is one flat tensor of all of them, laid out by an index.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from commopt.wire.bucket import Blocks, ParameterIndex

_AT_ONCE = 1 << 17  # elements, so that what is between stays in the cache


class Root(NamedTuple):
    """What momentum is divided by: sqrt(v) / lacking + eps, or `least` times |m| where that is more."""

    lacking: float
    eps: float
    least: float = 0.0


class Move(NamedTuple):
    """A step of a parameter: x <- kept start - rate m / root.

    start is x itself, or given. weight: of m in a mean of momenta, u <- u + weight (m - u). rounds: kept x is rounded to x's dtype.
    """

    root: Root
    rate: float
    kept: float = 1.0
    weight: float = 0.0
    rounds: bool = False


class Lamb(NamedTuple):
    """A step of 1-bit LAMB: x <- x - lr rate d, with d = size m / root + decay x, and a rate for each tensor.

    In the warm-up the rate is ||x|| / ||d|| in `bounds`, which `coeff` is the mean of. Later it is that mean times `factor`: see
    `OnebitLamb`. factor: its bounds, and its largest change. fresh_lacking: of w, as `Root.lacking` of v.
    """

    is_frozen: bool
    root: Root
    size: float
    decay: float
    lr: float
    bounds: tuple[float, float]
    beta: float
    factor: tuple[float, float, float]
    fresh_lacking: float


def blend_(x: Tensor, y: Tensor, out: Tensor, places: Blocks, weight: float) -> None:
    """out <- x + weight (y - x), with x at the places' homes, and y and out, which may be y, at their starts."""
    for start, home, n in zip(places.starts.tolist(), places.homes.tolist(), places.lengths.tolist(), strict=True):
        torch.lerp(x[home : home + n], y[start : start + n], weight, out=out[start : start + n])


def move_(
    parameters: Mapping[str, Tensor],
    index: ParameterIndex,
    momentum: Tensor,
    variance: Tensor,
    how: Move,
    start: Tensor | None = None,
    mean: Tensor | None = None,
) -> None:
    """Step all of these parameters, by name, alike: `Move`; computed in float32 and rounded once. mean: u."""
    for name, p in parameters.items():
        whole = p.reshape(-1)  # a copy if it is not contiguous
        for at in range(0, whole.numel(), _AT_ONCE):
            piece = slice(at, at + _AT_ONCE)
            m, v, begin, u = (
                None if x is None else index.view(x, name)[piece] for x in (momentum, variance, start, mean)
            )
            assert m is not None
            assert v is not None
            _move_piece(whole[piece], m, v, begin, u, how)
        if not p.is_contiguous():
            p.copy_(whole.view(p.shape))


def _move_piece(p: Tensor, m: Tensor, v: Tensor, start: Tensor | None, mean: Tensor | None, how: Move) -> None:
    if mean is not None:
        mean.lerp_(m, how.weight)  # u <- u + weight (m - u)
    if how.rounds and how.kept != 1.0:
        p.mul_(how.kept)
    x = p.float()  # p itself if it is float32
    if start is not None:
        x.copy_(start)
    if not how.rounds and how.kept != 1.0:
        x.mul_(how.kept)
    _, root = roots(m, v, how.root)
    x.addcdiv_(m, root, value=-how.rate)  # x <- kept start - rate m / root
    if x is not p:
        p.copy_(x)


def roots(m: Tensor, v: Tensor, how: Root) -> tuple[Tensor, Tensor]:
    """sqrt(v) / lacking + eps, and the same raised to `least` |m|."""
    root = v.sqrt()
    if how.lacking != 1.0:
        root /= how.lacking
    root += how.eps
    return root, torch.maximum(root, m.abs().mul_(how.least)) if how.least else root


def directions(
    p: Tensor, m: Tensor, v: Tensor, fresh: Tensor | None, mask: Tensor | None, how: Lamb
) -> tuple[Tensor, Tensor, float]:
    """d of `Lamb`, its part a = size m / root that is not decay, and the largest (sqrt(v) + eps) / (sqrt(w) + eps); all of p's shape.

    fresh: w; without one the last is 0, as it is if there is no element. mask: bool, False for elements that do not count in it.
    """
    root, bounded = roots(m, v, how.root)
    adam = how.size * m / bounded
    direction, ratio = adam + how.decay * p.float() if how.decay else adam, 0.0
    if fresh is not None and fresh.numel():
        lower = fresh.sqrt()
        if how.fresh_lacking != 1.0:
            lower /= how.fresh_lacking
        ratios = root / (lower + how.root.eps)
        ratio = float((ratios if mask is None else ratios.masked_fill_(~mask, 0.0)).max())
    return direction, adam, ratio


def freshen_(xs: list[Tensor], ms: list[Tensor], ws: list[Tensor], b1: float, b2: float) -> None:
    """w <- b2 w + (1 - b2) g^2 with g = (x - b1 m) / (1 - b1), and m <- x."""
    gs = torch._foreach_sub(xs, ms, alpha=b1)
    torch._foreach_div_(gs, 1 - b1)
    torch._foreach_mul_(ws, b2)
    torch._foreach_addcmul_(ws, gs, gs, value=1 - b2)
    torch._foreach_copy_(ms, xs)
