"""A method between the replicas of an FSDP2 model, or in place of its reduce-scatter."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from commopt.errors import AttachError, CheckpointError
from commopt.exchange.base import is_finite
from commopt.exchange.clip import clip_gradients_
from commopt.frameworks.fsdp_scatter import ScatterMean, candidate
from commopt.frameworks.fsdp_units import Mesh, Unit, Way, sharding_of
from commopt.gossip.loop import OuterMethod
from commopt.groups import Group, LocalGroup, PacedGroup, TorchGroup, World
from commopt.groups.torch import group_of
from commopt.method import Method
from commopt.methods import FP16, QSGD, NaturalMean, TwoWay
from commopt.methods.auto import Auto
from commopt.run import checks
from commopt.run.agree import Configuration, agree, meeting_group
from commopt.run.every_step import EveryStepRun
from commopt.run.machine import Machine
from commopt.run.outer import OuterRun
from commopt.run.reshare import recut, stretches_of
from commopt.run.run import Replaced, Run, broadcast_
from commopt.wire.bucket import Bucket
from commopt.wire.shards import local
from commopt.wire.state import Saved

_ONE_WAY = (TwoWay, NaturalMean, QSGD)
_CHANGED = ("_all_reduce_hook", "_reduce_scatter_comm", "gradient_divide_factor", "reduce_scatter_unused_params")


class FSDPRun(EveryStepRun):
    """What both FSDP runs have in common: state by shard, and one decision of all shards about what is left out.

    A gradient with a NaN or an inf is void in the shards that hold it. Before the optimizer steps, the shards of a replica agree
    in one all-reduce of 4 bytes whether there is any, and then leave the same parameters out everywhere.
    """

    repeat_hint = "call model.set_requires_gradient_sync(False) before the other backwards"
    is_sharded = True

    def __init__(self, model: Module, checked: checks.Checked, group: Group, units: Sequence[Unit], mesh: Mesh) -> None:
        self.units, self.mesh = units, mesh
        self._left_out: set[str] = set()
        self._is_noted = False  # whether the end of this backward will note gradients
        super().__init__(model, checked, group)
        self._clip, self.max_norm = self.max_norm, None  # at the step, by the norm of all shards
        for one in [unit.param_group for unit in units]:  # close gives every exchange back to FSDP
            self._handles.append(Replaced(one, **{key: getattr(one, key) for key in _CHANGED}))
            if mesh.replicate_group is not None:
                self._handles.append(Replaced(one.mesh_info, replicate_process_group=mesh.replicate_group))
        for unit in units:
            self._take_over(unit)
            # otherwise the flat gradient would hold only the parameters that were used, without saying which
            unit.module.set_reduce_scatter_unused_params(True, recurse=False)

    def _take_over(self, unit: Unit) -> None:
        """Set up our exchange of a unit in place of FSDP's."""
        raise NotImplementedError

    def _exchange_unit(self, unit: Unit, bucket: Bucket, divisor: float | None) -> None:
        """Exchange a unit's gradient, and note what the step has to leave out."""
        start, group = time.perf_counter(), unit.param_group
        if group.gradient_divide_factor != divisor or group.force_sum_reduction_for_comms:
            raise AttachError(
                f"{unit.label}: set_gradient_divide_factor and set_force_sum_reduction_for_comms come before attach, which builds on them"
            )
        names = [piece.name for piece in unit.pieces]
        # an existing gradient was exchanged in an earlier backward of this step, and stays void if it was
        self._left_out.difference_update(name for name in names if self.parameters[name].grad is None)
        if bucket.names:
            with torch.no_grad():
                self.exchange([bucket])
        if bucket.void is not None:
            self._left_out.update(names)
        if not (self.method.may_be_clipped or self._is_noted):
            self._is_noted = True
            torch.autograd.Variable._execution_engine.queue_callback(self._note)
        self.waited_s += time.perf_counter() - start

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any = (), kwargs: Any = None) -> None:
        if is_void := bool(self._on_any_shard([bool(self._left_out)])[0]):
            is_bad = [  # left out, or clipping by their norm has spread a NaN to it
                name in self._left_out or (p.grad is not None and not is_finite(local(p.grad)))
                for name, p in self.parameters.items()
            ]
            for p, flag in zip(self.parameters.values(), self._on_any_shard(is_bad), strict=True):
                if flag:
                    p.grad = None
        self._void_names.clear()
        self._is_noted = False  # a backward that failed has not come to its end
        if self._clip is not None:
            norm = clip_gradients_(self.parameters.values(), self._clip)
            self._norm = math.nan if is_void else norm
        super()._before_step(optimizer, args, kwargs)

    def _note(self) -> None:
        self._is_noted = False
        self.note_gradients()

    def _on_any_shard(self, flags: list[bool]) -> list[int]:
        """Each flag, set if it is set on any shard of this replica. Sends 4 bytes for each."""
        found = torch.tensor(flags, dtype=torch.int32, device=next(iter(self.parameters.values())).device)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.mesh.shard_group)
        return found.tolist()

    def largest(self, own: Sequence[float]) -> list[float]:
        found = torch.tensor(super().largest(own), dtype=torch.float64, device=self.method.device)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.mesh.shard_group)
        return cast(list[float], found.tolist())

    def _after_step(self, *_: Any) -> None:
        self._left_out.clear()
        super()._after_step()


