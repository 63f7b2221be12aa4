"""What takes the place of FSDP2's reduce-scatter: exchanges of which each rank keeps its shard."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from commopt.compress.base import Compressor
from commopt.compress.cast import Cast
from commopt.compress.feedback import NOTHING_KEPT, Kept, first_bad_parameter, first_of
from commopt.exchange.base import Exchange, first_bad, is_finite
from commopt.exchange.compressed import Compressed
from commopt.frameworks.fsdp_units import Piece, Unit
from commopt.groups import Group
from commopt.method import GradientMethod, Method
from commopt.methods import FP16
from commopt.methods.auto import codec_of
from commopt.wire.bucket import Blocks, Bucket, Share
from commopt.wire.payload import Payload


class Scatter(Compressed):
    """The mean of compressed gradients, of which each rank keeps its shard: a two-way mean without the answer.

        q_ij = C(g_ij + e_ij) to rank j;  e_ij <- g_ij + e_ij - q_ij;  rank j keeps mean_i q_ij
    Sends (N-1)/N compressed gradients. State: with error feedback a residual of the whole gradient on every rank, 4 bytes per
    parameter of the model, or 2 or 1 with residual_bits 16 or 8; it lies as the gradient does, in registration order.
    """

    def __init__(
        self, units: Sequence[Unit], compressor: Compressor, kept: Kept | None = None, *, seed: int = 0
    ) -> None:
        super().__init__(compressor, kept, seed=seed)
        self.units = {unit.label: unit for unit in units}

    def lay_out(self, named_parameters: Sequence[tuple[str, Tensor]], group: Group) -> None:
        super().lay_out(named_parameters, group)
        numels = {piece.name: piece.numels for unit in self.units.values() for piece in unit.pieces}
        edges = np.array([np.cumsum([0, *numels[name]]) for name in self.index.names])  # (P, S + 1)
        shards = [Share(self.index, edges, rank) for rank in range(group.size)]
        self.messages = {key: [self._message(unit, shard) for shard in shards] for key, unit in self.units.items()}
        every = [blocks for messages in self.messages.values() for blocks in messages]
        fields = ("starts", "homes", "lengths", "parameters", "groups")
        starts, homes, *others = (np.concatenate([getattr(blocks, key) for blocks in every]) for key in fields)
        self.everything = Blocks(starts, homes, others[0], others[1], others[2])

    def exchange(self, bucket: Bucket, group: Group) -> None:
        """Overwrite this rank's part of bucket.flat, (S n,), by the mean over ranks."""
        if group.size == 1:  # communication is off
            return self.exchange_alone(bucket, group)
        messages = [self.keyed(blocks, self.compressor) for blocks in self.messages[bucket.label]]
        sent = self.worker.compress(bucket.flat, messages)
        received = group.all_to_all(sent)
        first = first_bad_parameter(received)  # of any rank's whole gradient: all shards decide alike
        if self.is_void(bucket, first, group):
            return self.worker.undo(bucket.flat, sent, messages)
        bucket.flat.view(group.size, -1)[group.rank].zero_()
        for payload in received:  # in rank order: float sums depend on it
            self.compressor.decompress_(
                payload.tensors[1:], messages[group.rank], bucket.flat, alpha=1 / group.size, add=True
            )
        return self.forget(self.worker, messages)

    def bytes_per_parameter(self, ranks: int) -> float:
        return (ranks - 1) / ranks * self.compressor.bytes_per_element(ranks)

    def _message(self, unit: Unit, shard: Share) -> Blocks:
        """The blocks sent to one shard: where they begin in the unit's gradient, and in the residual of the whole model."""
        own = unit.over(torch.empty(0, dtype=torch.float32), shard.rank, shard.rank * unit.numel)
        blocks = self.compressor.table(shard.index, 1).all_of(own)
        moved = self.index.offsets[:-1] + shard.starts - shard.index.offsets[:-1]
        return blocks.having(homes=blocks.homes + moved[blocks.parameters])


class ScatterMean(GradientMethod, Scatter):
    """A scatter by the name, options and codec of a method."""

    def __init__(self, method: Method, units: Sequence[Unit]) -> None:
        self.name, self.options, self.given = method.name, method.options, method.given  # type: ignore[misc]
        if isinstance(method, FP16):
            assert method.wire_dtype is not None
            Scatter.__init__(self, units, Cast(method.wire_dtype), NOTHING_KEPT)
        else:
            assert isinstance(method, Compressed)
            Scatter.__init__(self, units, method.compressor, method.kept, seed=method.seed)


class ExactScatter(Exchange):
    """The exact mean of gradients, of which each rank keeps its shard. Sends (N-1)/N gradients in their own dtype."""

    needs_float32 = False

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = {unit.label: unit for unit in units}

    def exchange(self, bucket: Bucket, group: Group) -> None:
        """Overwrite this rank's part of bucket.flat, (S n,), by the mean over ranks."""
        if group.size == 1:  # communication is off
            return self.exchange_alone(bucket, group)
        unit, flat, shards = self.units[bucket.label], bucket.flat, range(group.size)
        every = [unit.over(flat, shard, shard * unit.numel) for shard in shards]
        bad = -1 if is_finite(flat) else first_of(first_bad(self.index, part) for part in every)
        header = torch.tensor([bad], dtype=torch.int32, device=flat.device)
        rows = flat.view(group.size, -1)
        received = group.all_to_all([Payload.of(header, row) for row in rows])
        if not self.is_void(bucket, first_bad_parameter(received), group):
            rows[group.rank] = sum(payload.tensors[1] / group.size for payload in received)
        return None

    def bytes_per_parameter(self, ranks: int) -> float:
        return 4 * (ranks - 1) / ranks


def candidate(units: Sequence[Unit], shards: int, name: str, elements: int) -> Exchange:
    """One of `auto`'s candidates in place of a reduce-scatter; elements: of one parameter "x", or 0 for the units."""
    if elements:
        pieces = (Piece("x", (elements // shards,) * shards, elements // shards),)
        units = [Unit(Bucket.label, cast(Any, None), None, pieces)]
    if name == "dense":
        return ExactScatter(units)
    if name == "fp16":
        return Scatter(units, Cast(), NOTHING_KEPT)
    return Scatter(units, codec_of(name))
