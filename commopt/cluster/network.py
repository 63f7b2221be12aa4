"""The emulated network: a namespace per node, veth pairs on a bridge, and queueing disciplines that shape them.

node0 [eth0] ---- v0 |bridge b0| s0 ---- t0 |bridge core| t1 ---- s1 |bridge b1| v2 ---- [eth0] node2

A node's egress is shaped in its namespace (eth0) and its ingress on the bridge's side (v0). A packet may be of several segments that
the kernel has not cut yet, as with a network card that cuts them: that takes a fraction of the processor's time. Queueing disciplines
count each segment with headers of its own, for the rate and in their statistics; an interface counts one header. With sites there is a
bridge per site; what a site sends is shaped at s0, what it receives at t0. Everything is made in the network namespace
of the calling process, which must therefore have one of its own: see `commopt.cluster.emulate`.
"""

import json
import math
from collections.abc import Collection, Iterable, Sequence

from commopt.cluster.machine import tried
from commopt.cluster.spec import ClusterSpec, Link
from commopt.errors import EmulationError

INTERFACE = "eth0"  # of every node, in its own namespace
_FASTEST_BYTES_PER_S = 30e9 / 8  # tbf's rate field ends at 4 GiB/s; a veth pair is slower than that
_ETHERNET_BYTES = 14
_UNSHAPED_PACKETS = 10_000  # that a node queues
_PACKET_S = 0.00012  # what a packet of several segments takes at most: one segment's time at 100 Mbit/s
_MOST_BYTES = 1 << 16  # of a packet
_IPV6_MTU = 1280  # RFC 8200: the smallest of a link that carries it
_NOWHERE = "01:80:c2:00:00:01"  # IEEE 802.1D: bridges silently drop frames for this address


def address(node: int) -> str:
    return f"10.77.{(node + 1) // 256}.{(node + 1) % 256}"


def burst_bytes(bytes_per_s: float, mtu: int = 1500) -> int:
    """What a shaper lets pass at once: 2 ms at its rate, at least 16 KiB and one segment; far less than a step's payload."""
    return max(16 * 1024, mtu + _ETHERNET_BYTES, math.ceil(0.002 * bytes_per_s))


