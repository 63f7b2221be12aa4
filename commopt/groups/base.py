"""The transport seam: what a method may ask of the other ranks, and the count of what that sends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from commopt.plan.links import schedule
from commopt.wire.payload import Layout, Payload, cut, layout_bytes

Key = tuple[str, str, str]


@dataclass
class Traffic:
    """Bytes that one rank handed to the network, counted where they are sent and nowhere else.

    `method` and `bucket` label what is counted next; integrations set them. A collective counts with its schedule
    (`links.schedule`): a ring all-reduce of n bytes is 2(N-1)/N n.
    """

    method: str = ""
    bucket: str = ""
    by_peer: dict[int, float] = field(default_factory=dict)
    calls: dict[Key, int] = field(default_factory=dict)
    nbytes: dict[Key, float] = field(default_factory=dict)

    def record(self, operation: str, sent: Mapping[int, float]) -> None:
        """Count one call that sends sent[peer] bytes to each peer."""
        key = (self.method, operation, self.bucket)
        self.calls[key] = self.calls.get(key, 0) + 1
        self.nbytes[key] = self.nbytes.get(key, 0.0) + sum(sent.values())
        for peer, n in sent.items():
            self.by_peer[peer] = self.by_peer.get(peer, 0.0) + n

    @property
    def payload_bytes(self) -> float:
        return sum(dict(self.nbytes).values())

    def as_dict(self) -> dict[str, Any]:
        """The cumulative count as JSON: payload_bytes, by_peer, and rows by method, operation and bucket."""
        rows = [
            {"method": method, "operation": operation, "bucket": bucket, "calls": self.calls[key], "bytes": n}
            for key, n in sorted(dict(self.nbytes).items())
            for method, operation, bucket in [key]
        ]
        by_peer = {str(peer): n for peer, n in sorted(dict(self.by_peer).items())}
        return {"payload_bytes": self.payload_bytes, "by_peer": by_peer, "by_operation": rows}


class Group(ABC):
    """Some ranks that call the same operations in the same order; every call blocks until this rank's part is done.

    Raises GroupError where a peer is gone, times out, or asks for something else.
    """

    rank: int
    size: int
    traffic: Traffic

    @abstractmethod
    def all_reduce(self, x: Tensor) -> None:
        """Replace x by the sum over ranks; bit for bit the same on every rank."""

    @abstractmethod
    def all_gather(self, payload: Payload, layouts: Sequence[Layout] | None = None) -> list[Payload]:
        """The payload of every rank, by rank. `layouts` where they differ by rank; every rank then knows all of them."""

    @abstractmethod
    def all_to_all(self, payloads: Sequence[Payload]) -> list[Payload]:
        """Send payloads[j] to rank j; return what each rank sent here.

        What ranks send to rank j has the same layout on all of them, so rank j knows it from its own payloads[j].
        """

    @abstractmethod
    def broadcast(self, x: Tensor, src: int = 0) -> None:
        """Overwrite x with the tensor of rank `src`."""

    def all_gather_ragged(self, payload: Payload) -> list[Payload]:
        """The payload of every rank where only this rank knows its lengths: they travel first, and are counted."""
        lengths = torch.tensor([n for _, n in payload.layout], dtype=torch.int64, device=payload.buffer.device)
        dtypes = [dtype for dtype, _ in payload.layout]
        gathered = self.all_gather(Payload.of(lengths))
        layouts = [tuple(zip(dtypes, one.tensors[0].tolist(), strict=True)) for one in gathered]
        return self.all_gather(payload, layouts)

    def tell(self, text: str) -> list[str]:
        """What every rank says, by rank; for checks before training, and outside the counted traffic."""
        counted, self.traffic = self.traffic, Traffic()
        try:
            every = self.all_gather_ragged(Payload.of(torch.tensor(list(text.encode()), dtype=torch.uint8)))
        finally:
            self.traffic = counted
        return [one.tensors[0].numpy().tobytes().decode() for one in every]

    def barrier(self) -> None:
        """Return after every rank has called this."""
        self.all_reduce(torch.zeros(1))

    def _count(self, operation: str, nbytes: int, root: int = 0) -> dict[int, float]:
        """Count a collective by its schedule; returns the bytes for each peer."""
        sent = schedule(operation, nbytes, self.rank, self.size, root=root)
        self.traffic.record(operation, sent)
        return sent

    def _count_direct(self, operation: str, payloads: Sequence[Payload]) -> dict[int, float]:
        """Count payloads[j] for rank j, which goes straight there."""
        sent = {peer: float(p.nbytes) for peer, p in enumerate(payloads) if peer != self.rank}
        self.traffic.record(operation, sent)
        return sent


class BufferGroup(Group):
    """A group over a library that exchanges flat buffers."""

    def all_gather(self, payload: Payload, layouts: Sequence[Layout] | None = None) -> list[Payload]:
        layouts = [payload.layout] * self.size if layouts is None else list(layouts)
        sizes = [layout_bytes(layout) for layout in layouts]
        if len(set(sizes)) > 1:  # then payloads go straight to each rank, and not in a ring
            self._count_direct("all_gather", [payload] * self.size)
        else:
            self._count("all_gather", payload.nbytes)
        return [payload] if self.size == 1 else cut(self._gather(payload.buffer, sizes), layouts)

    def all_to_all(self, payloads: Sequence[Payload]) -> list[Payload]:
        self._count_direct("all_to_all", payloads)
        if self.size == 1:
            return list(payloads)
        send, layouts = torch.cat([p.buffer for p in payloads]), [payloads[self.rank].layout] * self.size
        sizes = [layout_bytes(layout) for layout in layouts]
        return cut(self._exchange("all_to_all", send, [p.nbytes for p in payloads], sizes), layouts)

    @abstractmethod
    def _gather(self, own: Tensor, sizes: list[int]) -> Tensor:
        """(sum of sizes,) u8: the buffers of all ranks; own is the one of this rank."""

    @abstractmethod
    def _exchange(self, operation: str, send: Tensor, send_sizes: list[int], sizes: list[int]) -> Tensor:
        """(sum of sizes,) u8: what the ranks sent here; send_sizes[j] bytes of `send` go to rank j."""


class LocalGroup(Group):
    """One rank alone: every exchange is the identity and sends nothing. What communication switched off means."""

    def __init__(self) -> None:
        self.rank, self.size, self.traffic = 0, 1, Traffic()

    def all_reduce(self, x: Tensor) -> None:
        pass

    def all_gather(self, payload: Payload, layouts: Sequence[Layout] | None = None) -> list[Payload]:
        return [payload]

    def all_to_all(self, payloads: Sequence[Payload]) -> list[Payload]:
        return list(payloads)

    def broadcast(self, x: Tensor, src: int = 0) -> None:
        pass


def summed(parts: Sequence[Tensor]) -> Tensor:
    """The sum in order, in a new tensor: float sums depend on it."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
