"""PowerSGD: gradients as products of two thin matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from commopt.exchange.base import is_finite
from commopt.groups.base import Group
from commopt.method import GradientMethod, NoOptions, options
from commopt.options import Count, Number, Whole
from commopt.wire import noise
from commopt.wire.bucket import Bucket, ParameterIndex
from commopt.wire.state import State


@options
class PowerSGDOptions(NoOptions):
    rank: Count = 4
    start_step: Annotated[Whole, Field(ge=0)] = 0
    min_compression_rate: Annotated[Number, Field(ge=1)] = 2.0
    seed: Whole = 0


class PowerSGD(GradientMethod):
    """Send two thin factors of each gradient matrix: one step of power iteration that starts from the last exchange's factor.

    Vogels et al. 2019, arXiv:1905.13727, Algorithms 1 and 2. A parameter of two or more dimensions is a matrix (first,
    rest); Q is (m, rank) and the same on all ranks:
        M_i = g_i + e_i;  P = mean M_i Q;  P <- orthogonalise(P)
        Q_i = M_i^T P;  Q = mean Q_i;  the mean gradient is P Q^T;  e_i <- M_i - P Q_i^T
    Biases, norms, and matrices too small to gain are averaged exactly, in the same all-reduce as P: two all-reduces
    for a bucket. Differs from torch's hook: state is kept by parameter, so it may start in any step and runs on Gloo
    with any buckets. A rank's residual is what its own factor Q_i left out; the hook subtracts the mean's. The mean of
    the residuals is the same, and they stay bounded even if ranks always differ. Q's columns are normalised before the
    next step, so no gradient is too small or too large to square. A column of zeros is drawn anew. Every rank
    orthogonalises for itself by Householder's QR in float32, which has no bad case. Replicas are equal bit for bit if
    ranks run the same code on the same kind of machine. Otherwise they may differ by rounding errors
    (`replicas_are_equal` tells). One rank alone does not compress. Momentum stays in your optimizer, after the
    exchange.
    Sends 8(N-1)/N x rank (n + m)/(n m) bytes per parameter and step, for an n x m matrix.
    State: 4 bytes per parameter of residual, and Q.
    Use it if the network is slow and layers are wide: at rank 4 a 1024 x 1024 matrix shrinks 128 times, at any number
    of ranks.
    Not for models of vectors and small matrices, which stay dense.

    rank: columns of P and Q; at most what the matrix has.
    start_step: average exactly for this many exchanges before the first compressed one.
    min_compression_rate: a matrix is compressed if (n + m) rank times this is less than n m.
    seed: of the first Q.
    """

    name = "powersgd"
    Options = PowerSGDOptions
    options: PowerSGDOptions
    warmup_option = "start_step"

    def lay_out(self, named_parameters: Sequence[tuple[str, Tensor]], group: Group) -> None:
        super().lay_out(named_parameters, group)
        self.compressed = {name for name, p in named_parameters if self._is_compressed(p)}
        own = [(name, p) for name, p in named_parameters if name in self.compressed and self.own_index.size(name)]
        self.shapes = {name: (len(p), p.numel() // len(p)) for name, p in own}  # of what this rank exchanges

    def declare(self) -> list[State]:
        names, shapes = tuple(self.shapes), self.shapes.values()
        matrices = ParameterIndex(names, tuple(n * m for n, m in shapes))
        factors = ParameterIndex(names, tuple(m * self._width(n, m) for n, m in shapes))
        residual = State("residual", index=matrices, held="rank", on_resize="mean")
        return [residual, State("q", index=factors, is_cut=True), *super().declare()]

    def pieces(self, numel: int, ranks: int) -> Sequence[int]:
        return [numel]  # a matrix is not cut

    def bound(self) -> None:
        super().bound()
        for name in self.shapes:
            self._q(name).copy_(self._draw(name))

    def exchange(self, bucket: Bucket, group: Group) -> None:
        if group.size == 1:
            return self.exchange_alone(bucket, group)
        has_second, matrices = any(self._is_due(name) for name in bucket.names), dict[str, Tensor]()
        first = []
        for name, g in bucket.views():
            if self._is_due(name) and name in self.shapes:
                m = torch.add(g, self.part("residual", name)).view(self.shapes[name])  # M_i = g_i + e_i
                matrices[name] = m
                p = self._q(name) @ m.T  # which may lose an inf that is multiplied by zero
                first.append((name, p if is_finite(m) else p.fill_(math.nan)))
            else:
                first.append((name, g))
        means = self._mean(first, bucket, group)
        if bucket.void is None and has_second:
            means |= self._decompressed(matrices, means, bucket, group)
        if bucket.void is None:
            for name, x in bucket.views():
                x.copy_(means[name])
        return None

    def _decompressed(
        self, matrices: dict[str, Tensor], means: dict[str, Tensor], bucket: Bucket, group: Group
    ) -> dict[str, Tensor]:
        """The second half of the exchange: (n m,) P Q^T of each matrix, from the mean of M_i Q."""
        # orthonormal rows that span those of the mean, and others in place of dependent or zero ones;
        # clones, because how a product rounds may depend on where its factors lie in memory
        means = {name: means[name].clone().view(-1, len(m)) for name, m in matrices.items()}
        ps = {name: torch.linalg.qr(p.T).Q.T.contiguous() for name, p in means.items()}
        qs = {name: ps[name] @ m for name, m in matrices.items()}  # Q_i = M_i^T P
        mean_qs = self._mean(list(qs.items()), bucket, group)
        if bucket.void is not None:
            return {}
        results = {}
        for name, m in matrices.items():
            p, q = ps[name], mean_qs[name].clone().view_as(qs[name])
            m.addmm_(p.T, qs[name], alpha=-1.0)  # e_i <- M_i - P Q_i^T
            self.part("residual", name).copy_(m.view(-1))
            results[name] = torch.mm(p.T, q, out=m).view(-1)  # P Q^T
            self._q(name).copy_(self._next(name, q))
        return results

    def _mean(self, tensors: Sequence[tuple[str, Tensor]], bucket: Bucket, group: Group) -> dict[str, Tensor]:
        """The means over ranks by parameter; none, with the bucket void, if one is not finite."""
        mean = Bucket.of(tensors) if tensors else Bucket(bucket.flat[:0], (), ())
        is_good = self.average_(mean, group)
        bucket.void = mean.void
        return dict(mean.views()) if is_good and tensors else {}

    def _next(self, name: str, q: Tensor) -> Tensor:
        """(r, m) Q with columns of length 1; columns that have become zero are drawn anew."""
        lengths = torch.linalg.vector_norm(q, dim=1, keepdim=True, dtype=torch.float64)
        unit = (q / lengths).float()
        return torch.where(lengths > 0, unit, self._draw(name)) if bool((lengths == 0).any()) else unit

    def _draw(self, name: str) -> Tensor:
        """(r, m) random numbers that are the same on all ranks."""
        k = self.index.position[name]
        count, place = self.exchanges.numpy()[k : k + 1], self.index.offsets[k : k + 1]
        keys = noise.keys(self.options.seed, "powersgd", 0, count, place)
        numbers = noise.uniform(keys, np.asarray([self._q(name).numel()]), self.device)
        return (numbers - 0.5).view_as(self._q(name))

    def _q(self, name: str) -> Tensor:
        """(r, m) view of Q, whose columns are contiguous, which makes products faster."""
        return self.part("q", name).view(-1, self.shapes[name][1])

    def _width(self, n: int, m: int) -> int:
        return min(self.options.rank, n, m)

    def _is_compressed(self, p: Tensor) -> bool:
        n, m = (len(p), p.numel() // len(p)) if p.dim() > 1 and p.numel() else (1, 1)
        return (n + m) * self._width(n, m) * self.options.min_compression_rate < n * m

    def _is_due(self, name: str) -> bool:
        return name in self.compressed and int(self.exchanges[self.index.position[name]]) >= self.options.start_step

    @property
    def is_exact(self) -> bool:
        return not self.is_steady

    @property
    def warmup_steps(self) -> int:
        return self.options.start_step

    def bytes_per_parameter(self, ranks: int) -> float:
        n = m = 1024
        return 8 * (ranks - 1) / ranks * self._width(n, m) * (n + m) / (n * m)

    @property
    def state_form(self) -> str:
        return f"rank {self.options.rank}, min_compression_rate {self.options.min_compression_rate:g}"