def segments_at_once(link: Link, mtu: int = 1500) -> int:
    """How many segments a packet of a node may be of: one up to 200 Mbit/s, where they are few, and nine at 1 Gbit/s.

    Shapers pass on whole packets, so several senders to one node share its link less evenly if packets are large. One by one, too, if
    some are to be lost.
    """
    if link.loss_probability > 0:
        return 1
    at_once = int(min(_MOST_BYTES, _PACKET_S * link.bytes_per_s))
    return max(1, at_once // (mtu + _ETHERNET_BYTES))


def queue_bytes(bytes_per_s: float, mtu: int = 1500) -> int:
    """What a shaper queues before it drops: 200 ms at its rate, at least 1 MiB, so that several senders to one node lose little."""
    return burst_bytes(bytes_per_s, mtu) + max(1 << 20, math.ceil(0.2 * bytes_per_s))


class Network:
    """The emulated network of one cluster; without `has_netem`, links only have their rates."""

    def __init__(self, cluster: ClusterSpec) -> None:
        self._names = cluster.names
        self._mtu = cluster.links.mtu
        self._outer: dict[str, str] = {}  # name of a node -> its veth's outer end
        self._sent_before = dict.fromkeys(self._names, 0)  # through veths that were removed
        self._cut: set[frozenset[str]] = set()
        links = [cluster.link(index) for index in range(len(self._names))]
        every = [*links, *([cluster.links.between] if len(cluster.sites) > 1 else [])]  # a packet may cross the slowest
        self._segments = min(segments_at_once(link, self._mtu) for link in every)
        self.has_netem = any(map(_needs_netem, [*links, cluster.links.between])) and _netem_works()
        _batch("ip", "link set lo up")
        self._add_bridges(cluster)
        self._places = [(link, f"b{site}") for link, site in zip(links, cluster.site_of_node, strict=True)]
        for name in self._names:
            self._add_node(name)

    def tx_bytes(self) -> dict[str, int]:
        """Bytes that each node has sent since the start, headers included."""
        return {
            name: before + (self._sent(name) if name in self._outer else 0)
            for name, before in self._sent_before.items()
        }

    def _sent(self, name: str) -> int:
        words = ["tc", "-netns", name, "-json", "-statistics", "qdisc", "show", "dev", INTERFACE, "root"]
        return int(json.loads(checked_run(words))[0]["bytes"])

    def unplug(self, name: str) -> None:
        """Cut a node off: nothing that it still sends arrives, but its own interface reports no error to its programs."""
        _batch("ip", f"link set {self._outer[name]} down")

    def remove(self, name: str) -> None:
        """Remove a node whose programs have ended, with the connections that its kernel still keeps, as a machine would lose them."""
        self._sent_before[name] = self.tx_bytes()[name]
        _batch("ip", f"link delete {self._outer.pop(name)}", f"netns delete {name}")

    def restore(self, name: str) -> None:
        """Bring back a node that was unplugged or removed, with the same addresses; cuts stay in force."""
        if name in self._outer:
            _batch("ip", f"link set {self._outer[name]} up")
            return
        self._add_node(name)
        self._set_cuts(name, healed=set(), new=self._cut)

    def cut(self, pairs: Iterable[Collection[str]]) -> None:
        """Silently drop everything between the two nodes of each of these pairs; heal all other pairs.

        Connections stall, and continue after healing: each node maps the other's address to a hardware address of nobody.
        """
        wanted = {frozenset(pair) for pair in pairs}
        healed, new = self._cut - wanted, wanted - self._cut
        self._cut = wanted
        for name in self._outer:
            self._set_cuts(name, healed=healed, new=new)

    def _set_cuts(self, name: str, *, healed: set[frozenset[str]], new: set[frozenset[str]]) -> None:
        """Tell a node's kernel of those pairs that it is in."""
        lines = []
        for pairs, verb, where in ((healed, "del", ""), (new, "replace", f" lladdr {_NOWHERE} nud permanent")):
            others = [address(self._names.index(other)) for pair in pairs if name in pair for other in pair - {name}]
            lines += [f"neigh {verb} {other}{where} dev {INTERFACE}" for other in others]
        _batch("ip", *lines, node=name)

    def _add_bridges(self, cluster: ClusterSpec) -> None:
        sites = range(max(1, len(cluster.sites)))
        bridges = [f"b{site}" for site in sites] + ["core"] * (len(sites) > 1)
        for name in bridges:
            _batch("ip", f"link add {name} mtu {self._mtu} type bridge", *self._silent(name), f"link set {name} up")
        between = cluster.links.between
        for site in sites if "core" in bridges else ():
            inner, outer = f"s{site}", f"t{site}"
            _batch("ip", f"link add {inner} mtu {self._mtu} type veth peer name {outer} mtu {self._mtu}")
            self._shape(inner, between)
            self._shape(outer, Link(rate=between.rate))
            _batch("ip", f"link set {inner} master b{site} up", f"link set {outer} master core up")

    def _add_node(self, name: str) -> None:
        number = self._names.index(name)
        link, bridge = self._places[number]
        outer = self._outer[name] = f"v{number}"
        hardware = f"02:00:0a:4d:{(number + 1) // 256:02x}:{(number + 1) % 256:02x}"  # the others may have cached it
        inner = f"name {INTERFACE} netns {name} mtu {self._mtu} address {hardware}"
        _batch(
            "ip",
            f"netns add {name}",
            f"link add {outer} mtu {self._mtu} type veth peer {inner}",
            *self._silent(outer),
            f"link set {outer} master {bridge}",
        )
        _batch(
            "ip",
            "link set lo up",
            f"address add {address(number)}/16 dev {INTERFACE}",
            f"link set {INTERFACE} gso_max_segs {self._segments}",
            *self._silent(INTERFACE),
            f"link set {INTERFACE} up",
            node=name,
        )
        self._shape(outer, Link(rate=link.rate))
        self._shape(INTERFACE, link, node=name)
        _batch("ip", f"link set {outer} up")

    def _shape(self, interface: str, link: Link, node: str | None = None) -> None:
        """Limit what leaves through an interface; delay, jitter and loss need netem."""
        rate, place, lines = link.bytes_per_s, "root", []
        add = f"qdisc add dev {interface}"
        if rate < _FASTEST_BYTES_PER_S:
            shape = f"burst {burst_bytes(rate, self._mtu)} limit {queue_bytes(rate, self._mtu)}"
            lines.append(f"{add} root handle 1: tbf rate {math.ceil(rate)}bps {shape}")
            place = "parent 1:1"
        if self.has_netem and _needs_netem(link):
            held_s = 1.0 + link.delay_s + link.jitter_s
            packets = max(1000, math.ceil(held_s * min(rate, _FASTEST_BYTES_PER_S) / self._mtu))
            times = f"delay {link.delay_s * 1e6:.0f}us {link.jitter_s * 1e6:.0f}us"
            loss = f"loss {link.loss_probability:.6%}"
            lines.append(f"{add} {place} handle 10: netem limit {packets} {times} {loss}")
        if node is not None and not lines:
            lines.append(f"{add} root handle 1: pfifo limit {_UNSHAPED_PACKETS}")  # which counts
        _batch("tc", *lines, node=node)

    def _silent(self, interface: str) -> list[str]:
        """What keeps the kernel from announcing link-local addresses, which would be counted as traffic."""
        return [f"link set {interface} addrgenmode none"] if self._mtu >= _IPV6_MTU else []  # below, it speaks none


def checked_run(words: Sequence[str], given: str = "") -> str:
    """The output of a short command with an input text. Raises EmulationError, with its error output, if it fails."""
    done = tried(words, given)
    if done.returncode != 0:
        raise EmulationError(f"{' '.join(words[:3])}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def _batch(tool: str, *lines: str, node: str | None = None) -> None:
    """Carry out lines of `ip` or `tc`, in a node's namespace if one is named."""
    if lines:
        checked_run([tool, *(["-netns", node] if node else []), "-batch", "-"], "\n".join(lines))


def _needs_netem(link: Link) -> bool:
    return link.delay_s > 0 or link.jitter_s > 0 or link.loss_probability > 0


def _netem_works() -> bool:
    """Whether this kernel has sch_netem, tried on the loopback interface."""
    if tried(["tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]).returncode != 0:
        return False
    checked_run(["tc", "qdisc", "delete", "dev", "lo", "root"])
    return True
