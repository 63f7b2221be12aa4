"""The optimizer's side on a CPU, with the bits of `kernels.reference.apply`: a slice at a time, and nothing of a tensor's size in between.

Roots are torch's, whose last bit is not always that of a correctly rounded one; all else is one numba loop over what they are of.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from commopt.kernels.cpu.compiled import F32, exact, fma, from_nearer
from commopt.kernels.reference import apply as plain
from commopt.kernels.reference.apply import Move, blend_
from commopt.wire.bucket import ParameterIndex

__all__ = ["blend_", "move_"]
_AT_ONCE = 1 << 18  # roots, which stay in the cache; a call costs as much as thousands


@exact
def _finish(root: F32, m: F32, at: np.uint64, n: int, lacking: np.float32, eps: np.float32, least: np.float32) -> None:
    """root <- root / lacking + eps, raised to `least` |m|."""
    if lacking != np.float32(1.0):
        for i in range(n):
            root[i] /= lacking
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
    x: F32, m: F32, root: F32, begin: F32, u: F32, at: int, n: int, how: tuple[np.float32, ...], is_elsewhere: bool
) -> None:
    lacking, eps, least, rate, kept, weight, rest = how
    first = np.uint64(at)
    if u.size > 0:
        _follow(u, m, first, n, weight, rest)
    _finish(root, m, first, n, lacking, eps, least)
    for i in range(n):
        k = first + np.uint64(i)
        if is_elsewhere:
            x[k] = begin[k] * kept + (m[k] * -rate) / root[i]
        else:
            x[k] = x[k] * kept + (m[k] * -rate) / root[i]


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
    roots = torch.empty(_AT_ONCE)
    for name, p in parameters.items():
        if p.dtype != torch.float32:
            plain.move_({name: p}, index, momentum, variance, how, start, mean)
            continue
        x = p.detach().reshape(-1)  # a copy if it is not contiguous
        m, v = index.view(momentum, name), index.view(variance, name)
        begin, u = (x[:0] if one is None else index.view(one, name) for one in (start, mean))
        given = (x.numpy(), m.numpy(), roots.numpy(), begin.numpy(), u.numpy())
        for at in range(0, len(x), _AT_ONCE):
            piece = v[at : at + _AT_ONCE]
            torch.sqrt(piece, out=roots[: len(piece)])
            _move(*given, at, len(piece), numbers, start is not None)
        if not p.is_contiguous():
            p.copy_(x.view(p.shape))
