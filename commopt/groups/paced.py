"""Slows another group down to a LinkModel: emulation for machines whose kernel may not shape traffic."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from commopt.groups.base import Group
from commopt.plan.links import LinkModel
from commopt.wire.payload import Layout, Payload, gathered_bytes


class PacedGroup(Group):
    """Each exchange takes at least the seconds that the model predicts for the bytes of its schedule.

    If several nodes share an inter-site pipe, the model divides it among the senders of one exchange. It is an approximation:
    it leaves out other programs' traffic, TCP's own behaviour and concurrent exchanges.
    """

    def __init__(self, inner: Group, links: LinkModel) -> None:
        if links.ranks != inner.size:
            raise ValueError(f"the link model describes {links.ranks} ranks, the group has {inner.size}")
        self.inner, self.links = inner, links
        self.rank, self.size, self.traffic = inner.rank, inner.size, inner.traffic

    def all_reduce(self, x: Tensor) -> None:
        with self._at_least(self.links.collective_seconds("all_reduce", x.nbytes)):
            self.inner.all_reduce(x)

    def all_gather(self, payload: Payload, layouts: Sequence[Layout] | None = None) -> list[Payload]:
        with self._at_least(self.links.collective_seconds("all_gather", gathered_bytes(layouts or [payload.layout]))):
            self.inner.inside = self.inside
            return self.inner.all_gather(payload, layouts)

    def all_to_all(self, payloads: Sequence[Payload]) -> list[Payload]:
        mean = sum(p.nbytes for p in payloads) / len(payloads)
        sent = [{peer: mean for peer in range(self.size) if peer != rank} for rank in range(self.size)]
        with self._at_least(self.links.seconds(sent)):
            return self.inner.all_to_all(payloads)

    def broadcast(self, x: Tensor, src: int = 0) -> None:
        with self._at_least(self.links.collective_seconds("broadcast", x.nbytes, root=src)):
            self.inner.broadcast(x, src)

    def tell(self, text: str) -> list[str]:
        return self.inner.tell(text)

    def barrier(self) -> None:
        self.inner.barrier()

    def close(self) -> None:
        self.inner.close()

    @contextmanager
    def _at_least(self, seconds: float) -> Iterator[None]:
        end = time.perf_counter() + (seconds if math.isfinite(seconds) else 0.0)
        yield
        time.sleep(max(0.0, end - time.perf_counter()))
