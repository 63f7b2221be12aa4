"""What a link costs: tc's units, the schedule of each collective, and the seconds a model of the cluster predicts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from commopt.errors import ConfigError

HEADER_BYTES = 66  # per segment on the interface: Ethernet 14, IPv4 20, TCP 32 with timestamps
_RATE_UNITS = {"bit": 1, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}
_RATE_UNITS |= {"bps": 8, "kbps": 8e3, "mbps": 8e6, "gbps": 8e9}
_TIME_UNITS = {"us": 1e-6, "usec": 1e-6, "ms": 1e-3, "msec": 1e-3, "s": 1.0, "sec": 1.0}


def _quantity(text: str | int | float, units: Mapping[str, float], kind: str, example: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]+)\s*", str(text).lower())
    if match is None or match[2] not in units:
        raise ConfigError(
            f"{text!r:.60} is not a {kind}; write a number and one of {', '.join(units)}, as in {example!r}"
        )
    return float(match[1]) * units[match[2]]


def parse_rate(text: str) -> float:
    """Return bytes per second for a rate in tc's units (`100mbit`; `mbps` is megabytes, as in tc). Raises ConfigError."""
    rate = _quantity(text, _RATE_UNITS, "rate", "100mbit") / 8
    if rate <= 0:
        raise ConfigError(f"{text!r:.60} is not a rate: it must be above zero; leave it out for an unlimited link")
    return rate


def parse_delay(text: str) -> float:
    """Return seconds for a time in tc's units (`20ms`). Raises ConfigError."""
    return _quantity(text, _TIME_UNITS, "delay", "20ms")


def parse_loss(text: str) -> float:
    """Return a probability for a percentage (`0.1%`). Raises ConfigError."""
    loss = _quantity(str(text).replace("%", "percent"), {"percent": 0.01}, "loss rate", "0.1%")
    if loss > 1:
        raise ConfigError(f"{text!r:.60} is not a loss rate: at most 100%")
    return loss


def wire_bytes(payload_bytes: float, mtu: int = 1500) -> float:
    """Bytes on an interface that sends `payload_bytes` and receives as many: segment headers, and one ACK for four segments.

    An ACK is for two segments that arrive one by one, and for more if the receiver's kernel has joined them: 1 % less.
    """
    mss = mtu - 52
    return payload_bytes * (1 + HEADER_BYTES / mss + HEADER_BYTES / (4 * mss))


def schedule(operation: str, nbytes: int, rank: int, size: int, *, root: int = 0) -> dict[int, float]:
    """Bytes that `rank` hands to each peer in one collective of `size` ranks, with the algorithm that Gloo and NCCL use.

    `nbytes` is this rank's whole contribution: the tensor of an all-reduce (ring, 2(N-1)/N), the rank's own part of an
    all-gather (ring, N-1), the tensor of a broadcast (binomial tree from `root`). All-to-all names
    its peers itself and needs no schedule.
    """
    if size == 1:
        return {}
    following = (rank + 1) % size
    if operation == "all_reduce":
        return {following: 2 * (size - 1) / size * nbytes}
    if operation == "all_gather":
        return {following: float((size - 1) * nbytes)}
    if operation == "broadcast":
        place = (rank - root) % size
        first = place.bit_length()  # a rank sends in the rounds after the one in which it was reached
        steps = [1 << k for k in range(first, size.bit_length())]
        return {(place + step + root) % size: float(nbytes) for step in steps if place + step < size}
    raise ValueError(f"no schedule for operation {operation!r}")


def rounds(operation: str, size: int) -> int:
    """Sequential message rounds of one collective: what latency is multiplied by."""
    if size == 1:
        return 0
    ring = size - 1
    return {"all_reduce": 2 * ring, "all_gather": ring, "broadcast": math.ceil(math.log2(size))}.get(operation, 1)


def longest_way_s(delays: Sequence[float], hops: int) -> float:
    """The most that so many hops in a row along a ring of these delays take."""
    if min(delays) == max(delays):
        return hops * delays[0]
    times, left = divmod(hops, len(delays))
    until = list(accumulate((*delays, *delays), initial=0.0))
    return times * until[len(delays)] + max(until[k + left] - until[k] for k in range(len(delays)))


