"""PowerSGD: gradients as products of two thin matrices."""

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from commopt import kernels
from commopt.exchange.base import first_bad, is_finite
from commopt.groups.base import Group
from commopt.method import GradientMethod, NoOptions, options
from commopt.options import Count, Number, Whole
from commopt.wire import noise
from commopt.wire.bucket import Blocks, Bucket, ParameterIndex, once_per_layout
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
    orthogonalises for itself: on a CPU by Householder's QR in float32, which has no bad case; on a GPU by Cholesky QR
    in float64, all matrices at once, where a column of P that depends on others becomes zero, and so Q's is drawn
    anew. Replicas are equal bit for bit if ranks run the same code on the same kind of machine. Otherwise they may
    differ by rounding errors (`replicas_are_equal` tells). One rank alone does not compress. Momentum stays in your optimizer, after the
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
        names = [name for name in bucket.names if name in self.shapes and self._is_due(name)]
        if not names:
            self.average_(bucket, group)
            return None
        views = dict(bucket.views())
        corrected = torch._foreach_add([views[name] for name in names], [self.part("residual", name) for name in names])
        # M_i = g_i + e_i
        matrices = {name: m.view(self.shapes[name]) for name, m in zip(names, corrected, strict=True)}
        first = Bucket.of(
            [(name, self._q(name) @ matrices[name].T if name in names else g) for name, g in views.items()]
        )
        self._spoil_(first, matrices)
        self._average_(first, group)  # P = mean M_i Q
        ps = self._orthogonal(first, names)
        qs = {name: ps[name] @ m for name, m in matrices.items()}  # Q_i = M_i^T P
        second = Bucket.of(list(qs.items()))
        self._average_(second, group)
        if self.is_void(bucket, self._first_bad(first, second), group):
            return None
        for name, q in second.views():
            p, m = ps[name], matrices[name]
            torch.addmm(m, p.T, qs[name], alpha=-1.0, out=self._residual(name))  # e_i <- M_i - P Q_i^T
            torch.mm(p.T, q.clone().view_as(qs[name]), out=views[name].view_as(m))  # the mean gradient is P Q^T
        exact = [(views[name], mean) for name, mean in first.views() if name not in names]
        if exact:
            torch._foreach_copy_([x for x, _ in exact], [mean for _, mean in exact])
        self._keep_next(second)
        return None

    def _spoil_(self, first: Bucket, matrices: dict[str, Tensor]) -> None:
        """Make P begin with a NaN if M is not finite: a product may lose an inf that is multiplied by zero."""
        starts = dict(zip(first.names, first.starts, strict=True))
        places = self._places(Bucket(first.flat, tuple(matrices), tuple(starts[name] for name in matrices)))
        if self.device.type == "cpu":  # where its sum takes a tenth of the time
            largest = torch.tensor([0.0 if is_finite(m) else math.nan for m in matrices.values()])
        else:
            largest = torch.stack(torch._foreach_norm(list(matrices.values()), math.inf))
        first.flat.index_add_(0, places, largest * -0.0)  # the zero that leaves every number as it is

    @once_per_layout
    def _places(self, bucket: Bucket) -> Tensor:
        """(B,) where each parameter begins, on the device."""
        return torch.tensor(bucket.starts, device=self.device)

    def _average_(self, bucket: Bucket, group: Group) -> None:
        bucket.flat /= group.size
        group.all_reduce(bucket.flat)

    def _first_bad(self, *means: Bucket) -> int:
        """The index of the first parameter with a NaN or an inf, in the first of these that has any, or -1; one wait if all are good."""
        sums = torch.stack([x.flat.sum(dtype=torch.float32) for x in means]).tolist()
        found = () if all(map(math.isfinite, sums)) else (first_bad(self.index, x) for x in means)
        return next((bad for bad in found if bad >= 0), -1)

    def _orthogonal(self, first: Bucket, names: Sequence[str]) -> dict[str, Tensor]:
        """(r, n) orthonormal rows that span those of each P."""
        # clones, because how a product rounds may depend on where its factors lie in memory
        views = dict(first.views())
        ps = {name: views[name].view(-1, self.shapes[name][0]) for name in names}
        if self.device.type == "cpu":
            return {name: torch.linalg.qr(p.clone().T).Q.T.contiguous() for name, p in ps.items()}
        return dict(zip(names, orthonormal(list(ps.values())), strict=True))

    def _keep_next(self, second: Bucket) -> None:
        """Take over Q with columns of length 1; those that have become zero are drawn anew."""
        if kernels.has_triton(self.device):
            from commopt.kernels.cuda import factors

            rows = self._rows(second).worded(self.options.seed, "powersgd", 0, self.exchanges.numpy())
            return factors.normalise_(second.flat, self.state["q"], rows)
        for name, mean in second.views():
            own, q = self._q(name), mean.view(-1, self.shapes[name][1])
            lengths = torch.linalg.vector_norm(q, dim=1, keepdim=True, dtype=torch.float64)
            own.copy_(q / lengths)
            if bool((lengths == 0).any()):
                own.copy_(torch.where(lengths > 0, own, self._draw(name)))
        return None

    @once_per_layout
    def _rows(self, second: Bucket) -> Blocks:
        """The rows of each Q, where they lie in the bucket and in the state."""
        names, rank = second.names, self.options.rank  # which matrices that are compressed have
        parameters = np.repeat([self.index.position[name] for name in names], rank)
        lengths = np.repeat([self.shapes[name][1] for name in names], rank)
        begin = np.repeat([self._q(name).storage_offset() for name in names], rank)
        within = np.tile(np.arange(rank), len(names)) * lengths
        starts = np.repeat(second.starts, rank) + within
        return Blocks(starts, begin + within, lengths, parameters, within, places=self.index.offsets[parameters])

    def _residual(self, name: str) -> Tensor:
        """(n, m) view of the residual."""
        return self.part("residual", name).view(self.shapes[name])

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


def orthonormal(ps: Sequence[Tensor]) -> list[Tensor]:
    """Rows that span those of each (r, n) matrix, of length 1 and orthogonal; zeros in place of those that depend on the ones before.

    Cholesky QR, twice (Yamamoto et al. 2015, CholeskyQR2), of all matrices at once, in float64, which no float32 is too small or
    too large for.
    """
    x = ps[0].new_zeros(len(ps), len(ps[0]), max(p.shape[1] for p in ps), dtype=torch.float64)
    for padded, p in zip(x, ps, strict=True):
        padded[:, : p.shape[1]].copy_(p)
    x = _cholesky_qr(x)
    # else it is what rounding has left of a dependent one
    is_row = torch.linalg.vector_norm(x, dim=2, keepdim=True) > 1e-5
    x = _cholesky_qr(x * is_row).float()
    return [padded[:, : p.shape[1]] for padded, p in zip(x, ps, strict=True)]


def _cholesky_qr(x: Tensor) -> Tensor:
    """(B, r, n) L^-1 X, where L L^T = X X^T, of which the diagonal is raised by so little that L is regular."""
    gram = x @ x.mT
    gram.diagonal(dim1=1, dim2=2).mul_(1 + 1e-14 * x.shape[1]).add_(1e-200)
    solved: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(gram).L, x, upper=False)
    return solved
