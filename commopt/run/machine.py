"""The ranks of one machine, which train one replica together under an outer method."""

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_map_only

from commopt.errors import GroupError
from commopt.groups import Group, LocalGroup
from commopt.wire.payload import Payload, checksum
from commopt.wire.shards import local


class Machine:
    """One rank's view of its machine; what it decides here, all ranks of the machine decide alike."""

    def __init__(self, ranks: Group | None = None, copies: Group | None = None) -> None:
        self.ranks = LocalGroup() if ranks is None else ranks
        # those that hold the same values as this one, such as DDP's replicas, and share out what is exchanged
        self.copies = self.ranks if copies is None else copies

    def told(self, *values: int) -> list[list[int]]:
        """What each rank of the machine says, by rank; all say as many numbers."""
        if self.ranks.size == 1:
            return [list(values)]
        return [one.tensors[0].tolist() for one in self.ranks.all_gather(Payload.of(torch.tensor(values)))]

    def every(self, *flags: bool) -> list[bool]:
        """For each flag, whether all ranks set it."""
        return [all(column) for column in zip(*self.told(*map(int, flags)), strict=True)]

    def total(self, x: Tensor) -> Tensor:
        """(n,) the sum over the machine's ranks."""
        if self.ranks.size > 1:
            self.ranks.all_reduce(x)
        return x

    def part(self, x: Tensor) -> Tensor:
        """What this rank sends of a tensor that all copies hold: a stretch of its bytes, (n,) u8."""
        return bytes_of(x).tensor_split(self.copies.size)[self.copies.rank]

    def kind_of(self, numel: int, nbytes: int) -> int:
        """What `numel` bytes are of a tensor of `nbytes`: 1 for all of it, 2 for this rank's part, 0 for neither."""
        size, rank = self.copies.size, self.copies.rank
        return 1 if numel == nbytes else 2 * int(numel == nbytes // size + (rank < nbytes % size))

    def whole(self, part: Tensor, nbytes: int) -> Tensor:
        """(nbytes,) u8, of the parts of all copies."""
        sizes = [len(one) for one in torch.empty(1, dtype=torch.uint8).expand(nbytes).tensor_split(self.copies.size)]
        parts = self.copies.all_gather(Payload.of(part), [((torch.uint8, n),) for n in sizes])
        return torch.cat([one.tensors[0] for one in parts])

    def are_alike(self, x: Tensor) -> bool:
        """Whether all copies hold the same (n,) u8."""
        own = Payload.of(torch.tensor([x.numel(), checksum(x)]))
        return all(torch.equal(one.buffer, own.buffer) for one in self.copies.all_gather(own))

    def exchange_(self, tensors: Iterable[Tensor], exchange: Callable[[Tensor], object]) -> None:
        """Let `exchange` overwrite this rank's part of each tensor, and put the parts together.

        Raises GroupError on all ranks, and changes nothing, if `exchange` does on any.
        """
        targets = [shard for x in tensors if (shard := local(x)).numel()]
        parts, failure = [self.part(x).clone() for x in targets], None
        try:
            for part in parts:
                exchange(part)
        except GroupError as error:
            failure = error
        if not self.every(failure is None)[0]:
            raise failure or GroupError("another rank of this machine could not exchange its part")
        with torch.no_grad():
            for x, part in zip(targets, parts, strict=True):
                x.copy_(self.whole(part, x.nbytes).view(x.dtype).view_as(x))


def give_back_memory() -> None:
    """Let the system have what has been freed: glibc keeps up to 3 bytes per parameter of a model in its heap, between what is used."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def bytes_of(x: Tensor) -> Tensor:
    """(nbytes,) u8 on the CPU."""
    return x.detach().to("cpu").contiguous().view(-1).view(torch.uint8)


def localized(value: Any) -> Any:
    """A nested state with this rank's shards in place of what they are part of."""
    return tree_map_only(Tensor, local, value)


def load_localized(model: Module, optimizer: torch.optim.Optimizer, states: Mapping[str, Any]) -> None:
    """Load states["model"] and states["optimizer"], in which `localized` has put shards."""

    def like(whole: Any, shard: Any) -> Any:
        is_shard = isinstance(shard, Tensor) and shard.shape == local(whole).shape and hasattr(whole, "to_local")
        if not is_shard:
            return shard
        cls, mesh, placements = type(whole.detach()), whole.device_mesh, whole.placements
        return cls.from_local(shard, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())

    given, saved = states["model"], states["optimizer"]
    model.load_state_dict({key: like(x, given[key]) for key, x in model.state_dict().items()})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {k: {key: like(parameters[int(k)], x) for key, x in one.items()} for k, one in saved["state"].items()}
    optimizer.load_state_dict({**saved, "state": state})
