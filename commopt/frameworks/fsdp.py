"""A method between the replicas of an FSDP2 model, or in place of its reduce-scatter."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn import Module

from commopt.choice import Choice, read_choice
from commopt.errors import AttachError, CheckpointError, GradientsChanged
from commopt.exchange.mean import Aggregator
from commopt.frameworks.fsdp_scatter import CompressedReduceScatter, ScatterMean
from commopt.frameworks.fsdp_units import Mesh, Unit, Way, check_torch, find_units, local, mesh_of, way_of
from commopt.gossip.loop import OuterLoop
from commopt.groups import Group, TorchGroup
from commopt.methods import is_outer_method, is_update_method
from commopt.run.agree import Configuration, agree, check_group, configuration_of, meeting_group
from commopt.run.base import ATTACHED, Attachment, check_optimizer, check_parameters, connect
from commopt.run.door import made
from commopt.wire.payload import Payload


class FSDPAttachment(Attachment):
    """What FSDP's two ways to average have in common: state by shard, and one decision on every shard about what is left out.

    A gradient with a NaN or an inf is void in the shards that hold it. Before the optimizer steps, the shards of a replica agree
    in one all-reduce of 4 bytes whether there is any, and then leave the same parameters out everywhere.
    """

    def __init__(
        self,
        model: Module,
        method: Aggregator,
        optimizer: torch.optim.Optimizer | None,
        group: Group,
        units: list[Unit],
        mesh: Mesh,
    ) -> None:
        self.units, self.mesh = units, mesh
        self._left_out: set[str] = set()
        super().__init__(model, method, optimizer, group)
        self._settings = [self._set_up(unit) for unit in units]

    def _set_up(self, unit: Unit) -> Callable[[], None]:
        """Take over a unit's exchange; return what gives it back."""
        raise NotImplementedError

    def detach(self) -> None:
        """Give every exchange back to FSDP."""
        for give_back in self._settings:
            give_back()
        self._settings.clear()
        super().detach()

    def checkpoint_folder(self, folder: Path) -> Path:
        raise CheckpointError(
            f"{folder}: commopt.run.checkpoint does not write sharded models: save model and optimizer by torch.distributed.checkpoint, "
            "and attachment.comm_state() of each rank beside them; see docs/fsdp.md"
        )

    def replicas_are_equal(self) -> bool:
        """Whether all replicas hold the same shards, bit for bit; all ranks must ask. Sends 32 bytes."""
        raise NotImplementedError

    def exchange_unit(self, unit: Unit, flat: Tensor, work: Callable[[], str | None]) -> None:
        """Run one unit's exchange, `work`, which returns the parameter that made it void; what every way does around it."""
        start = time.perf_counter()
        names = [piece.name for piece in unit.pieces]
        if self.is_update_method and any(name in self._exchanged for name in names):
            raise GradientsChanged(
                f"{unit.label}: a second exchange before {self.method.name}.step(), which must follow every one; to accumulate "
                "gradients, call model.set_requires_gradient_sync(False) before all but the last backward"
            )
        # a gradient that is there was exchanged in an earlier backward of this step, and stays void if it was
        self._left_out.difference_update(name for name in names if self.parameters[name].grad is None)
        with torch.no_grad():
            if work() is not None:
                self._left_out.update(names)
        self.waited_s += time.perf_counter() - start

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any = (), kwargs: Any = None) -> None:
        for name in self._left_out_anywhere():
            self.parameters[name].grad = None
        self._void_names.clear()
        super()._before_step(optimizer, args, kwargs)

    def _left_out_anywhere(self) -> list[str]:
        """Parameters that some shard has to leave out, and those that clipping by their norm has spread a NaN to."""
        device = next(iter(self.parameters.values())).device
        is_any = torch.tensor([len(self._left_out)], dtype=torch.int32, device=device)
        dist.all_reduce(is_any, dist.ReduceOp.MAX, group=self.mesh.shard_group)
        if not int(is_any):
            return []
        is_bad = [
            name in self._left_out or (p.grad is not None and not bool(local(p.grad).isfinite().all()))
            for name, p in self.parameters.items()
        ]
        flags = torch.tensor(is_bad, dtype=torch.int32, device=device)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.mesh.shard_group)
        return [name for name, flag in zip(self.parameters, flags.tolist(), strict=True) if flag]

    def _after_step(self, *_: Any) -> None:
        self._left_out.clear()
        super()._after_step()


