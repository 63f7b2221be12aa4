"""What the exchanges of compressed buckets share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from commopt import kernels
from commopt.compress.base import Compressor
from commopt.compress.feedback import ErrorFeedback, Kept, first_bad_parameter, first_of, try_out
from commopt.compress.fused import Fused
from commopt.exchange.base import Exchange, first_bad
from commopt.groups.base import Group
from commopt.kernels.reference.runs import element_indices
from commopt.wire.bucket import Blocks, Bucket, Int64Array, ParameterIndex
from commopt.wire.payload import Payload, joined, noted, parameter
from commopt.wire.residual import Moved
from commopt.wire.state import Saved, State


class Compressed(Exchange):
    """Worker residuals, the cached cut of each bucket, and parameters that stay dense.

    kept: what becomes of what a message left out. dense_1d: average parameters with fewer than two dimensions exactly.
    seed: of stochastic rounding.
    """

    _unread: Bucket | None = (
        None  # parameters that have been averaged, of which nobody knows yet whether they are finite
    )

    def __init__(
        self, compressor: Compressor, kept: Kept | None = None, *, dense_1d: bool = False, seed: int = 0
    ) -> None:
        self.compressor, self.kept = compressor, kept or Kept()
        self.dense_1d, self.seed = dense_1d, seed

    def lay_out(self, named_parameters: Sequence[tuple[str, Tensor]], group: Group) -> None:
        super().lay_out(named_parameters, group)
        self.dense_names = frozenset(name for name, p in named_parameters if self.stays_dense(name, p))
        self.table = self.compressor.table(self.index, group.size, self.dense_names).of_share(self.share)
        self.everything = self.table.everything  # what this side will ever compress
        self.served = self.table.served_by(group.rank)

    def declare(self) -> list[State]:
        return [*super().declare(), *self.residual("worker_residual", self.everything, self.own_index)]

    def bound(self) -> None:
        super().bound()
        self.worker = self.feedback("worker_residual", self.compressor, self.everything)

    def index_of(self, blocks: Blocks, numbers: Int64Array | None) -> ParameterIndex:
        """The layout of state that has so many numbers for each block, one if None; blocks lie parameter after parameter."""
        numels = np.bincount(blocks.parameters, numbers, len(self.index.names)).astype(np.int64)
        return ParameterIndex(self.index.names, tuple(numels.tolist()))

    def residual(self, name: str, blocks: Blocks, index: ParameterIndex) -> list[State]:
        """The state of one side's residual: its elements, and in 8 bits a scale for each block."""
        if not self.kept.bits:
            return []
        found = [State(name, index=index, held="rank", on_resize="own", dtype=self.kept.dtype)]
        if self.kept.bits == 8:
            scales = self.index_of(blocks, None)
            found.append(State(f"{name}_scales", index=scales, held="rank", on_resize="own"))
        return found

    def feedback(self, name: str, compressor: Compressor, blocks: Blocks) -> ErrorFeedback:
        """Error feedback of one side over the residual of that name."""
        residual, scales = self.state.get(name), self.state.get(f"{name}_scales")
        try_out(compressor, self.kept, self.device)
        return ErrorFeedback(compressor, self.kept, blocks, self.device, residual=residual, scales=scales)

    def stays_dense(self, name: str, p: Tensor) -> bool:
        """Whether a parameter is averaged exactly."""
        return self.dense_1d and p.dim() < 2

    def compressed_views(self, bucket: Bucket) -> list[tuple[str, Tensor]]:
        """(name, (n,) view) of each parameter of a bucket that is compressed."""
        return [(name, x) for name, x in bucket.views() if name not in self.dense_names]

    def keyed(self, blocks: Blocks, compressor: Compressor, purpose: str = "worker") -> Blocks:
        """The blocks with this exchange's random keys, if the codec or the residual needs them."""
        if not compressor.stochastic and self.kept.bits != 8:
            return blocks
        rank = 0 if compressor.shares_keys else self.rank
        by = (self.seed, purpose, rank, self.exchanges.numpy())
        if kernels.has_triton(self.device):  # where kernels draw
            blocks = blocks.worded(*by)
            if isinstance(compressor, Fused) or not compressor.stochastic:
                return blocks
        return blocks.having(keys=blocks.drawn(*by))

    def forget(self, feedback: ErrorFeedback, parts: Sequence[Blocks]) -> None:
        """Clear the residual of parameters whose time has come by `reset_every`, at the end of an exchange that is not void."""
        every = self.kept.reset_every
        if every is None or not self.kept.bits:
            return
        counts = self.exchanges.numpy()
        due = np.flatnonzero((counts + 1) % every == 0)
        if len(np.intersect1d(due, np.concatenate([blocks.own_parameters for blocks in parts]))):
            feedback.clear([blocks.only(np.flatnonzero(np.isin(blocks.parameters, due))) for blocks in parts])

    def exchange(self, bucket: Bucket, group: Group) -> None:
        if group.size == 1:
            self.exchange_alone(bucket, group)
        elif self.average_dense(bucket, group):
            if not self.dense_names.issuperset(bucket.names):
                self.exchange_blocks(bucket, self.table.all_of(bucket), group)
            elif self._unread is not None:
                self.is_void(bucket, self.first_bad_in([]), group)

    def pieces(self, numel: int, ranks: int) -> Sequence[int]:
        return [numel] if self.compressor.shared_scale else self.compressor.block_lengths(numel, ranks)

    def exchange_blocks(self, bucket: Bucket, blocks: Blocks, group: Group) -> None:
        """Exchange the blocks of a bucket between two ranks or more; the rest has been averaged."""
        raise NotImplementedError

    def average_dense(self, bucket: Bucket, group: Group) -> bool:
        """Average the parameters that are not compressed, exactly; False if that made the bucket void, which a GPU tells later."""
        if self.dense_names.isdisjoint(bucket.names):
            return True
        dense = Bucket.of([(name, x) for name, x in bucket.views() if name in self.dense_names])
        if kernels.has_triton(self.device):
            dense.flat /= group.size
            group.all_reduce(dense.flat)
            self._unread = dense
        elif not self.average_(dense, group):
            bucket.void = dense.void
            return False
        self.put_dense_(dense, bucket)
        return True

    def first_bad_in(self, payloads: Sequence[Payload]) -> int:
        """The first bad parameter in the headers of messages, or -1; on a GPU also among those averaged, so that the host waits once."""
        if self._unread is None:
            return first_bad_parameter(payloads)
        *found, averaged = self.told(payload.tensors[0] for payload in payloads)
        return first_of([*found, averaged])

    def gathered(
        self, x: Tensor, blocks: Blocks, group: Group, moved: Moved | Tensor | None = None
    ) -> tuple[Payload, list[Payload], int]:
        """This rank's message, those of all ranks, and the first bad parameter that they name, or -1.

        If messages have no length known beforehand, lengths travel first, with what headers say in place of their length. So the host
        waits for a GPU once.
        """
        if not self.compressor.is_ragged:
            own = self.worker.compress(x, [blocks], moved=moved)[0]
            messages = group.all_gather(own)
            return own, messages, self.first_bad_in(messages)
        rows: list[list[int]] = []
        bad = [-1]

        def tell(sizes: Tensor) -> Sequence[int]:
            every = group.all_gather(Payload(sizes.view(torch.uint8), ((torch.int64, len(sizes)),)))
            *found, bad[0] = self.told([joined(every).view(torch.int64)])
            rows.extend(np.reshape(found, (group.size, -1)).tolist())
            return rows[group.rank]

        own = self.worker.compress(x, [blocks], moved=moved, tell=tell)[0]
        if not rows:
            sizes = [noted(int(own.tensors[0])), *(n for _, n in own.layout[1:])]
            tell(torch.tensor(sizes, device=x.device))
        dtypes = [dtype for dtype, _ in own.layout]
        messages = group.all_gather(own, [tuple(zip(dtypes, (1, *row[1:]), strict=True)) for row in rows])
        return own, messages, first_of([*(parameter(row[0]) for row in rows), *bad])

    def told(self, words: Iterable[Tensor]) -> list[int]:
        """What (1,) i32 tensors hold; and the first parameter that is not finite of those averaged, or -1."""
        dense, self._unread = self._unread, None
        if dense is None:
            return [*torch.cat([*words]).tolist(), -1]
        every = [*words, dense.flat.sum(0, keepdim=True, dtype=torch.float64)]  # where each word is exact
        *found, total = torch.cat(every).tolist()
        return [*map(int, found), -1 if math.isfinite(total) else first_bad(self.index, dense)]

    def put_dense_(self, dense: Bucket, bucket: Bucket) -> None:
        """Copy the parameters that are not compressed back into their bucket."""
        own = [x for name, x in bucket.views() if name in self.dense_names]
        torch._foreach_copy_(own, [mean for _, mean in dense.views()])

    @property
    def state_form(self) -> str:
        bits = self.kept.bits
        return f"{self.compressor}, residual in {bits} bits" if bits != 32 else str(self.compressor)

    def resize(self, every: Sequence[Saved]) -> None:
        """Every new rank takes the mean of what the old ranks still had to send: the update depends on residuals only through it."""
        super().resize(every)
        if self.kept.bits:
            blocks, total = self.keyed(self.everything, self.compressor, "load"), self.unsent(every)
            self.worker.set_values(total[element_indices(blocks.homes, blocks.lengths, self.device)], blocks)

    def unsent(self, every: Sequence[Saved]) -> Tensor:
        """(total,) f32: what the ranks of another world still had to send, as a mean over them."""
        total = torch.zeros(self.index.total, device=self.device, dtype=torch.float32)
        table = self.compressor.table(self.index, len(every), self.dense_names)
        places = element_indices(table.everything.homes, table.everything.lengths, self.device)
        for saved in every:
            total[places] += self.worker.dense(saved["rank"], "worker_residual", table.everything)
        return total / len(every)
