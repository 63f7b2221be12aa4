"""What a round of exchanges costs on uneven links, for ten thousand nodes at once: the loads of all pipes as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from commopt.plan.links import LinkModel
from commopt.plan.profile import Operation

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Collective:
    """One operation among the members of each group; `nbytes`: what a node contributes, as in `profile.Phase`.

    Of an all-to-all that is what the node has for all members, its own part included; of a `send` what it sends to the next
    member, so that the two of a pair swap.
    """

    operation: Operation
    nbytes: float


@dataclass(frozen=True)
class Groups:
    """Disjoint sets of nodes that exchange in one round. order: (members,) nodes, group after group; starts: (groups,)."""

    order: I64
    starts: I64

    @property
    def sizes(self) -> I64:
        return np.diff(self.starts, append=len(self.order))

    @classmethod
    def cut(cls, order: I64, size: int) -> Groups:
        """Every `size` nodes of `order` are a group, in ascending order; the last one may be smaller."""
        whole = len(order) // size * size
        ascending = [np.sort(order[:whole].reshape(-1, size), axis=1).ravel(), np.sort(order[whole:])]
        return cls(np.concatenate(ascending), np.arange(0, len(order), size))

    def among(self, is_up: NDArray[np.bool_]) -> tuple[Groups, NDArray[np.bool_]]:
        """The same groups without the nodes that are not up, and which of them have lost a member; is_up: (nodes,)."""
        here = is_up[self.order]
        left = np.add.reduceat(here, self.starts, dtype=np.int64)  # (groups,)
        starts = np.cumsum(left) - left
        return Groups(self.order[here], starts[left > 0]), (left < self.sizes)[left > 0]


class Pipes:
    """The links of a `LinkModel` between nodes, of which exchanges fill a share, `efficiency`.

    A round's groups all exchange at the same time: they share the pipes between sites, as in `LinkModel.seconds`.
    """

    def __init__(self, links: LinkModel, efficiency: float = 1.0) -> None:
        self.nodes = len(links.bytes_per_s)
        self._rate, self._latency_s = np.array(links.bytes_per_s) * efficiency, np.array(links.latency_s)
        self._site, self._sites = np.array(links.site_of_node), len(links.between_bytes_per_s)
        self._site_rate = np.array(links.between_bytes_per_s) * efficiency
        self._site_latency_s = np.array(links.between_latency_s)

    def round(self, groups: Groups, collectives: Sequence[Collective]) -> tuple[F64, F64]:
        """(groups,) seconds that each group's collectives take, one after another, and (members,) bytes that each node sends."""
        seconds, sent = np.zeros(len(groups.starts)), np.zeros(len(groups.order))
        if len(groups.order) == 0:
            return seconds, sent
        for one in collectives:
            took_s, bytes_out = self._cost(groups, one)
            seconds += took_s
            sent += bytes_out
        return seconds, sent

    def _cost(self, groups: Groups, one: Collective) -> tuple[F64, F64]:
        order, sizes = groups.order, groups.sizes
        site, size = self._site[order], np.repeat(sizes, sizes).astype(np.float64)  # (members,)
        if one.operation == "all_to_all":
            place = np.repeat(np.arange(len(sizes)), sizes) * self._sites + site
            at_home = np.bincount(place, minlength=len(sizes) * self._sites)[place]  # members of the group at this site
            bytes_out = one.nbytes * (size - 1) / size
            leaving = entering = one.nbytes * (size - at_home) / size  # bytes, from and to other sites
            leaves = enters = size > at_home
        else:
            after, before = self._neighbours(groups)
            copies = {"all_reduce": 2 * (size - 1) / size, "all_gather": size - 1, "send": np.sign(size - 1)}
            bytes_out = copies[one.operation] * one.nbytes
            leaves, enters = site[after] != site, site[before] != site
            leaving, entering = bytes_out * leaves, bytes_out * enters
        busy_s = bytes_out / self._rate[order]  # as many bytes come in
        for crossing, crosses in ((leaving, leaves), (entering, enters)):
            load = np.bincount(site, crossing, minlength=self._sites)
            busy_s = np.maximum(busy_s, np.where(crosses, (load / self._site_rate)[site], 0.0))
        delay_s = self._latency_s[order] + np.where(leaves, self._site_latency_s[site], 0.0)
        slowest = np.maximum.reduceat(busy_s, groups.starts)
        return self._latency(groups, one.operation, delay_s) + slowest, bytes_out

    def _latency(self, groups: Groups, operation: Operation, delay_s: F64) -> F64:
        """(groups,) seconds: in a ring those of the longest way once or twice around, less the hops that nobody waits for."""
        if operation in ("all_to_all", "send"):
            return np.where(groups.sizes > 1, np.maximum.reduceat(delay_s, groups.starts), 0.0)
        around = np.add.reduceat(delay_s, groups.starts)
        if operation == "all_gather":
            return around - np.minimum.reduceat(delay_s, groups.starts)
        after, _ = self._neighbours(groups)
        return 2 * around - np.minimum.reduceat(delay_s + delay_s[after], groups.starts)

    @staticmethod
    def _neighbours(groups: Groups) -> tuple[I64, I64]:
        """Places of the members that each one sends to and receives from in its group's ring."""
        last = groups.starts + groups.sizes - 1
        after, before = np.arange(len(groups.order)) + 1, np.arange(len(groups.order)) - 1
        after[last], before[groups.starts] = groups.starts, last
        return after, before
