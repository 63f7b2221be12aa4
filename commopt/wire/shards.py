"""What a rank has of tensors that are sharded over ranks: DTensors, whose module is slow to import."""

from typing import Any

from torch import Tensor


def local(x: Tensor) -> Tensor:
    """The shard of this rank, as a view; the whole of what is not sharded."""
    own = x.detach()
    shard: Tensor = own.to_local() if hasattr(own, "to_local") else own
    return shard


def shard_start(p: Tensor) -> int:
    """Where in the flattened parameter this rank's shard begins; 0 if it is not sharded, -1 if the shard is not one stretch of it."""
    start, rows = 0, p.shape[0] if p.dim() else 1
    for dim, placement in enumerate(getattr(p, "placements", ())):
        if placement.is_shard():
            mesh: Any = p.device_mesh  # type: ignore[attr-defined]
            chunk = -(-rows // mesh.size(dim))  # as torch.chunk cuts
            row = min(mesh.get_local_rank(dim) * chunk, rows)
            start = row * (p.numel() // max(rows, 1)) if placement.dim == 0 else -1
    return start
