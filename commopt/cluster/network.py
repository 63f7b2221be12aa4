"""The emulated network: a namespace per node, veth pairs on a bridge, and queueing disciplines that shape them.

node0 [eth0] ---- v0 |bridge b0| s0 ---- t0 |bridge core| t1 ---- s1 |bridge b1| v2 ---- [eth0] node2

A node's egress is shaped in its namespace (eth0) and its ingress on the bridge's side (v0). With sites there is a
bridge per site; what a site sends is shaped at s0, what it receives at t0. Everything is made in the network namespace
of the calling process, which must therefore have one of its own: see `commopt.cluster.emulate`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from commopt.cluster.machine import deferred_signals, tried
from commopt.cluster.spec import ClusterSpec, Link
from commopt.errors import EmulationError

INTERFACE = "eth0"  # of every node, in its own namespace
_FASTEST_BYTES_PER_S = 30e9 / 8  # tbf's rate field ends at 4 GiB/s; a veth pair is slower than that
_ETHERNET_BYTES = 14
_IPV6_MTU = 1280  # RFC 8200: the smallest of a link that carries it
_NOWHERE = "01:80:c2:00:00:01"  # IEEE 802.1D: bridges silently drop frames for this address


def address(node: int) -> str:
    return f"10.77.{(node + 1) // 256}.{(node + 1) % 256}"


def burst_bytes(bytes_per_s: float, mtu: int = 1500) -> int:
    """What a shaper lets pass at once: 2 ms at its rate, at least 16 KiB and one segment; far less than a step's payload."""
    return max(16 * 1024, mtu + _ETHERNET_BYTES, math.ceil(0.002 * bytes_per_s))


def queue_bytes(bytes_per_s: float, mtu: int = 1500) -> int:
    """What a shaper queues before it drops: 200 ms at its rate, at least 1 MiB, so that several senders to one node lose little."""
    return burst_bytes(bytes_per_s, mtu) + max(1 << 20, math.ceil(0.2 * bytes_per_s))


