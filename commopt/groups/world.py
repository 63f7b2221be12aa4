"""The ranks of a job by machine, where machines have several."""

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from commopt.errors import GroupError
from commopt.groups.base import Group, Traffic
from commopt.wire.payload import Layout, Payload, cut


class World(Group):
    """Two levels: methods exchange between machines only, and a machine's ranks share out the work.

    Each rank exchanges a share of every bucket with the ranks of its number on the other machines, so that every machine sends a bucket
    once, however many ranks it has. As a group it is all ranks of the job, machine after machine.

    inside: the ranks of this machine. between: one rank of each machine, those of this rank's number. inner_dtype: in which gradients
        travel inside a machine, such as torch.bfloat16; their own if None. is_even: machines are
        known to have the same number of ranks. Otherwise they tell it here, and GroupError is raised if it differs.
    """

    inside: Group

    def __init__(
        self, inside: Group, between: Group, *, inner_dtype: torch.dtype | None = None, is_even: bool = False
    ) -> None:
        sizes = [] if is_even else between.tell(str(inside.size))
        if len(set(sizes)) > 1:
            raise GroupError(
                f"machines have {', '.join(sizes)} ranks: start as many on each, or pass group=commopt.groups.TorchGroup() to exchange "
                "between single ranks"
            )
        self.between, self.inner_dtype = between, inner_dtype
        self.inside = between.inside = inside
        self.rank, self.size = between.rank * inside.size + inside.rank, between.size * inside.size
        between.traffic.ranks = range(inside.rank, self.size, inside.size)

    @property
    def traffic(self) -> Traffic:  # type: ignore[override]
        """What this rank has sent to other machines."""
        return self.between.traffic

    def all_reduce(self, x: Tensor) -> None:
        self.inside.all_reduce(x)
        self.between.all_reduce(x)

    def all_gather(self, payload: Payload, layouts: Sequence[Layout] | None = None) -> list[Payload]:
        layouts = [payload.layout] * self.size if layouts is None else list(layouts)
        n = self.inside.size
        mine = self.between.all_gather(payload, layouts[self.inside.rank :: n])
        return [
            one
            for machine, own in enumerate(mine)
            for one in self.inside.all_gather(own, layouts[machine * n : (machine + 1) * n])
        ]

    def all_to_all(self, payloads: Sequence[Payload]) -> list[Payload]:
        n, own = self.inside.size, payloads[self.rank]
        # to this machine's rank of the same number as the receiver, and from there to the receiver's machine
        near = [self.inside.all_to_all(payloads[k * n : (k + 1) * n]) for k in range(self.between.size)]
        far = self.between.all_to_all([Payload.of(torch.cat([one.buffer for one in some])) for some in near])
        return [one for payload in far for one in cut(payload.buffer, [own.layout] * n)]

    def broadcast(self, x: Tensor, src: int = 0) -> None:
        machine, number = divmod(src, self.inside.size)
        if self.inside.rank == number:
            self.between.broadcast(x, machine)
        self.inside.broadcast(x, number)

    def tell(self, text: str) -> list[str]:
        every = self.between.tell(json.dumps(self.inside.tell(text)))
        return [one for machine in every for one in json.loads(machine)]

    def close(self) -> None:
        self.between.close()
        self.inside.close()
