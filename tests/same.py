"""A group of ranks that all send what this one sends, without a network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from commopt.groups.base import BufferGroup, Traffic
from commopt.wire.payload import Layout, Payload


class Same(BufferGroup):
    def __init__(self, size: int) -> None:
        self.rank, self.size, self.traffic = 0, size, Traffic()

    def all_reduce(self, x: Tensor) -> None:
        x.mul_(self.size)

    def broadcast(self, x: Tensor, src: int = 0) -> None:
        pass

    def all_gather(self, payload: Payload, layouts: Sequence[Layout] | None = None) -> list[Payload]:
        """Zeros from the others if payloads differ in layout, but for a header: nothing is bad there."""
        self.is_alike = len(set(layouts or ())) < 2
        return super().all_gather(payload, layouts)

    def _gather(self, own: Tensor) -> Tensor:
        every = own.repeat(self.size)
        if not self.is_alike:
            every.view(self.size, -1)[self.rank + 1 :, 4:] = 0
        return every

    def _exchange(self, operation: str, send: Tensor, send_sizes: list[int], sizes: list[int]) -> Tensor:
        return send[: sizes[0]].repeat(self.size)
