"""DeMo: every rank keeps its own momentum, and sends the few components that change fastest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from commopt import kernels
from commopt.compress.feedback import first_bad_parameter, first_of
from commopt.compress.indices import decode_all, encode_all, index_bytes
from commopt.groups.base import Group
from commopt.kernels.reference.runs import bad_runs, first_bad
from commopt.method import NoOptions, options
from commopt.optim.update import DirectionMethod
from commopt.options import Fraction, Whole
from commopt.wire.bucket import Blocks, Bucket, Int64Array, once_per_layout
from commopt.wire.payload import Payload

_WIRE = {16: torch.bfloat16, 32: torch.float32}


@options
class DeMoOptions(NoOptions):
    momentum_decay: Fraction = 0.999
    chunk: Annotated[Whole, Field(ge=1, le=1024)] = 64
    top_k: Annotated[Whole, Field(ge=1, le=1024**2)] = 32
    value_bits: Literal[16, 32] = 16


class DeMo(DirectionMethod):
    """Decoupled momentum: send the largest cosine coefficients of each rank's own momentum, and step by the sign of their mean.

    Peng et al. 2024, arXiv:2411.19870, Algorithm 1, with the sign of its released optimizer. C is the cosine transform
    (DCT-II, orthonormal) of chunks, T the top_k coefficients of each chunk by magnitude:
        d_i <- momentum_decay d_i + C g_i;  q_i = T(d_i);  d_i <- d_i - q_i
        x <- x - lr (sign(C^-1 mean q_i) + weight_decay x)
    The momentum d_i is kept as coefficients, so that what is sent leaves it exactly, and only the mean is transformed
    back. Differs from the released code: the gradient is not multiplied by lr, so that with a falling rate old
    gradients do not get more weight than new ones (at a constant rate both are the same). The mean is over all ranks;
    in the released code, each coefficient's mean is over the ranks that sent it. Sizes that cannot be divided evenly
    are cut into chunks that differ by at most one in length; the released code cuts them into divisors, which may be
    1. Values are sent in 16 bits and indices near their entropy, instead of 32 and 64 bits. What 16 bits leave out
    stays in d_i. Sums are in rank order, without atomics. sign(0) is 0. One rank alone selects as well, since that is
    the optimizer, and sends nothing.
    Sends (N-1) x (top_k value_bits/8 + index bytes)/chunk^2 bytes per parameter and step, (N-1) x 0.0244 by default.
    State: 4 bytes per parameter of momentum.
    Use it for large matrices over slow links between few nodes, with learning rates as for signSGD or Lion.
    Not for many ranks, since each receives from all others. Not for embeddings most of whose rows get no gradient in a
    step: the few coefficients of a chunk spread over all its rows, and the sign moves them all.

    momentum_decay: what is left of the momentum from step to step.
    chunk: matrices are cut into chunks of chunk x chunk, vectors into chunks of that length; more dimensions count as
        (first, rest).
    top_k: coefficients that each chunk sends; a chunk that has fewer sends all.
    value_bits: 16 (bfloat16) or 32 (float32) bits for each coefficient.
    """

    name = "demo"
    Options = DeMoOptions
    options: DeMoOptions
    stands_for = ("SGD",)
    takes = ("lr", "weight_decay")
    direction_dtype = torch.int8

    def pieces(self, numel: int, ranks: int) -> Sequence[int]:
        return [numel]  # its chunks depend on all of it

    def lay_out(self, named_parameters: Sequence[tuple[str, Tensor]], group: Group) -> None:
        super().lay_out(named_parameters, group)
        if not kernels.has_triton(self.device):  # else a step would wait for them
            one, zero, x = (
                np.ones(1, np.int64),
                np.zeros(1, np.int64),
                torch.ones(8, device=self.device, dtype=torch.float32),
            )
            select = kernels.of("select", self.device)
            places, values, _ = select.select_(x, None, Blocks(zero, zero, 8 * one, zero, zero), one)
            select.add_(
                decode_all(encode_all(places, 8 * one, one), 8 * one, one), values, x[:1], zero, one, x, alpha=1.0
            )
        self._shapes = {name: _matrix(p).shape if self.own_index.size(name) else (1, 0) for name, p in named_parameters}
        self._grids = {name: grids(shape, self.options.chunk) for name, shape in self._shapes.items()}

    def exchange(self, bucket: Bucket, group: Group) -> None:
        if kernels.has_triton(self.device):
            self._exchange_in_kernels(bucket, group)
            return
        chunks, counts = self._chunks_of(bucket)
        x = bucket.flat
        self._transform_(bucket)
        payloads = group.all_gather(self._largest(bucket, chunks, counts))
        if self.is_void(bucket, first_bad_parameter(payloads), group):
            return
        kernel, ones = kernels.of("select", self.device), torch.ones(len(chunks), dtype=x.dtype, device=self.device)
        every = [
            (decode_all(codes, chunks.lengths, counts), values.float(), ones, chunks.starts, counts)
            for _, values, codes in (payload.tensors for payload in payloads)
        ]
        kernel.add_(*every[group.rank], x, alpha=-1.0)  # d_i <- d_i - q_i
        self._keep(bucket)
        x.zero_()
        for sent in every:  # in rank order: float sums depend on it
            kernel.add_(*sent, x, alpha=1.0)
        x /= group.size
        self._put_signs_(bucket)

    def _exchange_in_kernels(self, bucket: Bucket, group: Group) -> None:
        """`exchange` on a GPU: a few launches for all chunks and ranks, of which the host reads once whether all is well."""
        chunks, momentum = self._device_chunks(bucket), self.state["momentum"]
        d = bucket.flat
        if chunks.can_be_transformed:
            d = torch.empty_like(bucket.flat)
            chunks.add_transformed(bucket.flat, momentum, self.options.momentum_decay, d)
        else:
            self._transform_(bucket)
        payloads = group.all_gather(chunks.largest(d))
        total, is_damaged = chunks.add_up(payloads, group.rank, d)
        *found, damaged = torch.cat([*(payload.tensors[0] for payload in payloads), is_damaged]).tolist()
        if self.is_void(bucket, first_of(found), group):
            return
        if damaged:
            raise ValueError("a message has bytes that are not the code of any indices: they are damaged")
        if chunks.can_be_transformed:
            chunks.put_signs(total, group.size, d, momentum, bucket.flat)
            return
        self._keep(bucket)
        torch.div(total, group.size, out=bucket.flat)
        self._put_signs_(bucket)

    def _transform_(self, bucket: Bucket) -> None:
        """x <- decay d_i + C g_i, by parameter, chunk after chunk."""
        for name, x in bucket.views():
            matrix, momentum = x.view(self._shapes[name]), self.part("momentum", name)
            transformed = [grid.forward(matrix).view(-1) for grid in self._grids[name]]
            parts = zip(transformed, self._cut(name, momentum), self._cut(name, x), strict=True)
            for new, (_, old), (_, out) in parts:
                torch.add(new, old, alpha=self.options.momentum_decay, out=out)

    def _keep(self, bucket: Bucket) -> None:
        """d_i <- x"""
        torch._foreach_copy_([self.part("momentum", name) for name in bucket.names], [x for _, x in bucket.views()])

    def _put_signs_(self, bucket: Bucket) -> None:
        """x <- the sign of C^-1 x, by parameter."""
        for name, x in bucket.views():
            matrix = x.view(self._shapes[name])
            inverted = [(grid, grid.inverse(part).sign_()) for grid, part in self._cut(name, x)]
            for grid, chunks in inverted:
                grid.put_(chunks, matrix)

    def _cut(self, name: str, coefficients: Tensor) -> Iterator[tuple[Grid, Tensor]]:
        """The grids of one parameter, each with its part of the coefficients."""
        parts = torch.split(coefficients, [grid.numel for grid in self._grids[name]])
        return zip(self._grids[name], parts, strict=True)

    def _largest(self, d: Bucket, chunks: Blocks, counts: Int64Array) -> Payload:
        """The top_k coefficients of each chunk: a header as in `ErrorFeedback`, values, and the code of their places."""
        select = kernels.of("select", d.flat.device).select_
        within, values, good = select(d.flat, None, chunks, counts)
        values = values.to(_WIRE[self.options.value_bits])
        bad = ~good | bad_runs(values, counts)
        header = torch.tensor([first_bad(bad, chunks)], dtype=torch.int32, device=values.device)
        return Payload.of(header, values, encode_all(within, chunks.lengths, counts))

    @once_per_layout
    def _chunks_of(self, bucket: Bucket) -> tuple[Blocks, Int64Array]:
        """The chunks of a bucket, in the flat tensor of its coefficients, and (B,) how many coefficients of each are sent."""
        each = [(self.index.position[name], grid) for name in bucket.names for grid in self._grids[name]]
        table = np.asarray([(k, grid.height * grid.width, grid.count) for k, grid in each], np.int64).reshape(-1, 3)
        parameters, lengths = (np.repeat(table[:, column], table[:, 2]) for column in (0, 1))
        starts = np.cumsum(lengths) - lengths
        begin = np.zeros(len(self.index.names), np.int64)
        begin[[self.index.position[name] for name in bucket.names]] = bucket.starts
        homes = starts - (begin - self.own_index.offsets[:-1])[parameters]
        return Blocks(starts, homes, lengths, parameters, parameters), np.minimum(lengths, self.options.top_k)

    @once_per_layout
    def _device_chunks(self, bucket: Bucket) -> Any:
        """The chunks of a bucket for the kernels."""
        from commopt.kernels.cuda.chunks import Chunks

        each = [
            (start, self._shapes[name][1], grid)
            for name, start in zip(bucket.names, bucket.starts, strict=True)
            for grid in self._grids[name]
        ]
        shapes = [
            np.stack(
                [start + grid.places(columns), *np.full((3, grid.count), [[columns], [grid.height], [grid.width]])]
            )
            for start, columns, grid in each
        ]
        sizes = sorted({size for *_, grid in each for size in (grid.height, grid.width)})
        transforms = {n: cosines(n, self.device) for n in sizes}
        joined = np.concatenate([np.zeros((4, 0), np.int64), *shapes], axis=1)
        return Chunks.of(*self._chunks_of(bucket), joined, transforms, self.options.value_bits, self.device)

    def bytes_per_parameter(self, ranks: int) -> float:
        n = self.options.chunk**2
        k = min(self.options.top_k, n)
        return (ranks - 1) * (k * self.options.value_bits / 8 + index_bytes(n, k)) / n

    @property
    def state_form(self) -> str:
        return f"cosines of chunks of {self.options.chunk}"


@dataclass(frozen=True)
class Grid:
    """Chunks of one size, side by side in a matrix: `down` of them from `top` on, and `across` from `left` on."""

    top: int
    down: int
    height: int
    left: int
    across: int
    width: int

    @property
    def count(self) -> int:
        return self.down * self.across

    @property
    def numel(self) -> int:
        return self.count * self.height * self.width

    def places(self, columns: int) -> Int64Array:
        """(count,) where each chunk begins in a flat matrix of so many columns."""
        down, across = np.arange(self.down)[:, None], np.arange(self.across)
        return ((self.top + down * self.height) * columns + self.left + across * self.width).ravel()

    def forward(self, matrix: Tensor) -> Tensor:
        """(count, height, width) DCT-II of each chunk."""
        chunks = self._part(matrix).view(self.down, self.height, self.across, self.width).transpose(1, 2)
        # a copy, always: how a product rounds may depend on where its factors lie in memory
        chunks = chunks.clone(memory_format=torch.contiguous_format).view(-1, self.height, self.width)
        return cosines(self.height, matrix.device) @ chunks @ cosines(self.width, matrix.device).T

    def inverse(self, coefficients: Tensor) -> Tensor:
        """(count, height, width) the chunks that have these coefficients."""
        coefficients = coefficients.clone().view(-1, self.height, self.width)
        return cosines(self.height, coefficients.device).T @ coefficients @ cosines(self.width, coefficients.device)

    def put_(self, chunks: Tensor, matrix: Tensor) -> None:
        """Write the chunks into the matrix."""
        part = self._part(matrix).view(self.down, self.height, self.across, self.width)
        part.copy_(chunks.view(self.down, self.across, self.height, self.width).transpose(1, 2))

    def _part(self, matrix: Tensor) -> Tensor:
        rows, columns = self.down * self.height, self.across * self.width
        return matrix[self.top : self.top + rows, self.left : self.left + columns]


def grids(shape: Sequence[int], chunk: int) -> list[Grid]:
    """The chunks of a matrix, at most chunk x chunk, of at most four sizes that differ by one."""
    rows, columns = (_runs(n, chunk) for n in shape)
    return [Grid(*vertical, *horizontal) for vertical in rows for horizontal in columns]


def _runs(n: int, chunk: int) -> list[tuple[int, int, int]]:
    """(start, count, length) of as few runs of at most `chunk` as n takes, the longer ones first."""
    count = -(-n // chunk)
    length, longer = divmod(n, max(count, 1))
    runs = [(0, longer, length + 1), (longer * (length + 1), count - longer, length)]
    return [run for run in runs if run[1]]


@cache
def cosines(n: int, device: torch.device) -> Tensor:
    """(n, n) f32: the orthonormal DCT-II; row k is the cosine of frequency k."""
    k, i = np.arange(n)[:, None], np.arange(n)[None, :]
    rows = np.sqrt(np.where(k == 0, 1, 2) / n) * np.cos(np.pi * (2 * i + 1) * k / (2 * n))
    return torch.from_numpy(rows.astype(np.float32)).to(device)


def _matrix(p: Tensor) -> Tensor:
    """A parameter as a matrix (first, rest), a vector as one row."""
    return p.detach().reshape(len(p), -1) if p.dim() > 1 and p.numel() else p.detach().reshape(1, -1)
