"""What FSDP2 communicates together, and where each parameter's shard lies in it; the only file that reads torch's private fields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn import Module

from commopt.groups import PacedGroup, TorchGroup
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
_FSDPS_OWN = ("DefaultReduceScatter", "ProcessGroupAllocReduceScatter")


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
        """The shard's gradient without padding: over `flat` itself if there is none, or nothing else, else a copy."""
        found = self.starts(rank)
        if not found or sum(n for _, _, n in found) == flat.numel():
            return Bucket(flat, tuple(name for name, _, _ in found), tuple(start for _, start, _ in found), self.label)
        return Bucket.of([(name, flat[start : start + n]) for name, start, n in found], self.label)

    def fill(self, flat: Tensor, bucket: Bucket, rank: int) -> None:
        """Write a bucket of `bucket` back to where it came from."""
        if bucket.flat is not flat:
            for (_, start, n), (_, x) in zip(self.starts(rank), bucket.views(), strict=True):
                flat[start : start + n] = x


@dataclass(frozen=True)
class Mesh:
    """Where this rank is: the process group that the parameters are sharded over, and that of its replicas if FSDP knows it."""

    shard_group: dist.ProcessGroup
    replicate_group: dist.ProcessGroup | None

    @property
    def shards(self) -> int:
        return self.shard_group.size()

    @property
    def shard(self) -> int:
        return self.shard_group.rank()

    def way(self, group: object) -> Way | None:
        """Whether a method averages between replicas, or within the shard group; None for a group that does neither."""
        if group is None:
            return "replicas" if self.replicate_group is not None else "shards"
        inner = group.inner if isinstance(group, PacedGroup) else group
        if not isinstance(inner, TorchGroup) or inner.process_group is None:
            return None
        ranks, shards = _ranks(inner.process_group), _ranks(self.shard_group)
        if self.replicate_group is not None:
            return "replicas" if ranks == _ranks(self.replicate_group) else None
        if sorted(ranks) == sorted(shards):
            return "shards"
        return "replicas" if set(ranks) & set(shards) == {dist.get_rank()} else None


@dataclass
class Sharding:
    """What a model is sharded into. facts: for `refuse`; mesh and units can be relied on if none of them holds."""

    facts: dict[str, object]
    units: list[Unit] = field(default_factory=list)
    mesh: Mesh | None = None

    def note(self, label: str, facts: Mapping[str, object]) -> None:
        """Keep where facts hold first; a fact that is True is told by its label."""
        for fact, detail in facts.items():
            self.facts[fact] = self.facts.get(fact) or (label if detail is True else detail)


def sharding_of(model: Module) -> Sharding:
    """Look at a model, in the order of its modules; nothing is raised for what cannot be served."""
    found = Sharding({"fsdp 1": isinstance(model, FullyShardedDataParallel), "fsdp of another torch": _missing(model)})
    if any(found.facts.values()):
        return found
    for _, module in _modules(model):
        module.reshard()  # the root keeps its parameters whole between forward and backward
    name_of = {id(p): name for name, p in model.named_parameters()}
    meshes: dict[tuple[Any, ...], Mesh] = {}
    seen: set[int] = set()
    for label, module, group in _groups(model):
        if id(group) in seen:  # fully_shard([a, b]) is one unit of two modules
            continue
        seen.add(id(group))
        found.note(label, _facts_of(group))
        info = group.mesh_info
        if (shard_group := getattr(info, "shard_process_group", None)) is None:
            found.note(label, {"fsdp without shards": True})
            continue
        mesh = Mesh(shard_group, getattr(info, "replicate_process_group", None))
        meshes[tuple(tuple(_ranks(one)) for one in (mesh.shard_group, mesh.replicate_group) if one)] = mesh
        trainable = [fp for fp in group.fsdp_params if fp.sharded_param.requires_grad]
        if trainable:
            pieces = tuple(_piece(name_of[id(fp.sharded_param)], fp, mesh.shards) for fp in trainable)
            found.units.append(Unit(label, module, group, pieces))
    found.mesh = next(iter(meshes.values()), None)
    _look_at_all(model, found, len(meshes))
    return found


def _look_at_all(model: Module, found: Sharding, meshes: int) -> None:
    """Note what units say only together."""
    several = [name or "root" for name, module in _modules(model) if len(_groups_of(module)) > 1]
    sharded = {piece.name for unit in found.units for piece in unit.pieces}
    ignored = [name for name, p in model.named_parameters() if p.requires_grad and name not in sharded]
    empty: list[str] = []
    if found.mesh is not None and found.units:
        shards = range(found.mesh.shards)
        filled = {r for unit in found.units for piece in unit.pieces for r in shards if piece.numels[r]}
        empty = [f"shard {r} of {len(shards)}" for r in shards if r not in filled]
    found.facts |= {
        "fsdp on several meshes": several[0] if several else meshes > 1 and "its modules",
        "fsdp ignored_params": ignored and ignored[0],
        "fsdp with an empty shard": empty and empty[0],
    }


def local(x: Tensor) -> Tensor:
    """The shard of this rank, as a view; the whole of what is not sharded."""
    own = x.detach()
    return own.to_local() if isinstance(own, DTensor) else own


def _missing(model: Module) -> str:
    """What this torch's FSDP2 lacks of what is read or set here, of which most is private; "" for nothing."""
    for kind, thing, names in _read_of(model):
        for name in names:
            if not hasattr(thing, name):
                return f"{torch.__version__}, which has no {kind}.{name}"
    return ""


def _read_of(model: Module) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """(class, object, names): what is read of each object; the next is looked for by what was found in the last."""
    for _, module in _modules(model):
        yield "FSDPModule", module, _OF_MODULES
        yield "FSDPState", module._get_fsdp_state(), ("_fsdp_param_groups",)
        for group in _groups_of(module):
            yield "FSDPParamGroup", group, _OF_GROUPS
            info = group.mesh_info
            yield type(info).__name__, info, ("shard_mesh_dim", "replicate_mesh_dim")
            dimensions = [one for one in ("shard", "replicate") if getattr(info, f"{one}_mesh_dim") is not None]
            yield type(info).__name__, info, tuple(f"{one}_process_group" for one in dimensions)
            for fp in group.fsdp_params:
                yield "FSDPParam", fp, _OF_PARAMETERS


def _modules(model: Module) -> Iterator[tuple[str, FSDPModule]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, FSDPModule))


def _groups_of(module: FSDPModule) -> list[Any]:
    found: list[Any] = module._get_fsdp_state()._fsdp_param_groups
    return found


def _groups(model: Module) -> Iterator[tuple[str, FSDPModule, Any]]:
    return ((name or "root", module, group) for name, module in _modules(model) for group in _groups_of(module))


def _facts_of(group: Any) -> dict[str, object]:
    params, reduced_in = group.fsdp_params, group.mp_policy.reduce_dtype
    halves = [fp for fp in params if fp.sharded_param.requires_grad and fp.sharded_param.dtype == torch.float16]
    return {
        "fsdp with tensor parallelism": any(fp.is_dtensor for fp in params),
        "fsdp in float16": reduced_in == torch.float16 or bool(halves and not reduced_in),
        "fsdp sum": bool(group.force_sum_reduction_for_comms),
        "fsdp hook": group._all_reduce_hook is not None,
        "fsdp offload": group.device.type != "cpu" and any(fp.offload_to_cpu for fp in params),
        "scatter divide factor": group.gradient_divide_factor is not None,
        "scatter custom": type(group._reduce_scatter_comm).__name__ not in _FSDPS_OWN,
    }


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
