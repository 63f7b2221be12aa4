"""A method between the replicas of an FSDP2 model, or in place of its reduce-scatter."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from commopt.errors import AttachError, CheckpointError
from commopt.frameworks.fsdp_scatter import CompressedReduceScatter, ScatterMean, scatter_facts
from commopt.frameworks.fsdp_units import Mesh, Sharding, Unit, local, sharding_of
from commopt.frameworks.plain import broadcast_
from commopt.groups import Group, LocalGroup, TorchGroup
from commopt.method import Method
from commopt.run.agree import Configuration, agree, meeting_group
from commopt.run.checks import ATTACHED, connect
from commopt.run.every_step import EveryStepRun, Prepared
from commopt.run.prepare import Checked, Request, check_request
from commopt.run.run import Run
from commopt.wire.bucket import Bucket

_CHANGED = ("_all_reduce_hook", "_reduce_scatter_comm", "gradient_divide_factor", "reduce_scatter_unused_params")


class FSDPRun(EveryStepRun):
    """What FSDP's two ways to average have in common: state by shard, and one decision on every shard about what is left out.

    A gradient with a NaN or an inf is void in the shards that hold it. Before the optimizer steps, the shards of a replica agree
    in one all-reduce of 4 bytes whether there is any, and then leave the same parameters out everywhere.
    """

    repeat_hint = "call model.set_requires_gradient_sync(False) before the other backwards"

    def __init__(self, model: Module, prepared: Prepared, group: Group, units: Sequence[Unit], mesh: Mesh) -> None:
        self.units, self.mesh = units, mesh
        self._left_out: set[str] = set()
        super().__init__(model, prepared, group)
        groups = [unit.param_group for unit in units]
        self._before = [(one, key, getattr(one, key)) for one in groups for key in _CHANGED]
        if mesh.replicate_group is not None:
            self._before += [(one.mesh_info, "replicate_process_group", mesh.replicate_group) for one in groups]
        for unit in units:
            self._take_over(unit)
            # without it the flat gradient would hold only the parameters that were used, and not say which
            unit.module.set_reduce_scatter_unused_params(True, recurse=False)

    def _take_over(self, unit: Unit) -> None:
        """Exchange in place of FSDP."""
        raise NotImplementedError

    def close(self) -> None:
        """Give every exchange back to FSDP."""
        for owner, key, value in self._before:
            setattr(owner, key, value)
        self._before.clear()
        super().close()

    def checkpoint_folder(self, folder: Path) -> Path:
        raise CheckpointError(
            f"{folder}: run.save does not write sharded models: save model and optimizer by torch.distributed.checkpoint, and "
            "run.method.saved() of each rank beside them, which run.method.load(...) takes back; see docs/fsdp.md"
        )

    def _exchange_unit(self, unit: Unit, bucket: Bucket, divisor: float | None) -> None:
        """Exchange a unit's gradient, and note what the step has to leave out."""
        start, group = time.perf_counter(), unit.param_group
        if group.gradient_divide_factor != divisor or group.force_sum_reduction_for_comms:
            raise AttachError(
                f"{unit.label}: set_gradient_divide_factor and set_force_sum_reduction_for_comms come before attach, which builds on them"
            )
        names = [piece.name for piece in unit.pieces]
        # a gradient that is there was exchanged in an earlier backward of this step, and stays void if it was
        self._left_out.difference_update(name for name in names if self.parameters[name].grad is None)
        if bucket.names:
            with torch.no_grad():
                self.exchange([bucket])
        if bucket.void is not None:
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


class ReplicaRun(FSDPRun):
    """Averages each shard's gradient with the same shard of the other replicas, as soon as FSDP has reduced it within its own.

    FSDP's own all-reduce between replicas is left with one rank, and the all-reduce hook exchanges in its place.
    """

    def __init__(self, model: Module, *arguments: Any) -> None:
        self._alone: dist.ProcessGroup | None = None
        super().__init__(model, *arguments)
        broadcast_(map(local, (*model.parameters(), *model.buffers())), self.group.broadcast)

    def served(self) -> list[tuple[str, Tensor]]:
        """This rank's shards, instead of the DTensors that they are part of; a parameter that has none here is left out."""
        return [(name, shard) for name, p in self.parameters.items() if (shard := local(p).detach()).numel()]

    def _take_over(self, unit: Unit) -> None:
        group = unit.param_group
        if self.mesh.replicate_group is not None:
            if self._alone is None:
                self._alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
            group.mesh_info.replicate_process_group = self._alone
            factor = group.gradient_divide_factor
            total = self.mesh.shards * self.group.size if factor is None else factor
            unit.module.set_gradient_divide_factor(total / self.group.size)
        unit.module.set_all_reduce_hook(partial(self._hook, unit, group.gradient_divide_factor))

    def _hook(self, unit: Unit, divisor: float | None, flat: Tensor) -> None:
        _check_size(unit, flat)
        if self.mesh.replicate_group is None and not unit.param_group.all_reduce_grads:
            raise AttachError(
                f"{unit.label}: set_requires_all_reduce(False) takes a mesh with a replicate dimension; use "
                "set_requires_gradient_sync(False)"
            )
        bucket = unit.bucket(flat, self.mesh.shard)
        self._exchange_unit(unit, bucket, divisor)
        unit.fill(flat, bucket, self.mesh.shard)

    def replicas_are_equal(self) -> bool:
        differ = torch.tensor([not super().replicas_are_equal()], dtype=torch.int32)
        differ = differ.to(next(iter(self.parameters.values())).device)
        dist.all_reduce(differ, dist.ReduceOp.MAX, group=self.mesh.shard_group)
        return not int(differ)


