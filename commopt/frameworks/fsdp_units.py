"""The units that FSDP2 communicates, and where each parameter's shard lies in them, read from torch's private fields."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import get_process_group_ranks as ranks_of
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn import Module

from commopt.groups import PacedGroup, TorchGroup
from commopt.wire.bucket import Bucket

Way = Literal["replicas", "shards"]
# needed only later, most of it private too: looked up once, so that a torch without it is refused at attach
_OF_MODULES = attrgetter(
    "set_all_reduce_hook",
    "set_custom_reduce_scatter",
    "set_gradient_divide_factor",
    "set_reduce_scatter_unused_params",
)
_OF_GROUPS = attrgetter("all_reduce_grads", "reduce_scatter_unused_params")
_FSDPS_OWN = ("DefaultReduceScatter", "ProcessGroupAllocReduceScatter")


@dataclass(frozen=True)
class Piece:
    """One parameter in a unit. numels: (S,) elements of each shard; padded: elements that each shard takes in the flat gradient."""

    name: str
    numels: tuple[int, ...]
    padded: int


@dataclass(frozen=True)
class Unit:
    """The trainable parameters of one `fully_shard` call: their gradients are reduced in one collective, as one flat tensor."""

    label: str
    module: FSDPModule  # the first module of the call, whose hooks are set
    param_group: Any  # torch's FSDPParamGroup
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

    def over(self, flat: Tensor, rank: int, row: int = 0) -> Bucket:
        """What a shard rank has in its flat gradient, which begins at `row` of `flat`."""
        found = self.starts(rank)
        names, starts = tuple(name for name, _, _ in found), tuple(row + start for _, start, _ in found)
        return Bucket(flat, names, starts, self.label)

    def bucket(self, flat: Tensor, rank: int) -> Bucket:
        """The shard's gradient without padding: over `flat` itself if that is all or no padding, else a copy."""
        found = self.starts(rank)
        if not found or sum(n for _, _, n in found) == flat.numel():
            return self.over(flat, rank)
        return Bucket.of([(name, flat[start : start + n]) for name, start, n in found], self.label)

    def fill(self, flat: Tensor, bucket: Bucket, rank: int) -> None:
        """Write a bucket that `bucket` returned back to where it came from."""
        if bucket.flat is not flat:
            for (_, start, n), (_, x) in zip(self.starts(rank), bucket.views(), strict=True):
                flat[start : start + n] = x


@dataclass(frozen=True)
class Mesh:
    """Where this rank is."""

    shard_group: dist.ProcessGroup  # that the parameters are sharded over
    replicate_group: dist.ProcessGroup | None  # of its replicas, if FSDP knows it
    ranks: Sequence[int]  # of all replicas

    def way(self, group: object) -> Way | None:
        """Whether a method averages between replicas, or within the shard group; None for a group that does neither."""
        if group is None:
            return "replicas" if self.replicate_group is not None else "shards"
        inner = group.inner if isinstance(group, PacedGroup) else group
        if not isinstance(inner, TorchGroup) or inner.process_group is None:
            return None
        ranks, shards = ranks_of(inner.process_group), ranks_of(self.shard_group)
        if self.replicate_group is not None:
            return "replicas" if ranks == ranks_of(self.replicate_group) else None
        if sorted(ranks) == sorted(shards):
            return "shards"
        return "replicas" if set(ranks) & set(shards) == {dist.get_rank()} else None


def sharding_of(model: Module) -> tuple[dict[str, object], list[Unit], Mesh | None]:
    """Facts for `refuse`; and the units and the mesh, which are valid if none of the facts holds."""
    if isinstance(model, FullyShardedDataParallel):
        return {"fsdp 1": True}, [], None
    try:
        return _sharding_of(model)
    except AttributeError as error:
        missing = f"{torch.__version__}, which has no {type(error.obj).__name__}.{error.name}"
        return {"fsdp of another torch": missing}, [], None


def _sharding_of(model: Module) -> tuple[dict[str, object], list[Unit], Mesh | None]:
    found, units = dict[str, object](), list[Unit]()

    def note(label: str, facts: Mapping[str, object]) -> None:
        """Keep the detail of the first place where a fact holds: its label if the fact is True."""
        for fact, detail in facts.items():
            found[fact] = found.get(fact) or (label if detail is True else detail)

    modules = [(name or "root", one) for name, one in model.named_modules() if isinstance(one, FSDPModule)]
    for _, module in modules:
        module.reshard()  # the root keeps its parameters whole between forward and backward
    name_of = {id(p): name for name, p in model.named_parameters()}
    meshes: dict[tuple[Any, ...], Mesh] = {}
    seen: set[int] = set()
    for label, module in modules:
        _OF_MODULES(module)
        groups: list[Any] = module._get_fsdp_state()._fsdp_param_groups
        note(label, {"fsdp on several meshes": len(groups) > 1})
        for group in groups:
            if id(group) in seen:  # fully_shard([a, b]) is one unit of two modules
                continue
            seen.add(id(group))
            _OF_GROUPS(group)
            note(label, _facts_of(group))
            info = group.mesh_info
            if info.shard_mesh_dim is None:
                note(label, {"fsdp without shards": True})
                continue
            mesh = Mesh(
                info.shard_process_group,
                info.replicate_process_group if info.replicate_mesh_dim is not None else None,
                info.mesh.mesh.flatten().tolist(),
            )
            meshes[tuple(tuple(ranks_of(one)) for one in (mesh.shard_group, mesh.replicate_group) if one)] = mesh
            trainable = [fp for fp in group.fsdp_params if fp.sharded_param.requires_grad]
            if trainable:
                pieces = tuple(_piece(name_of[id(fp.sharded_param)], fp, mesh.shard_group.size()) for fp in trainable)
                units.append(Unit(label, module, group, pieces))
    first = next(iter(meshes.values()), None)
    note("its modules", {"fsdp on several meshes": len(meshes) > 1})
    sharded = {piece.name for unit in units for piece in unit.pieces}
    for name, p in model.named_parameters():
        note(name, {"fsdp ignored_params": p.requires_grad and name not in sharded})
    shards = first.shard_group.size() if first is not None and units else 0
    for shard in range(shards):
        is_empty = not any(piece.numels[shard] for unit in units for piece in unit.pieces)
        note(f"shard {shard} of {shards}", {"fsdp with an empty shard": is_empty})
    return found, units, first


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