class ReplicaAttachment(FSDPAttachment):
    """Averages each shard's gradient with the same shard of the other replicas, as soon as FSDP has reduced it within its own.

    FSDP's own all-reduce between replicas is left with one rank, and the all-reduce hook exchanges in its place.
    """

    def __init__(self, model: Module, *arguments: Any) -> None:
        self._alone: dist.ProcessGroup | None = None
        super().__init__(model, *arguments)
        with torch.no_grad():
            for x in (*model.parameters(), *model.buffers()):
                own = local(x)
                if own.numel():
                    flat = own.contiguous().view(-1)
                    self.group.broadcast(flat.view(torch.uint8) if flat.dtype == torch.bool else flat)
                    own.copy_(flat.view_as(own))

    def served(self) -> list[tuple[str, Tensor]]:
        """This rank's shards, instead of the DTensors that they are part of; where a parameter has none here, it is left out."""
        return [(name, shard) for name, p in self.parameters.items() if (shard := local(p).detach()).numel()]

    def _set_up(self, unit: Unit) -> Callable[[], None]:
        group, info = unit.param_group, unit.param_group.mesh_info
        before = (group.gradient_divide_factor, group.reduce_scatter_unused_params)
        if self.mesh.replicate_group is not None:
            if self._alone is None:
                self._alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
            info.replicate_process_group = self._alone
            total = before[0] if before[0] is not None else self.mesh.shards * self.group.size
            unit.module.set_gradient_divide_factor(total / self.group.size)
        divisor = group.gradient_divide_factor
        unit.module.set_all_reduce_hook(partial(self._hook, unit, divisor))
        # without it the flat gradient would hold only the parameters that were used, and not say which
        unit.module.set_reduce_scatter_unused_params(True, recurse=False)

        def give_back() -> None:
            group._all_reduce_hook = None
            group.gradient_divide_factor, group.reduce_scatter_unused_params = before
            if self.mesh.replicate_group is not None:
                info.replicate_process_group = self.mesh.replicate_group

        return give_back

    def _hook(self, unit: Unit, divisor: float | None, flat: Tensor) -> None:
        _check_untouched(unit, divisor)
        if flat.numel() != unit.numel:
            raise AttachError(
                f"{unit.label}: a parameter was frozen or thawed after attach: detach(), and attach again"
            )
        if self.mesh.replicate_group is None and not unit.param_group.all_reduce_grads:
            raise AttachError(
                f"{unit.label}: set_requires_all_reduce(False) takes a mesh with a replicate dimension; use "
                "set_requires_gradient_sync(False)"
            )

        def work() -> str | None:
            bucket = unit.bucket(flat, self.mesh.shard)
            if not bucket.names:
                return None
            self.run([bucket])
            unit.fill(flat, bucket, self.mesh.shard)
            return bucket.void

        self.exchange_unit(unit, flat, work)

    def replicas_are_equal(self) -> bool:
        own = torch.cat([local(p).contiguous().view(-1).view(torch.uint8) for p in self.parameters.values()])
        differ = torch.tensor([not equal_everywhere(own, self.group)], dtype=torch.int32, device=own.device)
        dist.all_reduce(differ, dist.ReduceOp.MAX, group=self.mesh.shard_group)
        return not int(differ)


class ShardAttachment(FSDPAttachment):
    """Compresses the reduce-scatter: each rank sends every other its shard's gradient in compressed form, and averages what it gets."""

    method: ScatterMean

    def _set_up(self, unit: Unit) -> Callable[[], None]:
        group = unit.param_group
        before = (group._reduce_scatter_comm, group.reduce_scatter_unused_params)
        unit.module.set_custom_reduce_scatter(cast(Any, CompressedReduceScatter(partial(self._scatter, unit))))
        unit.module.set_reduce_scatter_unused_params(True, recurse=False)

        def give_back() -> None:
            group._reduce_scatter_comm, group.reduce_scatter_unused_params = before

        return give_back

    def _scatter(self, unit: Unit, output: Tensor, flat: Tensor) -> None:
        """flat: (S n,) this rank's gradient for each shard; output: (n,) the mean of what all ranks have for this one."""
        _check_untouched(unit, None)
        if output.numel() != unit.numel:
            raise AttachError(
                f"{unit.label}: a parameter was frozen or thawed after attach: detach(), and attach again"
            )

        def work() -> str | None:
            bucket = self.method.bucket(unit, flat)
            self.run([bucket])
            output.copy_(flat.view(self.mesh.shards, -1)[self.mesh.shard])
            return bucket.void

        self.exchange_unit(unit, flat, work)

    def replicas_are_equal(self) -> bool:
        return True  # there is one


