"""PowerSGD: gradients as products of two thin matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from commopt.errors import check_option
from commopt.exchange.mean import Aggregator, State, check_alone, first_bad, is_finite, load_mean, load_tensor
from commopt.groups.base import Group
from commopt.wire import noise
from commopt.wire.bucket import Bucket, ParameterIndex


class PowerSGD(Aggregator):
    """Send two thin factors of each gradient matrix: one step of power iteration from where the last exchange ended.

    Vogels et al. 2019, arXiv:1905.13727, Algorithms 1 and 2. A parameter of two or more dimensions is a matrix
    (first, rest); Q is (m, rank) and the same on all ranks:
        M_i = g_i + e_i;  P = mean M_i Q;  P <- orthogonalise(P)
        Q_i = M_i^T P;  Q = mean Q_i;  the mean gradient is P Q^T;  e_i <- M_i - P Q_i^T
    Biases, norms, and matrices too small to gain are averaged exactly, in the same all-reduce as P: two all-reduces for a bucket.
    Differs from torch's hook: state is kept by parameter, so that it may start in any step and runs on Gloo with any buckets. What a
    rank keeps back is what its own factor Q_i left out (the hook subtracts the mean's): the mean of the residuals is the same, and they
    stay bounded where ranks differ for ever. Q's columns are normalised before the next step, so that no gradient is too
    small or too large to square, and one that is zero is drawn anew. The orthogonalisation is Householder's QR in float32, which
    knows no bad case, on every rank for itself: replicas are equal bit for bit where ranks run the same code on the same kind
    of machine, and may part by rounding errors where they do not (`replicas_are_equal` tells).
    One rank alone does not compress. Momentum stays in your optimizer, behind the exchange.
    Sends 8(N-1)/N x rank (n + m)/(n m) bytes per parameter and step, for an n x m matrix.
    State: 4 bytes per parameter of residual, and Q.
    Use it where the network is slow and layers are wide: at rank 4 a 1024 x 1024 matrix shrinks 128 times, however many ranks there are.
    Not for models of vectors and small matrices, which stay dense.

    rank: columns of P and Q; at most what the matrix has.
    start_step: average exactly for so many exchanges before the first compressed one.
    min_compression_rate: a matrix is compressed where (n + m) rank times this is less than n m.
    seed: of the first Q.
    """

    name = "powersgd"
    warmup_option = "start_step"

    def __init__(
        self,
        *,
        rank: int = 4,
        start_step: int = 0,
        min_compression_rate: float = 2.0,
        seed: int = 0,
        max_norm: float | None = None,
        grad_scaler: Any = None,
    ) -> None:
        super().__init__(max_norm=max_norm, grad_scaler=grad_scaler)
        check_option("rank", rank, lambda x: isinstance(x, int) and x >= 1, "a whole number from 1")
        check_option("start_step", start_step, lambda x: isinstance(x, int) and x >= 0, "a whole number from 0")
        check_option("min_compression_rate", min_compression_rate, lambda x: 1 <= x < math.inf, "a number from 1")
        check_option("seed", seed, lambda x: isinstance(x, int), "a whole number")
        self.columns, self.start_step, self.seed = rank, start_step, seed
        self.min_compression_rate = min_compression_rate

    def bind(self, named_parameters: Sequence[tuple[str, Tensor]], group: Group) -> None:
        super().bind(named_parameters, group)
        self.device = named_parameters[0][1].device
        self.shapes = {name: (len(p), p.numel() // len(p)) for name, p in named_parameters if self._is_compressed(p)}
        self.matrices = ParameterIndex(tuple(self.shapes), tuple(n * m for n, m in self.shapes.values()))
        self.factors = ParameterIndex(tuple(self.shapes), tuple(m * self._width(n, m) for n, m in self.shapes.values()))
        self.residual = torch.zeros(self.matrices.total, device=self.device)
        self.q = torch.empty(self.factors.total, device=self.device)
        for name in self.shapes:
            self._q(name).copy_(self._draw(name))

    def aggregate(self, bucket: Bucket, group: Group) -> None:
        if group.size == 1:
            return check_alone(self, bucket)
        matrices: dict[str, Tensor] = {}
        first = []
        for name, g in bucket.views():
            if self._is_due(name):
                m = torch.add(g, self.matrices.view(self.residual, name)).view(self.shapes[name])  # M_i = g_i + e_i
                matrices[name] = m
                first.append((name, _poisoned(self._q(name) @ m.T, m)))
            else:
                first.append((name, g))
        means = self._mean(first, bucket, group)
        if bucket.void is None and matrices:
            means |= self._decompressed(matrices, means, bucket, group)
        if bucket.void is None:
            for name, x in bucket.views():
                x.copy_(means[name])
        return None

    def _decompressed(
        self, matrices: dict[str, Tensor], means: dict[str, Tensor], bucket: Bucket, group: Group
    ) -> dict[str, Tensor]:
        """The second half of the exchange: (n m,) P Q^T of each matrix, from the mean of M_i Q."""
        # clones: how a product rounds may depend on where its factors lie in memory
        ps = {name: _orthogonal(means[name].clone().view(-1, len(m))) for name, m in matrices.items()}
        qs = {name: ps[name] @ m for name, m in matrices.items()}  # Q_i = M_i^T P
        mean_qs = self._mean(list(qs.items()), bucket, group)
        if bucket.void is not None:
            return {}
        results = {}
        for name, m in matrices.items():
            p, q = ps[name], mean_qs[name].clone().view_as(qs[name])
            m.addmm_(p.T, qs[name], alpha=-1.0)  # e_i <- M_i - P Q_i^T
            self.matrices.view(self.residual, name).copy_(m.view(-1))
            results[name] = torch.mm(p.T, q, out=m).view(-1)  # P Q^T
            self._q(name).copy_(self._next(name, q))
        return results

    def _mean(self, tensors: Sequence[tuple[str, Tensor]], bucket: Bucket, group: Group) -> dict[str, Tensor]:
        """The means over ranks by parameter; none, and the bucket void, where one is not finite."""
        mean = Bucket.of(tensors)
        mean.flat /= group.size
        group.all_reduce(mean.flat)
        if is_finite(mean.flat):
            return dict(mean.views())
        bucket.void = first_bad(self.index, mean)
        return {}

    def _next(self, name: str, q: Tensor) -> Tensor:
        """(r, m) Q with columns of length 1; those that have become zero say nothing, and are drawn anew."""
        lengths = torch.linalg.vector_norm(q, dim=1, keepdim=True, dtype=torch.float64)
        unit = (q / lengths).float()
        return torch.where(lengths > 0, unit, self._draw(name)) if bool((lengths == 0).any()) else unit

    def _draw(self, name: str) -> Tensor:
        """(r, m) random numbers that are the same on all ranks."""
        k = self.index.position[name]
        count, place = self.exchanges.numpy()[k : k + 1], self.index.offsets[k : k + 1]
        keys = noise.keys(self.seed, "powersgd", 0, count, place)
        numbers = noise.uniform(keys, np.asarray([self._q(name).numel()]), self.device)
        return (numbers - 0.5).view_as(self._q(name))

    def _q(self, name: str) -> Tensor:
        """(r, m) view of Q, whose columns lie one behind the other: products are faster so."""
        return self.factors.view(self.q, name).view(-1, self.shapes[name][1])

    def _width(self, n: int, m: int) -> int:
        return min(self.columns, n, m)

    def _is_compressed(self, p: Tensor) -> bool:
        n, m = (len(p), p.numel() // len(p)) if p.dim() > 1 and p.numel() else (1, 1)
        return (n + m) * self._width(n, m) * self.min_compression_rate < n * m

    def _is_due(self, name: str) -> bool:
        return name in self.shapes and int(self.exchanges[self.index.position[name]]) >= self.start_step

    @property
    def is_exact(self) -> bool:
        return not self.is_steady

    @property
    def is_steady(self) -> bool:
        return int(self.exchanges.max()) >= self.start_step

    @property
    def warmup_steps(self) -> int:
        return self.start_step

    def bytes_per_parameter(self, ranks: int) -> float:
        n = m = 1024
        return 8 * (ranks - 1) / ranks * self._width(n, m) * (n + m) / (n * m)

    @property
    def state_form(self) -> str:
        return f"rank {self.columns}, min_compression_rate {self.min_compression_rate:g}"

    def state_views(self, name: str) -> list[Tensor]:
        own = super().state_views(name)
        if name not in self.shapes:
            return own
        return [*own, self.matrices.view(self.residual, name), self.factors.view(self.q, name)]

    def comm_state(self) -> State:
        state = super().comm_state()
        state["shared"]["q"] = self.q
        state["local"]["residual"] = self.residual
        return state

    def load_comm_state(self, state: State) -> None:
        super().load_comm_state(state)
        load_tensor(self.q, state["shared"], "q")
        load_tensor(self.residual, state["local"], "residual")

    def load_resharded(self, states: Iterable[State]) -> None:
        """Every new rank takes the mean of the old ranks' residuals: the factors depend on residuals only through it."""
        every = list(states)
        super().load_resharded(every)
        load_tensor(self.q, every[0]["shared"], "q")
        load_mean(self.residual, every, "residual")


def _poisoned(p: Tensor, m: Tensor) -> Tensor:
    """p, or NaN where m is not finite: a product may lose an inf that meets a zero."""
    return p if is_finite(m) else p.fill_(math.nan)


def _orthogonal(p: Tensor) -> Tensor:
    """(r, n) rows of length 1, at right angles, that span the rows of p, and some others where those are dependent or zero."""
    q: Tensor = torch.linalg.qr(p.T).Q
    return q.T.contiguous()