@dataclass(frozen=True)
class LinkModel:
    """Seconds for a set of simultaneous messages: latency plus bytes over bandwidth, for the most loaded pipe.

    In a ring a round waits only for what its predecessor sent in the round before, so latency is that of the longest way that a
    message takes: as many hops in a row as there are rounds. Of other schedules each round takes the longest delay.

    A node has one pipe out and one pipe in, both of `bytes_per_s[node]`. Nodes of different sites also share one
    pipe per site and direction, of `between_bytes_per_s[site]`. Messages within a node take no time.

    node_of_rank: (ranks,) node index of each rank. site_of_node: (nodes,) site index; all 0 if there is one site.
    bytes_per_s, latency_s: (nodes,) rate of each node's link and the delay it adds to what the node sends;
    `math.inf` and 0.0 if unlimited.
    between_bytes_per_s, between_latency_s: (sites,) the same for each site's link to the others.
    """

    node_of_rank: tuple[int, ...]
    bytes_per_s: tuple[float, ...]
    latency_s: tuple[float, ...]
    site_of_node: tuple[int, ...]
    between_bytes_per_s: tuple[float, ...] = (math.inf,)
    between_latency_s: tuple[float, ...] = (0.0,)

    @classmethod
    def uniform(cls, ranks: int, rate: str | None = None, delay: str = "0ms") -> LinkModel:
        """One rank per node and the same link everywhere: `LinkModel.uniform(4, "50mbit", "1ms")`."""
        bytes_per_s = math.inf if rate is None else parse_rate(rate)
        return cls(tuple(range(ranks)), (bytes_per_s,) * ranks, (parse_delay(delay),) * ranks, (0,) * ranks)

    @classmethod
    def from_json(cls, text: str) -> LinkModel:
        """Read the fields of a model from a JSON object; null stands for an unlimited rate."""
        fields: dict[str, Any] = json.loads(text)
        values: Any = {key: tuple(math.inf if x is None else x for x in column) for key, column in fields.items()}
        return cls(**values)

    @property
    def ranks(self) -> int:
        return len(self.node_of_rank)

    def of_one_rank(self, ranks: int) -> LinkModel:
        """The links as one of the `ranks` of each node finds them: the others send as much at the same time."""
        own, between = (tuple(rate / ranks for rate in rates) for rates in (self.bytes_per_s, self.between_bytes_per_s))
        nodes = tuple(range(len(self.bytes_per_s)))
        return replace(self, node_of_rank=nodes, bytes_per_s=own, between_bytes_per_s=between)

    def seconds(self, sent: Sequence[Mapping[int, float]], message_rounds: int = 1) -> float:
        """Seconds until the last of these messages has arrived. sent[i][j]: bytes that rank i hands to rank j."""
        load: dict[tuple[str, int], float] = {}
        delays = [0.0] * len(sent)
        for rank, messages in enumerate(sent):
            a = self.node_of_rank[rank]
            for peer, nbytes in messages.items():
                b = self.node_of_rank[peer]
                if a == b:
                    continue
                pipes = [("out", a), ("in", b)]
                delay = self.latency_s[a]
                site_a, site_b = self.site_of_node[a], self.site_of_node[b]
                if site_a != site_b:
                    pipes += [("site out", site_a), ("site in", site_b)]
                    delay += self.between_latency_s[site_a]
                delays[rank] = max(delays[rank], delay)
                for pipe in pipes:
                    load[pipe] = load.get(pipe, 0.0) + nbytes
        own, between = self.bytes_per_s, self.between_bytes_per_s
        rates = {"out": own, "in": own, "site out": between, "site in": between}
        busiest = max((nbytes / rates[kind][index] for (kind, index), nbytes in load.items()), default=0.0)
        is_ring = all([*messages] == [(rank + 1) % len(sent)] for rank, messages in enumerate(sent))
        return (
            longest_way_s(delays, message_rounds) if is_ring else message_rounds * max(delays, default=0.0)
        ) + busiest

    def message_seconds(self, sender: int, receiver: int, nbytes: float) -> float:
        """Seconds of one message, while nobody else sends."""
        return self.seconds([*[{}] * sender, {receiver: nbytes}])

    def collective_seconds(self, operation: str, nbytes: int, *, root: int = 0) -> float:
        """Seconds of one collective of all ranks with `nbytes` from each, or of a broadcast from `root`."""
        sent = [schedule(operation, nbytes, rank, self.ranks, root=root) for rank in range(self.ranks)]
        return self.seconds(sent, rounds(operation, self.ranks))
