"""What FSDP2 communicates together, and where each parameter's shard lies in it; the only file that reads torch's private fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import Module

from commopt.errors import AttachError
from commopt.groups import Group, PacedGroup, TorchGroup
from commopt.wire.bucket import Bucket

Way = Literal["replicas", "shards"]
# what is read and set of torch's FSDP2, most of it private
_OF_MODULES = (
    "_get_fsdp_state",
    "set_all_reduce_hook",
    "set_custom_reduce_scatter",
    "set_gradient_divide_factor",
    "set_reduce_scatter_unused_params",
)
_OF_GROUPS = (
    "_all_reduce_hook",
    "_reduce_scatter_comm",
    "all_reduce_grads",
    "device",
    "force_sum_reduction_for_comms",
    "fsdp_params",
    "gradient_divide_factor",
    "mesh_info",
    "mp_policy",
    "reduce_scatter_unused_params",
)
_OF_PARAMETERS = ("_orig_size", "fsdp_placement", "is_dtensor", "offload_to_cpu", "sharded_param")


@dataclass(frozen=True)
class Piece:
    """One parameter in a unit. numels: (S,) elements of each shard; padded: elements that each takes in the flat gradient."""

    name: str
    numels: tuple[int, ...]
    padded: int


@dataclass(frozen=True)
class Unit:
    """The trainable parameters of one `fully_shard` call: their gradients are reduced in one collective, as one flat tensor.

    module: the first module of the call, whose hooks are set; param_group: torch's FSDPParamGroup.
    """

    label: str
    module: FSDPModule
    param_group: Any
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        """Elements of the flat gradient of one shard, padding included."""
        return sum(piece.padded for piece in self.pieces)

    def starts(self, rank: int) -> list[tuple[str, int, int]]:
        """(name, start, elements) of what a shard rank has in its flat gradient; parameters of which it has nothing are left out."""
        found, start = [], 0
        for piece in self.pieces:
            if piece.numels[rank]:
                found.append((piece.name, start, piece.numels[rank]))
            start += piece.padded
        return found

    def bucket(self, flat: Tensor, rank: int) -> Bucket:
        """The shard's gradient without padding: over `flat` itself where there is none, else a copy."""
        found = self.starts(rank)
        if sum(n for _, _, n in found) == flat.numel():
            return Bucket(flat, tuple(name for name, _, _ in found), tuple(start for _, start, _ in found), self.label)
        return Bucket.of([(name, flat[start : start + n]) for name, start, n in found], self.label)

    def fill(self, flat: Tensor, bucket: Bucket, rank: int) -> None:
        """Write a bucket of `bucket` back to where it came from."""
        if bucket.flat is not flat:
            for (_, start, n), (_, x) in zip(self.starts(rank), bucket.views(), strict=True):
                flat[start : start + n] = x


@dataclass(frozen=True)
class Mesh:
    """Where this rank is: the process group that the parameters are sharded over, and that of its replicas where FSDP knows it."""

    shard_group: dist.ProcessGroup
    replicate_group: dist.ProcessGroup | None

    @property
    def shards(self) -> int:
        return self.shard_group.size()

    @property
    def shard(self) -> int:
        return self.shard_group.rank()


def check_torch(model: Module) -> None:
    """Raise AttachError where this torch's FSDP2 lacks a name that is read or set here, of which most are private."""
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        _require("FSDPModule", module, _OF_MODULES)
        state: Any = module._get_fsdp_state()
        _require("FSDPState", state, ("_fsdp_param_groups",))
        for group in state._fsdp_param_groups:
            _require("FSDPParamGroup", group, _OF_GROUPS)
            info = group.mesh_info
            _require(type(info).__name__, info, ("shard_mesh_dim", "replicate_mesh_dim"))
            if info.shard_mesh_dim is not None:
                _require(type(info).__name__, info, ("shard_process_group",))
            if info.replicate_mesh_dim is not None:
                _require(type(info).__name__, info, ("replicate_process_group",))
            for fp in group.fsdp_params:
                _require("FSDPParam", fp, _OF_PARAMETERS)


def _require(kind: str, thing: Any, names: tuple[str, ...]) -> None:
    if missing := [name for name in names if not hasattr(thing, name)]:
        raise AttachError(
            f"FSDP2 of torch {torch.__version__} has no {kind}.{missing[0]}, which this integration is built on; it was tested with "
            "torch 2.13: use that one, or integrations.ddp"
        )


def mesh_of(model: Module) -> Mesh:
    """Where this rank is in the mesh that the model is sharded over. Raises AttachError where there is none."""
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                return _mesh(name or "root", group)
    raise AttachError("the model has no sharded parameter; call fully_shard on it, or on its layers and then on it")


