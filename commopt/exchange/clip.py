"""Clipping by the norm over all buckets of a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from commopt.groups.base import Group
from commopt.wire.bucket import Bucket


def clip_joint_norm_(buckets: Sequence[Bucket], max_norm: float, squares: Tensor | None = None) -> float:
    """Scale buckets to a joint norm of at most max_norm, as torch's clip_grad_norm_ does; those that will be void are left out of it.
    Returns the norm before clipping.

    squares: (buckets,) f64, as `joint_squares` gives them, where the buckets are not all that counts.
    """
    squares = joint_squares(buckets) if squares is None else squares
    norm = float(squares[squares.isfinite()].sum().sqrt())
    scale = min(1.0, max_norm / (norm + 1e-6))
    if scale < 1.0:
        for bucket in buckets:
            bucket.flat.mul_(scale)
    return norm


def clip_by_mean_square_(buckets: Sequence[Bucket], max_norm: float, squares: Tensor, group: Group) -> float:
    """Clip gradients before they are exchanged, by one norm for all ranks: the root mean square of theirs.

    It is an upper bound of the norm of the mean, which nobody knows before the exchange. Sends 8 bytes per bucket.
    """
    group.all_reduce(squares)
    return clip_joint_norm_(buckets, max_norm, squares / group.size)


def clip_gradients_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """torch's clip_grad_norm_; the norm that it returns is that of all shards, and reading it needs no other rank."""
    held = list(parameters)
    norm = get_total_norm([p.grad for p in held if p.grad is not None])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a DTensor, which is a sum still to be made
    clip_grads_with_norm_(held, max_norm, norm)
    return norm


def joint_squares(buckets: Sequence[Bucket], inside: Group | None = None) -> Tensor:
    """(buckets,) f64: each bucket's squared L2 norm; inside: the ranks of this machine, if each of them has a share of the buckets."""
    norms = [
        torch.linalg.vector_norm(bucket.flat, dtype=torch.promote_types(bucket.flat.dtype, torch.float32))
        for bucket in buckets
    ]
    squares = torch.stack(norms).double().square() if norms else torch.zeros(0, dtype=torch.float64)
    if not bool(squares.isfinite().all()):  # beyond float32: of huge gradients, which need clipping most, or of NaN
        norms = [torch.linalg.vector_norm(bucket.flat, dtype=torch.float64) for bucket in buckets]
        squares = torch.stack(norms).square()
    if inside is not None:
        inside.all_reduce(squares)
    return squares
