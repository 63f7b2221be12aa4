"""A reduce-scatter of compressed gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from commopt.compress import Cast
from commopt.compress.feedback import NOTHING_KEPT, first_bad_parameter
from commopt.errors import AttachError, CheckpointError
from commopt.exchange.compressed import Compressed
from commopt.frameworks.fsdp_units import Unit
from commopt.groups import Group
from commopt.method import GradientMethod, Method
from commopt.methods import FP16, QSGD, NaturalMean, TwoWay
from commopt.wire.bucket import Blocks, Bucket, ParameterIndex
from commopt.wire.state import Saved

_ONE_WAY = (TwoWay, NaturalMean, QSGD)


def scatter_facts(method: Method) -> dict[str, object]:
    """Why a method cannot compress a reduce-scatter, for `refuse`."""
    if not isinstance(method, _ONE_WAY):
        return {
            "scatter exact": method.name == "dense",
            "scatter of another method": type(method) is not FP16 and ", ".join(one.name for one in (*_ONE_WAY, FP16)),
        }
    codec = method.compressor
    return {
        "scatter server": getattr(method, "server_compressor", codec) != codec,
        "scatter dense_1d": method.dense_1d,
        "scatter codec": (codec.is_ragged or codec.shared_scale or codec.shares_keys) and str(codec),
    }


class ScatterMean(GradientMethod, Compressed):
    """The mean of compressed gradients, of which each rank keeps its shard: the first half of a two-way mean, and no answer.

        q_ij = C(g_ij + e_ij) to rank j;  e_ij <- g_ij + e_ij - q_ij;  rank j keeps mean_i q_ij
    Sends (N-1)/N compressed gradients. State: with error feedback a residual of the whole gradient on every rank, 4 bytes per
    parameter of the model, or 2 or 1 with residual_bits 16 or 8; it lies as the gradient does, in registration order.

    method: whose name, options and codec it has.
    """

    def __init__(self, method: Method, units: Sequence[Unit]) -> None:
        self.name, self.options, self.given = method.name, method.options, method.given  # type: ignore[misc]
        self.units = {unit.label: unit for unit in units}
        if isinstance(method, FP16):
            assert method.wire_dtype is not None
            Compressed.__init__(self, Cast(method.wire_dtype), NOTHING_KEPT)
        else:
            assert isinstance(method, Compressed)
            Compressed.__init__(self, method.compressor, method.kept, seed=method.seed)

    def lay_out(self, named_parameters: Sequence[tuple[str, Tensor]], group: Group) -> None:
        super().lay_out(named_parameters, group)
        self.messages = {
            label: [self._message(unit, shard) for shard in range(group.size)] for label, unit in self.units.items()
        }
        every = [blocks for messages in self.messages.values() for blocks in messages]
        fields = ("starts", "homes", "lengths", "parameters", "groups")
        self.everything = Blocks(*(np.concatenate([getattr(blocks, key) for blocks in every]) for key in fields))

    def bucket(self, unit: Unit, flat: Tensor) -> Bucket:
        """A unit's gradient for all shards: names and where they begin in the first one's."""
        found = unit.starts(0)
        return Bucket(flat, tuple(name for name, _, _ in found), tuple(start for _, start, _ in found), unit.label)

    def exchange(self, bucket: Bucket, group: Group) -> None:
        """Overwrite this rank's part of bucket.flat, (S n,), by the mean over ranks."""
        if group.size == 1:  # communication is off
            return self.exchange_alone(bucket)
        messages = [self.keyed(blocks, self.compressor) for blocks in self.messages[bucket.label]]
        sent = self.worker.compress(bucket.flat, messages)
        received = group.all_to_all(sent)
        bad = first_bad_parameter(received)  # of any rank's whole gradient, so that all shards decide alike
        if bad >= 0:
            self.worker.undo(bucket.flat, sent, messages)
            return self._void(bucket, bad)
        bucket.flat.view(group.size, -1)[group.rank].zero_()
        for payload in received:  # in rank order: float sums depend on it
            self.compressor.decompress_(
                payload.tensors[1:], messages[group.rank], bucket.flat, alpha=1 / group.size, add=True
            )
        return self.forget(self.worker, messages)

    def bytes_per_parameter(self, ranks: int) -> float:
        return (ranks - 1) / ranks * self.compressor.bytes_per_element(ranks)

    def resize(self, every: Sequence[Saved]) -> None:
        raise CheckpointError(
            f"{self.name}: the residuals of a reduce-scatter continue only at the same number of ranks"
        )

    def _message(self, unit: Unit, shard: int) -> Blocks:
        """The blocks of what goes to one shard: where they begin in the unit's gradient, and in the residual of the whole model."""
        numels, firsts = np.zeros(len(self.index.names), np.int64), np.zeros(len(self.index.names), np.int64)
        for piece in unit.pieces:
            k = self.index.position[piece.name]
            numels[k], firsts[k] = piece.numels[shard], sum(piece.numels[:shard])
        index = ParameterIndex(self.index.names, tuple(numels.tolist()))
        empty = frozenset(name for name, n in zip(index.names, index.numels, strict=True) if not n)
        found = unit.starts(shard)
        row = shard * unit.numel
        bucket = Bucket(torch.empty(0), tuple(name for name, _, _ in found), tuple(row + s for _, s, _ in found))
        blocks = self.compressor.table(index, 1, empty).all_of(bucket)
        within = blocks.homes - index.offsets[blocks.parameters]
        return dataclasses.replace(blocks, homes=(self.index.offsets[:-1] + firsts)[blocks.parameters] + within)


class CompressedReduceScatter:
    """What FSDP calls in place of its reduce-scatter: scatter(output, input).

    It has the methods of torch's ReduceScatter without being one: a torch without that is refused at attach, not at import.
    """

    def __init__(self, scatter: Callable[[Tensor, Tensor], None]) -> None:
        self.scatter = scatter

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        if op != dist.ReduceOp.AVG:
            raise AttachError(f"FSDP asks for a reduce-scatter by {op}; leave out set_gradient_divide_factor")
        self.scatter(output_tensor, input_tensor)