def find_units(model: Module) -> list[Unit]:
    """The units of a sharded model in the order of its modules. Raises AttachError for what cannot be served."""
    name_of = {id(p): name for name, p in _sharded_parameters(model).items()}
    units: list[Unit] = []
    meshes: dict[tuple[tuple[int, ...], ...], Mesh] = {}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        groups = module._get_fsdp_state()._fsdp_param_groups
        if len(groups) > 1:
            raise AttachError(
                f"{module_name or 'the model'}: its parameters are on several meshes; give all of them one"
            )
        for group in groups:
            if id(group) in seen:  # fully_shard([a, b]) is one unit of two modules
                continue
            seen.add(id(group))
            label = module_name or "root"
            mesh = _mesh(label, group)
            meshes[tuple(tuple(_ranks(one)) for one in (mesh.shard_group, mesh.replicate_group) if one)] = mesh
            _check_policy(label, group)
            trainable = [fp for fp in group.fsdp_params if fp.sharded_param.requires_grad]
            if trainable:
                pieces = tuple(_piece(name_of[id(fp.sharded_param)], fp, mesh.shards) for fp in trainable)
                units.append(Unit(label, module, group, pieces))
    if not units:
        raise AttachError("the model has no trainable parameter")
    if len(meshes) > 1:
        raise AttachError(
            "the modules are sharded over different meshes; call fully_shard with the same mesh everywhere"
        )
    mesh = next(iter(meshes.values()))
    for name, p in model.named_parameters():
        if p.requires_grad and name not in {piece.name for unit in units for piece in unit.pieces}:
            raise AttachError(f"{name} is among ignored_params, which FSDP does not average; shard it, or freeze it")
    if empty := [r for r in range(mesh.shards) if not any(p.numels[r] for unit in units for p in unit.pieces)]:
        raise AttachError(f"shard {empty[0]} of {mesh.shards} holds no element of the model; shard it over fewer ranks")
    return units


def way_of(mesh: Mesh, group: Group | None) -> Way:
    """Whether a method averages between replicas, or within the shard group. Raises AttachError for a group that is neither."""
    if group is None:
        return "replicas" if mesh.replicate_group is not None else "shards"
    inner = group.inner if isinstance(group, PacedGroup) else group
    if not isinstance(inner, TorchGroup) or inner.process_group is None:
        raise AttachError(
            f"group: FSDP runs in torch.distributed; pass TorchGroup(process_group), not {type(group).__name__}"
        )
    ranks, shards = _ranks(inner.process_group), _ranks(mesh.shard_group)
    if mesh.replicate_group is not None:
        if ranks != (replicas := _ranks(mesh.replicate_group)):
            raise AttachError(
                f"group: has the ranks {ranks}, and the replicas of this shard are {replicas}; leave it out, or pass "
                "TorchGroup(mesh.get_group(the replicate dimension))"
            )
        return "replicas"
    if sorted(ranks) == sorted(shards):
        return "shards"
    if set(ranks) & set(shards) == {dist.get_rank()}:
        return "replicas"
    raise AttachError(
        f"group: has the ranks {ranks}, and this shard group {shards}: pass a group of the ranks that hold the same shard in other "
        "shard groups, to average between replicas, or none, to average within the shard group"
    )


def local(x: Tensor) -> Tensor:
    """The shard of this rank, as a view; the whole of what is not sharded."""
    own = x.detach()
    return own.to_local() if isinstance(own, DTensor) else own


def _sharded_parameters(model: Module) -> dict[str, Tensor]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the root keeps its parameters whole between forward and backward
    named: dict[str, Tensor] = dict(model.named_parameters())
    for name, p in named.items():
        if p.device.type == "meta":
            raise AttachError(f"{name} is on the meta device; call model.to_empty(device=...) and initialise it first")
    return named


def _mesh(label: str, group: Any) -> Mesh:
    info = group.mesh_info
    if getattr(info, "shard_process_group", None) is None:
        raise AttachError(f"{label}: is replicated and not sharded; use DistributedDataParallel")
    return Mesh(info.shard_process_group, getattr(info, "replicate_process_group", None))


def _check_policy(label: str, group: Any) -> None:
    if any(getattr(fp, "is_dtensor", False) for fp in group.fsdp_params):
        raise AttachError(f"{label}: parameters are split by tensor parallelism too, which is not supported")
    if group.mp_policy.reduce_dtype == torch.float16:
        raise AttachError(
            f"{label}: reduce_dtype float16 is divided in two parts around the exchange; write bfloat16 or float32, and let "
            "the method compress"
        )
    if group.force_sum_reduction_for_comms:
        raise AttachError(f"{label}: set_force_sum_reduction_for_comms divides after the exchange; leave it out")
    if group._all_reduce_hook is not None:
        raise AttachError(f"{label}: has an all-reduce hook already, and FSDP takes only one")
    for fp in group.fsdp_params:
        if fp.offload_to_cpu and group.device.type != "cpu":
            raise AttachError(
                f"{label}: CPUOffloadPolicy keeps shards off the device they are exchanged on; leave it out"
            )
        if (
            fp.sharded_param.requires_grad
            and fp.sharded_param.dtype == torch.float16
            and not group.mp_policy.reduce_dtype
        ):
            raise AttachError(f"{label}: float16 gradients are not supported; set reduce_dtype=torch.float32")


def _piece(name: str, fp: Any, shards: int) -> Piece:
    """FSDP cuts dimension 0 as torch.chunk does and pads it, other dimensions into equal parts."""
    numel = int(fp._orig_size.numel())
    if fp.fsdp_placement.dim != 0:
        return Piece(name, (numel // shards,) * shards, numel // shards)
    rows = int(fp._orig_size[0])
    chunk, width = -(-rows // shards), numel // max(rows, 1)
    numels = tuple(max(0, min(chunk, rows - rank * chunk)) * width for rank in range(shards))
    return Piece(name, numels, chunk * width)


def _ranks(process_group: dist.ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(process_group)
