"""Ranks that cost nothing, to time what a method computes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from commopt.groups.base import Group, Traffic
from commopt.wire.payload import Layout, Payload


class Echo(Group):
    """Ranks that all send what this one sends, in no time: what is given is returned, and not copied."""

    def __init__(self, ranks: int) -> None:
        self.rank, self.size, self.traffic = 0, ranks, Traffic()

    def all_reduce(self, x: Tensor) -> None:
        pass

    def all_gather(self, payload: Payload, layouts: Sequence[Layout] | None = None) -> list[Payload]:
        return [payload] * self.size

    def all_to_all(self, payloads: Sequence[Payload]) -> list[Payload]:
        return [payloads[self.rank]] * self.size

    def broadcast(self, x: Tensor, src: int = 0) -> None:
        pass