def attach(
    model: Module,
    method: Aggregator | Choice,
    optimizer: torch.optim.Optimizer | None = None,
    group: Group | None = None,
) -> FSDPAttachment:
    """Average the gradients of a model that `fully_shard` has sharded.

    On a mesh with a replicate and a shard dimension, any gradient method averages between the replicas, shard by shard; within a
    replica FSDP reduces as ever. On a mesh of one dimension `two_way`, `natural`, `qsgd` and `fp16` compress the
    reduce-scatter itself; or, with a `group` of the ranks that hold the same shard elsewhere, any gradient method averages over that group.
    optimizer: the one that steps, made from model.parameters() after fully_shard. Shards and buffers are first made those of the
    first replica. Parameters without a gradient in a step get one of zeros, as their units are exchanged as a whole.

    Gradient accumulation: model.set_requires_gradient_sync(False) or set_requires_all_reduce(False) for all but the last backward.
    Raises AttachError if they do not fit together, or ranks disagree, on every rank and before anything is changed.
    """
    if isinstance(model, FullyShardedDataParallel):
        raise AttachError(
            "FullyShardedDataParallel, the first FSDP, has no place for a method: use fully_shard instead"
        )
    if isinstance(getattr(model, "_orig_mod", None), FSDPModule):
        raise AttachError(
            "this is torch.compile around a sharded model: attach to the sharded model first, then compile it"
        )
    if not isinstance(model, FSDPModule):
        raise AttachError(
            f"{type(model).__name__} is not sharded: call fully_shard(model, mesh=...) first, on the root too"
        )
    if model in ATTACHED:
        raise AttachError("a method is attached to this model already; call detach() on what attach returned first")
    check_torch(model)
    mesh = mesh_of(model)
    configuration: Configuration = {}

    def check() -> tuple[tuple[Aggregator, list[Unit], Way], Configuration]:
        check_group(group)
        way, units = way_of(mesh, group), find_units(model)
        _check_kind(method)
        built: Aggregator = made(method, model, optimizer)
        stepping = check_optimizer(built, optimizer)
        _check_method(built)
        chosen = built if way == "replicas" else ScatterMean.like(built, units)
        named = check_parameters(model, chosen, stepping)
        if way == "replicas" and mesh.replicate_group is not None and mesh.replicate_group.size() == 1:
            raise AttachError("the mesh has one replica, and nothing to average; leave commopt out")
        configuration.update(
            configuration_of("fsdp", built, named, stepping, way=way, units=[unit.label for unit in units])
        )
        return (chosen, units, way), configuration

    between = meeting_group(group, mesh.replicate_group or mesh.shard_group)
    chosen, units, way = agree(between, lambda: (agree(TorchGroup(mesh.shard_group), check), configuration))
    if way == "replicas":
        return ReplicaAttachment(model, chosen, optimizer, group or connect(mesh.replicate_group), units, mesh)
    return ShardAttachment(model, chosen, optimizer, group or connect(mesh.shard_group), units, mesh)


def equal_everywhere(x: Tensor, group: Group) -> bool:
    """Whether every rank of a group has the same bytes. Sends 32."""
    digest = hashlib.sha256(x.cpu().numpy().tobytes()).digest()
    own = torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(x.device)
    group.traffic.bucket = "parameter hashes"
    return all(torch.equal(own, other.tensors[0]) for other in group.all_gather(Payload.of(own)))


def _check_kind(method: Any) -> None:
    """Raise AttachError for update and outer methods, before one is built."""
    is_built = isinstance(method, Aggregator | OuterLoop)
    name = method.name if is_built else read_choice(method)[0]
    if isinstance(method, OuterLoop) or (not is_built and is_outer_method(name)):
        raise AttachError(
            f"{name} averages whole parameters now and then, and FSDP keeps a shard of each on every rank: use integrations.plain "
            "on a model that is not sharded, or a gradient method here"
        )
    if isinstance(method, torch.optim.Optimizer) or (not is_built and is_update_method(name)):
        raise AttachError(
            f"{name} is an optimizer with state of its own, which is not kept by shard: use a gradient method, as two_way or "
            "powersgd, beside an optimizer of yours, or integrations.ddp"
        )


def _check_method(method: Aggregator) -> None:
    if method.max_norm is not None:
        raise AttachError(
            "max_norm needs the gradients of all shards at once: leave it out, and call "
            "torch.nn.utils.clip_grad_norm_(model.parameters(), ...) after backward, when they are averaged"
        )
    if method.merges_buckets:
        raise AttachError(
            f"{method.name} with one scale, or norm, for the whole model cannot work by shard; use another"
        )
    if method.grad_scaler is not None:
        raise AttachError("grad_scaler: FSDP's shards do not share a GradScaler's decisions here; train in bfloat16")


def _check_untouched(unit: Unit, divisor: float | None) -> None:
    group = unit.param_group
    if group.gradient_divide_factor != divisor or group.force_sum_reduction_for_comms:
        raise AttachError(
            f"{unit.label}: set_gradient_divide_factor and set_force_sum_reduction_for_comms come before attach, which builds on them"
        )
