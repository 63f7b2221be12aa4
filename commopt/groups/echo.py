"""A group of one that stands for many: what a rank sends comes back at once, as if from all."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from commopt.groups.base import Group, Traffic
from commopt.wire.payload import Bundle, Layout, Payload, gathered_bytes


class Echo(Group):
    """Ranks that all send what this one sends, in no time: what is given is returned, and not copied.

    calls: (operation, bytes that this rank contributes) of every call, in their order.
    """

    def __init__(self, size: int) -> None:
        self.rank, self.size, self.traffic = 0, size, Traffic()
        self.calls: list[tuple[str, int]] = []

    def all_reduce(self, x: Tensor) -> None:
        self._note("all_reduce", x.nbytes)

    def all_gather(self, payload: Payload, layouts: Sequence[Layout] | None = None) -> list[Payload]:
        self._note("all_gather", gathered_bytes(layouts or [payload.layout]))
        return Bundle(payload.row, [payload.layout] * self.size, (payload.at,) * self.size)

    def all_to_all(self, payloads: Sequence[Payload]) -> list[Payload]:
        self._count_direct("all_to_all", payloads)
        self.calls.append(("all_to_all", sum(payload.nbytes for payload in payloads)))
        own = payloads[self.rank]
        return Bundle(own.row, [own.layout] * self.size, (own.at,) * self.size)

    def broadcast(self, x: Tensor, src: int = 0) -> None:
        self._note("broadcast", x.nbytes)

    def _note(self, operation: str, nbytes: int) -> None:
        self._count(operation, nbytes)
        self.calls.append((operation, nbytes))
