"""A group of ranks that all send what this one sends, without a network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from commopt.groups.base import Group, Traffic
from commopt.wire.payload import Layout, Payload


class Same(Group):
    def __init__(self, size: int) -> None:
        self.rank, self.size, self.traffic = 0, size, Traffic()

    def all_reduce(self, x: Tensor) -> None:
        x.mul_(self.size)

    def broadcast(self, x: Tensor, src: int = 0) -> None:
        pass

    def all_to_all(self, payloads: Sequence[Payload]) -> list[Payload]:
        own = payloads[self.rank]
        return [Payload(own.buffer.clone(), own.layout) for _ in range(self.size)]

    def all_gather(self, payload: Payload, layouts: Sequence[Layout] | None = None) -> list[Payload]:
        """Zeros from ranks whose payloads differ in layout, but for a header: nothing is bad there."""
        gathered = []
        for layout in layouts or [payload.layout] * self.size:
            if layout == payload.layout:
                gathered.append(Payload(payload.buffer.clone(), layout))
                continue
            other = Payload.allocate(layout, payload.buffer.device)
            other.buffer.zero_()
            other.tensors[0].fill_(-1 if layout[0][1] == 1 else 0)
            gathered.append(other)
        return gathered