class ReplicaRun(FSDPRun):
    """Averages each shard's gradient with the same shard of the other replicas, as soon as FSDP has reduced it within its own."""

    _alone: dist.ProcessGroup | None = None  # one rank, for FSDP's own all-reduce, in whose place our hook exchanges

    def __init__(self, model: Module, *arguments: Any) -> None:
        super().__init__(model, *arguments)
        if (ours := self._process_group) is not None:  # one rank of each replica; the job has more
            self.traffic.ranks, self.per_machine = dist.get_process_group_ranks(ours), self.mesh.shard_group.size()
            self.rank, self.ranks = dist.get_rank(), self.group.size * self.per_machine
        broadcast_(map(local, (*model.parameters(), *model.buffers())), self.group.broadcast)

    @property
    def _process_group(self) -> dist.ProcessGroup | None:
        inner: Any = self.group.inner if isinstance(self.group, PacedGroup) else self.group
        return getattr(inner, "process_group", None)

    @cached_property
    def savers(self) -> Group:
        assert self._process_group is not None
        return World(TorchGroup.like(self.mesh.shard_group), TorchGroup.like(self._process_group))

    def saved(self) -> Saved:
        saved = super().saved()
        return {**saved, "rank": {**saved["rank"], "stretches": stretches_of(self.parameters.values())}}

    def resized(self, every: Sequence[Saved], per_machine: int) -> Callable[[], object]:
        shards, stretches = self.mesh.shard_group.size(), stretches_of(self.parameters.values())
        if per_machine == shards:
            return partial(self.method.resize, every[self.mesh.shard_group.rank() :: shards])
        numels = {name: p.numel() for name, p in self.parameters.items()}
        parts, starts = [one["rank"] for one in every], range(0, len(every), per_machine)
        replicas = [recut(self.method, parts[k : k + per_machine], numels, stretches) for k in starts]
        if len(replicas) != self.group.size:
            return partial(self.method.resize, [{"shared": one, "rank": one} for one in replicas])
        own = replicas[self.group.rank]
        return partial(self.method.load, {"shared": own, "rank": own})

    def served(self) -> list[tuple[str, Tensor]]:
        """This rank's shards, instead of the DTensors that they are part of; without parameters that have none here."""
        return [(name, shard) for name, p in self.parameters.items() if (shard := local(p).detach()).numel()]

    def _take_over(self, unit: Unit) -> None:
        group = unit.param_group
        if self.mesh.replicate_group is not None:
            if self._alone is None:
                self._alone = group_of([dist.get_rank()])
            group.mesh_info.replicate_process_group = self._alone
            factor = group.gradient_divide_factor
            total = self.mesh.shard_group.size() * self.group.size if factor is None else factor
            unit.module.set_gradient_divide_factor(total / self.group.size)
        unit.module.set_all_reduce_hook(partial(self._hook, unit, group.gradient_divide_factor))

    def _hook(self, unit: Unit, divisor: float | None, flat: Tensor) -> None:
        _check_size(unit, flat)
        if self.mesh.replicate_group is None and not unit.param_group.all_reduce_grads:
            raise AttachError(
                f"{unit.label}: set_requires_all_reduce(False) takes a mesh with a replicate dimension; use "
                "set_requires_gradient_sync(False)"
            )
        shard = self.mesh.shard_group.rank()
        bucket = unit.bucket(flat, shard)
        self._exchange_unit(unit, bucket, divisor)
        unit.fill(flat, bucket, shard)

    def replicas_are_equal(self) -> bool:
        return not self._on_any_shard([not super().replicas_are_equal()])[0]


class CompressedReduceScatter:
    """What FSDP calls in place of its reduce-scatter: scatter(output, input).

    Has the methods of torch's ReduceScatter, but does not import it: a torch without it is refused at attach, not at import.
    """

    def __init__(self, scatter: Callable[[Tensor, Tensor], None]) -> None:
        self.scatter = scatter

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        if op != dist.ReduceOp.AVG:
            raise AttachError(f"FSDP asks for a reduce-scatter by {op}; leave out set_gradient_divide_factor")
        self.scatter(output_tensor, input_tensor)