class ShardRun(FSDPRun):
    """Compresses the reduce-scatter: each rank sends every other its shard's gradient in compressed form, and averages what it gets."""

    method: ScatterMean

    def _take_over(self, unit: Unit) -> None:
        unit.module.set_custom_reduce_scatter(cast(Any, CompressedReduceScatter(partial(self._scatter, unit))))

    def _scatter(self, unit: Unit, output: Tensor, flat: Tensor) -> None:
        """flat: (S n,) this rank's gradient for each shard; output: (n,) the mean of what all ranks have for this one."""
        _check_size(unit, output)
        self._exchange_unit(unit, self.method.bucket(unit, flat), None)
        output.copy_(flat.view(self.mesh.shards, -1)[self.mesh.shard])

    def replicas_are_equal(self) -> bool:
        return True  # there is one


def attach(model: Module, request: Request) -> Run:
    """Average the gradients of a model that `fully_shard` has sharded.

    On a mesh with a replicate and a shard dimension, any gradient method averages between the replicas, shard by shard; within a
    replica FSDP reduces as ever. On a mesh of one dimension `two_way`, `natural`, `qsgd` and `fp16` compress the
    reduce-scatter itself; or, with a group of the ranks that hold the same shard elsewhere, any gradient method averages over that group.
    The optimizer is made from model.parameters() after fully_shard. Shards and buffers are first made those of the first replica.
    Parameters without a gradient in a step get one of zeros, as their units are exchanged as a whole.

    Gradient accumulation: model.set_requires_gradient_sync(False) or set_requires_all_reduce(False) for all but the last backward.
    """
    found, group = sharding_of(model), request.group
    mesh, units = found.mesh, found.units
    way = None if mesh is None else mesh.way(group)

    def check() -> tuple[Checked, Configuration]:
        within = LocalGroup() if mesh is None else TorchGroup(mesh.shard_group)
        checked = check_request(
            "fsdp",
            model,
            request,
            within,
            lambda method: {} if model in ATTACHED else _facts(method, request, found),
            configuration=lambda: {"way": way, "units": [unit.label for unit in units]},
            may_be_wrapped=True,
        )
        return checked, checked.configuration

    process_group = None if mesh is None else mesh.replicate_group or mesh.shard_group
    checked = agree(meeting_group(group, process_group), check)  # within a replica, and between them
    assert mesh is not None
    ours, prepared = group if isinstance(group, Group) else connect(process_group), checked.prepared()
    if way == "replicas":
        return ReplicaRun(model, prepared, ours, units, mesh)
    scatter = dataclasses.replace(prepared, method=ScatterMean(checked.method, units))
    return ShardRun(model, scatter, ours, units, mesh)


def _facts(method: Method, request: Request, found: Sharding) -> dict[str, object]:
    mesh, group = found.mesh, request.group
    way = None if mesh is None else mesh.way(group)
    replicas = None if mesh is None else mesh.replicate_group
    facts: dict[str, object] = {
        "fsdp update method": True,
        "fsdp outer method": True,
        "fsdp max_norm": request.max_norm is not None,
        "fsdp grad_scaler": request.grad_scaler is not None,
        "fsdp overlap": request.overlap is not None and f"{request.overlap}",
        "fsdp joint decision": getattr(method, "merges_buckets", False),
        **found.facts,
        "fsdp group": mesh is not None and way is None and type(group).__name__,
        "fsdp one replica": way == "replicas" and replicas is not None and replicas.size() == 1,
    }
    if way == "shards":
        return {**facts, **scatter_facts(method)}
    return {key: detail for key, detail in facts.items() if not key.startswith("scatter")}


def _check_size(unit: Unit, flat: Tensor) -> None:
    if flat.numel() != unit.numel:
        raise AttachError(f"{unit.label}: a parameter was frozen or thawed after attach: close(), and attach again")
