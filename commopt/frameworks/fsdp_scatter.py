"""A reduce-scatter of compressed gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from commopt import kernels
from commopt.compress import Cast
from commopt.compress.feedback import first_bad_parameter
from commopt.errors import AttachError, CheckpointError
from commopt.exchange.compressed import Compressed
from commopt.exchange.mean import Aggregator, State, check_alone
from commopt.frameworks.fsdp_units import Unit
from commopt.groups import Group
from commopt.methods import FP16, QSGD, NaturalMean, TwoWay
from commopt.wire.bucket import Blocks, Bucket, ParameterIndex

_FSDPS_OWN = ("DefaultReduceScatter", "ProcessGroupAllocReduceScatter")
_ONE_WAY = (TwoWay, NaturalMean, QSGD)


class ScatterMean(Compressed):
    """The mean of compressed gradients, of which each rank keeps its shard: the first half of a two-way mean, and no answer.

        q_ij = C(g_ij + e_ij) to rank j;  e_ij <- g_ij + e_ij - q_ij;  rank j keeps mean_i q_ij
    Sends (N-1)/N compressed gradients. State: with error feedback a residual of the whole gradient on every rank, 4 bytes per
    parameter of the model, or 2 or 1 with residual_bits 16 or 8; it lies as the gradient does, in registration order.
    """

    name = "scatter_mean"

    @classmethod
    def like(cls, method: Aggregator, units: Sequence[Unit]) -> ScatterMean:
        """The reduce-scatter with a method's codec and options. Raises AttachError for a method that has none."""
        if isinstance(method, FP16):
            assert method.wire_dtype is not None
            made = cls(Cast(method.wire_dtype), error_feedback=False)
        elif type(method) not in _ONE_WAY:
            names = ", ".join(one.name for one in (*_ONE_WAY, FP16))
            exact = "; FSDP's own is exact" if method.name == "dense" else ""
            raise AttachError(
                f"{method.name} is no reduce-scatter{exact}: on a mesh of one dimension use {names}, or give FSDP a mesh with a "
                "replicate dimension, between whose replicas any gradient method works"
            )
        else:
            made = cls._of(method)  # type: ignore[arg-type]
        for unit in units:
            if unit.param_group.gradient_divide_factor is not None:
                raise AttachError(
                    f"{unit.label}: set_gradient_divide_factor: a compressed reduce-scatter takes the mean; leave it out"
                )
            if type(unit.param_group._reduce_scatter_comm).__name__ not in _FSDPS_OWN:
                raise AttachError(f"{unit.label}: has a custom reduce-scatter already, and FSDP takes only one")
        made.name, made.units = method.name, {unit.label: unit for unit in units}
        return made

    @classmethod
    def _of(cls, method: Compressed) -> ScatterMean:
        codec = method.compressor
        if getattr(method, "server_compressor", codec) != codec:
            raise AttachError(f"{method.name}: server: a reduce-scatter has no answers to compress; leave it out")
        if method.dense_1d:
            raise AttachError(f"{method.name}: dense_1d: not supported in a reduce-scatter; leave it out")
        if codec.is_ragged or codec.shared_scale or codec.shares_keys:
            raise AttachError(
                f"{codec}: has one scale for a whole parameter, or no fixed length; use int8, 4bit, fp8, sign, natural or qsgd"
            )
        return cls(
            codec,
            error_feedback=method.residual_bits > 0,
            residual_bits=method.residual_bits or 32,
            residual_decay=method.residual_decay,
            reset_every=method.reset_every,
            seed=method.seed,
        )

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.units: dict[str, Unit] = {}

    def bind(self, named_parameters: Sequence[tuple[str, Tensor]], group: Group) -> None:
        Aggregator.bind(self, named_parameters, group)
        self.device = named_parameters[0][1].device
        kernels.warm_up(self.device)
        self.messages = {
            label: [self._message(unit, shard) for shard in range(group.size)] for label, unit in self.units.items()
        }
        every = [blocks for messages in self.messages.values() for blocks in messages]
        everything = dataclasses.replace(every[0], homes=np.concatenate([blocks.homes for blocks in every]))
        self.worker = self.feedback(self.compressor, self.index.total, everything)

    def bucket(self, unit: Unit, flat: Tensor) -> Bucket:
        """A unit's gradient for all shards: names and where they begin in the first one's."""
        found = unit.starts(0)
        return Bucket(flat, tuple(name for name, _, _ in found), tuple(start for _, start, _ in found), unit.label)

    def aggregate(self, bucket: Bucket, group: Group) -> None:
        """Overwrite this rank's part of bucket.flat, (S n,), by the mean over ranks."""
        if group.size == 1:  # communication is off
            return check_alone(self, bucket)
        messages = [self.keyed(blocks, self.compressor) for blocks in self.messages[bucket.label]]
        self.forget(self.worker, messages)
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
        return None

    def bytes_per_parameter(self, ranks: int) -> float:
        return (ranks - 1) / ranks * self.compressor.bytes_per_element(ranks)

    def load_resharded(self, states: Iterable[State]) -> None:
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