class Network:
    """The emulated network of one cluster; without `has_netem`, links only have their rates."""

    def __init__(self, cluster: ClusterSpec) -> None:
        from pyroute2 import IPRoute

        self._names = cluster.names
        self._mtu = cluster.links.mtu
        self._outer: dict[str, int] = {}  # name of a node -> index of its veth's outer end
        self._sent_before = dict.fromkeys(self._names, 0)  # through veths that were removed
        self._cut: set[frozenset[str]] = set()
        self._root: Any = IPRoute()
        links = [cluster.link(index) for index in range(len(self._names))]
        self.has_netem = any(map(_needs_netem, [*links, cluster.links.between])) and self._netem_works()
        self._root.link("set", index=1, state="up")
        bridges = self._add_bridges(cluster)
        self._places = [(link, bridges[site]) for link, site in zip(links, cluster.site_of_node, strict=True)]
        for name in self._names:
            self._add_node(name)

    @deferred_signals()
    def tx_bytes(self) -> dict[str, int]:
        """Bytes that each node has sent since the start, headers included, as received by the outer end of its veth."""
        sent, names = dict(self._sent_before), {index: name for name, index in self._outer.items()}
        for message in self._root.get_links(*names) if names else []:
            sent[names[message["index"]]] += int(message.get_attr("IFLA_STATS64")["rx_bytes"])
        return sent

    @deferred_signals()
    def unplug(self, name: str) -> None:
        """Cut a node off: nothing that it still sends arrives, but its own interface reports no error to its programs."""
        self._root.link("set", index=self._outer[name], state="down")

    @deferred_signals()
    def remove(self, name: str) -> None:
        """Remove a node whose programs have ended, with the connections that its kernel still keeps, as a machine would lose them."""
        from pyroute2 import netns

        self._sent_before[name] = self.tx_bytes()[name]
        self._root.link("del", index=self._outer.pop(name))
        netns.remove(name)

    @deferred_signals()
    def restore(self, name: str) -> None:
        """Bring back a node that was unplugged or removed, with the same addresses; cuts stay in force."""
        if name in self._outer:
            self._root.link("set", index=self._outer[name], state="up")
            return
        self._add_node(name)
        self._set_cuts(name, healed=set(), new=self._cut)

    @deferred_signals()
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
            lines += [f"neigh {verb} {other}{where} dev {INTERFACE}\n" for other in others]
        if lines:
            checked_run(["ip", "-n", name, "-batch", "-"], "".join(lines))

    def _add_bridges(self, cluster: ClusterSpec) -> list[int]:
        sites = max(1, len(cluster.sites))
        bridges = [self._add_bridge(f"b{site}") for site in range(sites)]
        if sites == 1:
            return bridges
        core = self._add_bridge("core")
        between = cluster.links.between
        for site, bridge in enumerate(bridges):
            inner, outer = f"s{site}", f"t{site}"
            self._root.link("add", ifname=inner, kind="veth", mtu=self._mtu, peer={"ifname": outer, "mtu": self._mtu})
            for name, master, link in ((inner, bridge, between), (outer, core, Link(rate=between.rate))):
                index = self._index(self._root, name)
                self._shape(self._root, index, link)
                self._root.link("set", index=index, master=master, state="up")
        return bridges

    def _add_bridge(self, name: str) -> int:
        self._root.link("add", ifname=name, kind="bridge", mtu=self._mtu)
        index = self._index(self._root, name)
        self._silence_ipv6(self._root, index)
        self._root.link("set", index=index, state="up")
        return index

    def _add_node(self, name: str) -> None:
        from pyroute2 import NetNS, netns

        number = self._names.index(name)
        link, bridge = self._places[number]
        netns.create(name)
        outer = f"v{number}"
        peer = {"ifname": INTERFACE, "net_ns_fd": name, "mtu": self._mtu}
        self._root.link("add", ifname=outer, kind="veth", mtu=self._mtu, peer=peer)
        index = self._index(self._root, outer)
        self._outer[name] = index
        self._silence_ipv6(self._root, index)
        self._shape(self._root, index, Link(rate=link.rate))
        self._root.link("set", index=index, master=bridge, state="up")
        inside: Any
        with NetNS(name, flags=0) as inside:
            index = self._index(inside, INTERFACE)
            inside.link("set", index=1, state="up")
            inside.addr("add", index=index, address=address(number), prefixlen=16)
            hardware = f"02:00:0a:4d:{(number + 1) // 256:02x}:{(number + 1) % 256:02x}"
            inside.link("set", index=index, address=hardware)  # the others may have cached it
            inside.link("set", index=index, gso_max_segs=1)  # no offload: every segment has its headers, as on a wire
            self._silence_ipv6(inside, index)
            self._shape(inside, index, link)
            inside.link("set", index=index, state="up")

    def _shape(self, route: Any, index: int, link: Link) -> None:
        """Limit what leaves through an interface; delay, jitter and loss need netem."""
        rate, place = link.bytes_per_s, dict[str, str]()
        if rate < _FASTEST_BYTES_PER_S:
            burst, limit = burst_bytes(rate, self._mtu), queue_bytes(rate, self._mtu)
            route.tc("add", "tbf", index, handle="1:", rate=math.ceil(rate), burst=burst, limit=limit)
            place = {"parent": "1:1"}
        if self.has_netem and _needs_netem(link):
            held_s = 1.0 + link.delay_s + link.jitter_s
            packets = max(1000, math.ceil(held_s * min(rate, _FASTEST_BYTES_PER_S) / self._mtu))
            # microseconds; and a percentage, which overflows 32 bits at 100
            times = {"delay": link.delay_s * 1e6, "jitter": link.jitter_s * 1e6}
            loss = min(link.loss_probability * 100, 99.9999)
            route.tc("add", "netem", index, handle="10:", **place, **times, loss=loss, limit=packets)

    def _netem_works(self) -> bool:
        """Whether this kernel has sch_netem, tried on the loopback interface."""
        from pyroute2 import NetlinkError

        try:
            self._root.tc("add", "netem", 1, handle="1:", delay=1000)
        except NetlinkError:
            return False
        self._root.tc("del", index=1, root=True)
        return True

    def _silence_ipv6(self, route: Any, index: int) -> None:
        """Keep the kernel from announcing link-local addresses, which would be counted as traffic."""
        if self._mtu < _IPV6_MTU:  # then it speaks none
            return
        mode = {"attrs": [("AF_INET6", {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", 1)]})]}
        route.link("set", index=index, IFLA_AF_SPEC=mode)

    @staticmethod
    def _index(route: Any, name: str) -> int:
        return int(route.link_lookup(ifname=name)[0])


def checked_run(words: Sequence[str], given: str = "") -> None:
    """Run a short command with an input text. Raises EmulationError, with its error output, if it fails."""
    done = tried(words, given)
    if done.returncode != 0:
        raise EmulationError(f"{' '.join(words[:3])}: {done.stderr.strip() or f'exit code {done.returncode}'}")


def _needs_netem(link: Link) -> bool:
    return link.delay_s > 0 or link.jitter_s > 0 or link.loss_probability > 0