class ShardRun(FSDPRun):
    """Compresses the reduce-scatter: each rank sends every other its shard's gradient in compressed form, and averages what it receives."""

    method: ScatterMean | Auto

    def _take_over(self, unit: Unit) -> None:
        unit.module.set_custom_reduce_scatter(cast(Any, CompressedReduceScatter(partial(self._scatter, unit))))

    def _scatter(self, unit: Unit, output: Tensor, flat: Tensor) -> None:
        """flat: (S n,) this rank's gradient for each shard; output: (n,) the mean of what all ranks have for this one."""
        _check_size(unit, output)
        self._exchange_unit(unit, unit.over(flat, 0), None)  # names and starts are those of the first shard
        group = self.mesh.shard_group
        output.copy_(flat.view(group.size(), -1)[group.rank()])

    def resized(self, every: Sequence[Saved], per_machine: int) -> Callable[[], object]:
        raise CheckpointError(
            f"{self.method.name}: the residuals of a reduce-scatter continue only at the same number of ranks"
        )

    def replicas_are_equal(self) -> bool:
        return True  # there is one


def attach(model: Module, request: checks.Request) -> Run:
    """Average the gradients of a model that `fully_shard` has sharded.

    On a mesh with a replicate and a shard dimension, any gradient method averages between the replicas, shard by shard; within a
    replica FSDP reduces as usual. On a mesh of one dimension `two_way`, `natural`, `qsgd`, `fp16` and `auto` take the
    place of the reduce-scatter; or, with a group of the ranks that hold the same shard elsewhere, any gradient method averages over that
    group.
    """
    (found, units, mesh), group = sharding_of(model), request.group
    way = None if mesh is None else mesh.way(group)

    def check() -> tuple[checks.Checked, Configuration]:
        within = LocalGroup() if mesh is None else TorchGroup(mesh.shard_group)
        facts = partial(_facts, model, request, found, mesh, way)
        layout = {"way": way, "units": [unit.label for unit in units]}
        checked = checks.check_request("fsdp", model, request, within, facts, layout)
        return checked, checked.configuration

    process_group = None if mesh is None else mesh.replicate_group or mesh.shard_group
    meeting = LocalGroup() if checks.is_outer(request.method) else meeting_group(group, process_group)
    checked = agree(meeting, check)  # within a replica, and between them
    assert mesh is not None
    if isinstance(checked.method, OuterMethod):
        peers, inside = checks.connect_machines(group, mesh.ranks)
        copies = LocalGroup() if mesh.replicate_group is None else TorchGroup.like(mesh.replicate_group, backend="gloo")
        return OuterRun(model, checked, peers, Machine(inside, copies))
    ours = group if isinstance(group, Group) else checks.connect(process_group)
    if way == "replicas":
        return ReplicaRun(model, checked, ours, units, mesh)
    if isinstance(checked.method, Auto):
        checked.method.choose_among(partial(candidate, units, ours.size))
    else:
        checked = dataclasses.replace(checked, method=ScatterMean(checked.method, units))
    return ShardRun(model, checked, ours, units, mesh)


def _facts(
    model: Module, request: checks.Request, found: dict[str, object], mesh: Mesh | None, way: Way | None, method: Method
) -> dict[str, object]:
    if model in checks.ATTACHED:  # which is refused, and its hooks are ours
        return {}
    replicas = None if mesh is None else mesh.replicate_group
    facts = {
        "fsdp update method": method.needs_whole,
        "fsdp outer method": mesh is not None and not checks.has_other_machines(request.group, len(mesh.ranks)),
        "fsdp max_norm": request.max_norm is not None and not method.may_be_clipped,
        "fsdp grad_scaler": request.grad_scaler is not None,
        "fsdp overlap": request.overlap is not None and f"{request.overlap}",
        "fsdp joint decision": getattr(method, "merges_buckets", False),
        **found,
        "fsdp group": mesh is not None and way is None and type(request.group).__name__,
        "fsdp one replica": way == "replicas" and replicas is not None and replicas.size() == 1,
    }
    if method.kind == "outer":
        ranks = 0 if mesh is None else len(mesh.ranks)
        has = request.group.per_machine if isinstance(request.group, World) else ranks
        return {**facts, "fsdp group": has != ranks and f"a World of machines of {has} ranks"}
    if way == "shards":
        return {**facts, **_scatter_facts(method)}
    return {key: detail for key, detail in facts.items() if not key.startswith("scatter")}


def _scatter_facts(method: Method) -> dict[str, object]:
    """Why a method cannot compress a reduce-scatter, for `refuse`."""
    if not isinstance(method, _ONE_WAY):
        known = (*_ONE_WAY, FP16, Auto)
        return {
            "scatter exact": method.name == "dense",
            "scatter of another method": not isinstance(method, (FP16, Auto)) and ", ".join(one.name for one in known),
        }
    codec = method.compressor
    return {
        "scatter server": getattr(method, "server_compressor", codec) != codec,
        "scatter dense_1d": method.dense_1d,
        "scatter codec": (codec.is_ragged or codec.shared_scale or codec.shares_keys) and str(codec),
    }


def _check_size(unit: Unit, flat: Tensor) -> None:
    if flat.numel() != unit.numel:
        raise AttachError(f"{unit.label}: a parameter was frozen or thawed after attach: close(), and attach again")
