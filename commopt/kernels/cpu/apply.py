"""The optimizer's side on a CPU, with the bits of `kernels.reference.apply`: a slice at a time, and nothing of a tensor's size in between.

Roots are torch's, whose last bit is not always that of a correctly rounded one; all else is one numba loop over what they are of.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from commopt.kernels.cpu.compiled import F32, I32, Bool, exact, fma, from_nearer
from commopt.kernels.reference import apply as plain
from commopt.kernels.reference.apply import Lamb, Move, blend_
from commopt.wire.bucket import ParameterIndex

__all__ = ["blend_", "directions", "freshen_", "move_"]
_NONE = np.zeros(0, np.float32)
_AT_ONCE = 1 << 18  # roots, which stay in the cache; a call costs as much as thousands


@exact
def _divide(root: F32, n: int, lacking: np.float32) -> None:
    if lacking != np.float32(1.0):
        for i in range(n):
            root[i] /= lacking


@exact
def _raise(root: F32, m: F32, at: np.uint64, n: int, eps: np.float32, least: np.float32) -> None:
    """root <- root + eps, raised to `least` |m|."""
    for i in range(n):
        own, bound = root[i] + eps, abs(m[at + np.uint64(i)]) * least
        root[i] = bound if own < bound else own


@exact
def _follow(u: F32, m: F32, at: np.uint64, n: int, weight: np.float32, rest: np.float32) -> None:
    """u <- u + weight (m - u), from the nearer end; rest: weight, or from 1/2 on weight - 1."""
    for i in range(n):
        k = at + np.uint64(i)
        u[k] = fma(rest, m[k] - u[k], m[k] if rest != weight else u[k])


@exact
def _move(
    x: F32,
    m: F32,
    root: F32,
    begin: F32,
    u: F32,
    place: int,
    at: int,
    n: int,
    how: tuple[np.float32, ...],
    is_elsewhere: bool,
) -> None:
    """place: where in x, which is one parameter; at: where in the others, which are flat tensors of all."""
    lacking, eps, least, rate, kept, weight, rest = how
    own, first = np.uint64(place), np.uint64(at)
    if u.size > 0:
        _follow(u, m, first, n, weight, rest)
    _divide(root, n, lacking)
    _raise(root, m, first, n, eps, least)
    for i in range(n):
        j, k = own + np.uint64(i), first + np.uint64(i)
        if is_elsewhere:
            x[j] = begin[k] * kept + (m[k] * -rate) / root[i]
        else:
            x[j] = x[j] * kept + (m[k] * -rate) / root[i]


@exact
def _freshen(x: F32, m: F32, w: F32, numbers: tuple[np.float32, ...]) -> None:
    b1, rest, b2, weight = numbers
    for i in range(x.size):
        g = fma(m[i], -b1, x[i]) / rest
        w[i] = fma(weight * g, g, w[i] * b2)
        m[i] = x[i]


@exact
def _largest_ratio(root: F32, lower: F32, ratio_bits: I32, mask: Bool, at: np.uint64, n: int, eps: np.float32) -> Any:
    """The bits of the largest (root + eps) / (lower + eps), which are in the order of the ratios; ratio_bits: where lower is."""
    for i in range(n):
        lower[i] = (root[i] + eps) / (lower[i] + eps)
    if mask.size:
        for i in range(n):
            lower[i] = lower[i] if mask[at + np.uint64(i)] else np.float32(0.0)
    largest = np.int32(0)
    for i in range(n):
        largest = max(largest, ratio_bits[i])
    return largest


@exact
def _direct(m: F32, root: F32, x: F32, d: F32, a: F32, at: int, n: int, size: np.float32, decay: np.float32) -> None:
    first = np.uint64(at)
    for i in range(n):
        a[first + np.uint64(i)] = (m[first + np.uint64(i)] * size) / root[i]
    if decay != np.float32(0.0):
        for i in range(n):
            d[first + np.uint64(i)] = a[first + np.uint64(i)] + decay * x[first + np.uint64(i)]


@exact
def _directions(
    x: F32, m: F32, root: F32, lower: F32, mask: Bool, d: F32, a: F32, at: int, n: int, how: tuple[np.float32, ...]
) -> Any:
    lacking, eps, least, size, decay, fresh_lacking = how
    bits = np.int32(0)
    _divide(root, n, lacking)
    if lower.size:
        _divide(lower, n, fresh_lacking)
        bits = _largest_ratio(root, lower, lower.view(np.int32), mask, np.uint64(at), n, eps)
    _raise(root, m, np.uint64(at), n, eps, least)
    _direct(m, root, x, d, a, at, n, size, decay)
    return bits


def freshen_(xs: list[Tensor], ms: list[Tensor], ws: list[Tensor], b1: float, b2: float) -> None:
    """See `kernels.reference.apply.freshen_`."""
    numbers = tuple(np.float32(x) for x in (b1, 1 - b1, b2, 1 - b2))
    for x, m, w in zip(xs, ms, ws, strict=True):
        _freshen(x.numpy(), m.numpy(), w.numpy(), numbers)


def directions(
    p: Tensor, m: Tensor, v: Tensor, fresh: Tensor | None, mask: Tensor | None, how: Lamb
) -> tuple[Tensor, Tensor, float]:
    """See `kernels.reference.apply.directions`."""
    numbers = tuple(np.float32(x) for x in (*how.root, how.size, how.decay, how.fresh_lacking))
    x, m, v = (one.detach().reshape(-1).float() for one in (p, m, v))
    w = v[:0] if fresh is None else fresh.reshape(-1)
    a, total, largest = torch.empty_like(m), m.numel(), 0
    d = torch.empty_like(m) if how.decay else a
    roots, lower = (torch.empty(min(_AT_ONCE, x.numel()), dtype=torch.float32) for x in (m, w))
    hidden = np.zeros(0, np.bool_) if mask is None else mask.reshape(-1).numpy()
    given = (x.numpy(), m.numpy(), roots.numpy(), lower.numpy(), hidden, d.numpy(), a.numpy())
    for at in range(0, total, _AT_ONCE):
        n = min(_AT_ONCE, total - at)
        torch.sqrt(v[at : at + n], out=roots[:n])
        if fresh is not None:
            torch.sqrt(w[at : at + n], out=lower[:n])
        largest = max(largest, _directions(*given, at, n, numbers))
    return d.view(p.shape), a.view(p.shape), float(np.int32(largest).view(np.float32))


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
    numbers = tuple(np.float32(x) for x in (*how.root, how.rate, how.kept, *from_nearer(how.weight)))
    roots = torch.empty(_AT_ONCE, dtype=torch.float32)
    begin, u = (_NONE if one is None else one.numpy() for one in (start, mean))
    given = (momentum.numpy(), roots.numpy(), begin, u)
    for name, p in parameters.items():
        if p.dtype != torch.float32:
            plain.move_({name: p}, index, momentum, variance, how, start, mean)
            continue
        x = p.detach().reshape(-1)  # a copy if it is not contiguous
        own, first, total = x.numpy(), int(index.offsets[index.position[name]]), x.numel()
        for place in range(0, total, _AT_ONCE):
            n, at = min(_AT_ONCE, total - place), first + place
            torch.sqrt(variance[at : at + n], out=roots[:n])
            _move(own, *given, place, at, n, numbers, start is not None)
        if not p.is_contiguous():
            p.copy_(x.view(p.shape))
