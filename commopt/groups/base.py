"""The transport interface: the collectives that a method may call, and the count of the bytes that they send."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from commopt.plan.links import schedule
from commopt.wire.payload import Bundle, Layout, Payload, cut, gathered_bytes, joined, layout_bytes, padded

Key = tuple[str, str, str]


@dataclass
class Traffic:
    """Bytes that one rank handed to the network, counted by the group that sends them.

    A collective is counted by its schedule (`links.schedule`): a ring all-reduce of n bytes is 2(N-1)/N n.
    """

    method: str = ""  # these two label what is counted next; integrations set them
    bucket: str = ""
    by_peer: dict[int, float] = field(default_factory=dict)
    ranks: Sequence[int] | None = None  # the job's ranks that this rank's peers are, if those are some of them
    calls: dict[Key, int] = field(default_factory=dict)
    nbytes: dict[Key, float] = field(default_factory=dict)

    def record(self, operation: str, sent: Mapping[int, float], *, by_rank: bool = False) -> None:
        """Count one call that sends sent[peer] bytes to each peer; by_rank: these are ranks of the job already."""
        key = (self.method, operation, self.bucket)
        self.calls[key] = self.calls.get(key, 0) + 1
        self.nbytes[key] = self.nbytes.get(key, 0.0) + sum(sent.values())
        for peer, n in sent.items():
            to = peer if by_rank or self.ranks is None else self.ranks[peer]
            self.by_peer[to] = self.by_peer.get(to, 0.0) + n

    @property
    def payload_bytes(self) -> float:
        return sum(dict(self.nbytes).values())

    def as_dict(self) -> dict[str, Any]:
        """The cumulative count as JSON: payload_bytes, by_peer, and rows by method, operation and bucket."""
        rows = [
            {"method": key[0], "operation": key[1], "bucket": key[2], "calls": self.calls[key], "bytes": n}
            for key, n in sorted(dict(self.nbytes).items())
        ]
        by_peer = {str(peer): n for peer, n in sorted(dict(self.by_peer).items())}
        return {"payload_bytes": self.payload_bytes, "by_peer": by_peer, "by_operation": rows}


class Group(ABC):
    """Ranks that call the same operations in the same order; every call blocks until this rank's part is done.

    Raises GroupError if a peer is gone, times out, or calls another operation.
    """

    rank: int
    size: int
    traffic: Traffic
    inside: Group | None = None  # this machine's ranks, if each of them has a group like this one for its share

    @property
    def per_machine(self) -> int:
        """How many ranks share out what their machine exchanges."""
        return 1 if self.inside is None else self.inside.size

    @property
    def is_spread(self) -> bool:
        """Whether each rank is known to be on a machine of its own."""
        return self.inside is not None

    @abstractmethod
    def all_reduce(self, x: Tensor) -> None:
        """Replace x by the sum over ranks; bit for bit the same on every rank."""

    @abstractmethod
    def all_gather(self, payload: Payload, layouts: Sequence[Layout] | None = None) -> list[Payload]:
        """Return the payload of every rank, by rank.

        layouts: of all ranks' payloads, if they differ. They travel around a ring then, padded to the largest, so that few of them
        leave a machine; if each rank `is_spread`, directly to every rank.
        """

    @abstractmethod
    def all_to_all(self, payloads: Sequence[Payload]) -> list[Payload]:
        """Send payloads[j] to rank j; return what each rank sent here.

        All ranks send rank j the same layout, so rank j knows it from its own payloads[j].
        """

    @abstractmethod
    def broadcast(self, x: Tensor, src: int = 0) -> None:
        """Overwrite x with the tensor of rank `src`."""

    def all_gather_ragged(self, payload: Payload) -> list[Payload]:
        """Like `all_gather`, if each rank knows only its own lengths: they are sent first, and counted."""
        lengths = torch.tensor([n for _, n in payload.layout], dtype=torch.int64, device=payload.buffer.device)
        dtypes = [dtype for dtype, _ in payload.layout]
        every = joined(self.all_gather(Payload.of(lengths))).view(torch.int64).view(self.size, -1)
        layouts = [tuple(zip(dtypes, own, strict=True)) for own in every.tolist()]
        return self.all_gather(payload, layouts)

    def tell(self, text: str) -> list[str]:
        """Return every rank's text, by rank. For checks before training; traffic does not count it."""
        counted, self.traffic = self.traffic, Traffic()
        try:
            every = self.all_gather_ragged(Payload.of(torch.tensor(list(text.encode()), dtype=torch.uint8)))
        finally:
            self.traffic = counted
        return [one.tensors[0].numpy().tobytes().decode() for one in every]

    def barrier(self) -> None:
        """Return after every rank has called this."""
        self.all_reduce(torch.zeros(1, dtype=torch.float32))

    def close(self) -> None:
        """Give back what was opened for this group; a collective that all ranks call afterwards opens it anew, or fails."""

    def _count(self, operation: str, nbytes: int, root: int = 0) -> dict[int, float]:
        """Count a collective by its schedule; return the bytes for each peer."""
        sent = schedule(operation, nbytes, self.rank, self.size, root=root)
        self.traffic.record(operation, sent)
        return sent

    def _count_direct(self, operation: str, payloads: Sequence[Payload]) -> dict[int, float]:
        """Count payloads[j] as sent directly to rank j; return the bytes for each peer."""
        sent = {peer: float(p.nbytes) for peer, p in enumerate(payloads) if peer != self.rank}
        self.traffic.record(operation, sent)
        return sent


class BufferGroup(Group):
    """A group over a library that exchanges flat buffers."""

    def all_gather(self, payload: Payload, layouts: Sequence[Layout] | None = None) -> list[Payload]:
        layouts = [payload.layout] * self.size if layouts is None else list(layouts)
        if self.is_spread and len(set(layouts)) > 1:
            self._count_direct("all_gather", [payload] * self.size)
            sizes, sent = [layout_bytes(layout) for layout in layouts], payload.buffer.repeat(self.size)
            return cut(self._exchange("all_gather", sent, [payload.nbytes] * self.size, sizes), layouts)
        nbytes = gathered_bytes(layouts)
        self._count("all_gather", nbytes)
        if self.size == 1:
            return [payload]
        gathered = self._gather(padded(payload, nbytes))
        return Bundle(gathered, layouts, tuple(range(0, self.size * nbytes, nbytes) if nbytes else [0] * self.size))

    def all_to_all(self, payloads: Sequence[Payload]) -> list[Payload]:
        self._count_direct("all_to_all", payloads)
        if self.size == 1:
            return list(payloads)
        send, layouts = joined(payloads), [payloads[self.rank].layout] * self.size
        sizes = [payloads[self.rank].nbytes] * self.size
        return cut(self._exchange("all_to_all", send, [p.nbytes for p in payloads], sizes), layouts)

    @abstractmethod
    def _gather(self, own: Tensor) -> Tensor:
        """(N n,) u8: the buffers of all ranks; own: (n,) this rank's."""

    @abstractmethod
    def _exchange(self, operation: str, send: Tensor, send_sizes: list[int], sizes: list[int]) -> Tensor:
        """(sum of sizes,) u8: what the ranks sent here; send_sizes[j] bytes of `send` go to rank j."""


class LocalGroup(Group):
    """One rank alone: every exchange is the identity and sends nothing. Also stands in while communication is off."""

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
    """The sum in the given order, which float sums depend on; a new tensor."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
