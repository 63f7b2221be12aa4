"""Checks commopt's byte count against what the kernel says has left a node's interface."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Annotated, Any

from pydantic import Field

from commopt.plan.links import rounds, wire_bytes

TOLERANCE = 0.03  # of the modelled bytes: retransmissions, and last segments that are not full
MESSAGE_BYTES = 512  # separate acknowledgements and retransmissions of each message, on a busy machine
_ROOT = 0xFFFFFFFF  # TC_H_ROOT: the parent of an interface's own discipline
BACKGROUND_BYTES = 10_000  # what a rank sends anyway in a window: address resolution, barriers, a store's keep-alives


def transmitted_bytes(interface: str) -> int:
    """Bytes that have left `interface` of the caller's network namespace, headers included, as netlink reports them.

    A veth counts one header for a packet that the kernel has not cut into segments yet; its queueing discipline, if it has
    one, counts all. Not read from /sys: inside a namespace that was entered with nsenter, /sys/class/net silently shows the
    outer machine's interfaces. Raises OSError if there is no such interface.
    """
    from pyroute2 import IPRoute, NetlinkError

    try:
        with IPRoute() as route:
            (link,) = route.link("get", ifname=interface)
            if link.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") == "veth":
                for discipline in route.get_qdiscs(index=link["index"]):
                    counted = discipline.get_nested("TCA_STATS2", "TCA_STATS_BASIC")
                    if discipline["parent"] == _ROOT and discipline.get_attr("TCA_KIND") != "noqueue" and counted:
                        return int(counted["bytes"])
            return int(link.get_attr("IFLA_STATS64")["tx_bytes"])
    except NetlinkError as error:
        raise OSError(error.code, f"no byte count of interface {interface!r}: {error}") from error


@dataclass(frozen=True)
class TrafficRow:
    """What one operation of one method handed to the network in a window, for one bucket; payload, without headers."""

    method: Annotated[str, Field(description="the method that called it")]
    operation: Annotated[str, Field(description="the collective or exchange")]
    bucket: Annotated[str, Field(description="the bucket it was called for")]
    calls: Annotated[int, Field(description="calls, over all ranks")]
    bytes: Annotated[float, Field(description="payload bytes, counting the collective's schedule, over all ranks")]


@dataclass(frozen=True)
class Window:
    """What one rank handed to the network between two readings of its `Traffic`; payload, without headers."""

    payload_bytes: float
    by_peer: Mapping[int, float]
    rows: tuple[TrafficRow, ...]


def window(begin: Mapping[str, Any], end: Mapping[str, Any]) -> Window:
    """The difference of two `Traffic.as_dict()`, which count from the start of the program."""
    fields = itemgetter("method", "operation", "bucket", "calls", "bytes")
    rows = [
        TrafficRow(str(method), str(operation), str(bucket), sign * int(calls), sign * float(nbytes))
        for sign, reading in ((1, end), (-1, begin))
        for method, operation, bucket, calls, nbytes in map(fields, reading["by_operation"])
    ]
    by_peer = {int(peer): float(n) - float(begin["by_peer"].get(peer, 0.0)) for peer, n in end["by_peer"].items()}
    return Window(float(end["payload_bytes"]) - float(begin["payload_bytes"]), by_peer, merge(rows))


def merge(rows: Sequence[TrafficRow]) -> tuple[TrafficRow, ...]:
    """Add up the rows of the same method, operation and bucket, the largest first; rows without a call are dropped."""
    total: dict[tuple[str, str, str], TrafficRow] = {}
    for row in rows:
        key = (row.method, row.operation, row.bucket)
        before = total.get(key, TrafficRow(*key, 0, 0.0))
        total[key] = TrafficRow(*key, before.calls + row.calls, before.bytes + row.bytes)
    return tuple(sorted((row for row in total.values() if row.calls), key=lambda row: -row.bytes))


@dataclass(frozen=True)
class CountCheck:
    """commopt's count for one node and one window, and the interface's."""

    node: str
    payload_bytes: float  # that left the node, as commopt says
    modelled_bytes: float  # the same with segment headers and ACKs
    nic_tx_bytes: float  # what the interface transmitted
    rows: tuple[TrafficRow, ...]  # what the node's ranks handed to the network, also to ranks of their own node
    ranks: int  # of this node
    nodes: int  # that take part

    @property
    def ratio(self) -> float | None:
        """Measured over modelled bytes: 1 if the count is right; None if nothing left the node by commopt's count."""
        return self.nic_tx_bytes / self.modelled_bytes if self.modelled_bytes > 0 else None

    @property
    def ok(self) -> bool:
        """Whether the two agree within 3 %, or within the bytes that a node sends anyway, in the background and with each message."""
        # Gloo's ring sends each part of an all-reduce in two segments, each with packets of its own
        each = {"all_reduce": 2}
        messages = sum(row.calls * rounds(row.operation, self.nodes) * each.get(row.operation, 1) for row in self.rows)
        anyway = BACKGROUND_BYTES * self.ranks + MESSAGE_BYTES * messages
        return abs(self.nic_tx_bytes - self.modelled_bytes) <= max(TOLERANCE * self.modelled_bytes, anyway)

    @property
    def defect(self) -> str | None:
        """None, or the disagreement as a defect of commopt's count, with the rows that hold the wrong number."""
        if self.ok:
            return None
        more_or_less = "more" if self.nic_tx_bytes > self.modelled_bytes else "fewer"
        by = "" if self.ratio is None else f"{abs(self.ratio - 1):.1%} "
        hint = ""
        if self.payload_bytes > 0 and abs(self.nic_tx_bytes / self.payload_bytes - 1) < 0.01:
            hint = "The interface counted almost no headers, as when it cuts segments itself (gso_max_segs above 1). "
        lines = [
            f"defect in commopt's byte count: {by}{more_or_less} bytes left {self.node} than commopt counted: "
            f"{self.nic_tx_bytes:,.0f} by the interface, {self.modelled_bytes:,.0f} by the count "
            f"({self.payload_bytes:,.0f} of payload, and headers). {hint}Please report it with these lines:"
        ]
        lines += [f"  {r.method} {r.operation} {r.bucket}: {r.calls} calls, {r.bytes:,.0f} bytes" for r in self.rows]
        return "\n".join(lines)


def leaving(node: str, windows: Iterable[Window], node_of_rank: Mapping[int, str]) -> float:
    """Payload bytes that a node's ranks sent to other nodes; windows: theirs."""
    return sum(n for each in windows for peer, n in each.by_peer.items() if node_of_rank[peer] != node)


def verify(
    node: str, windows: Mapping[int, Window], node_of_rank: Mapping[int, str], nic_tx_bytes: float, mtu: int = 1500
) -> CountCheck:
    """Compare commopt's count for one node with what the node's interface transmitted in the same window.

    windows: of every rank of the node. node_of_rank: of every rank of the world, since only bytes for a peer on another
    node leave it. The header model assumes that the node receives as much as it sends, and so acknowledges as much:
    true of every symmetric exchange, and wrong by up to 2 % at an MTU of 1,500 for a node that only sends or receives.
    """
    payload_bytes = leaving(node, windows.values(), node_of_rank)
    rows = merge([row for each in windows.values() for row in each.rows])
    nodes = len(set(node_of_rank.values()))
    return CountCheck(node, payload_bytes, wire_bytes(payload_bytes, mtu), nic_tx_bytes, rows, len(windows), nodes)
