"""Transports for the tests of groups and of peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from outer_rig import over_tcp

from commopt.groups import SimWorld
from commopt.groups.tcp import TcpPeers
from commopt.plan.links import LinkModel

RANKS = (1, 2, 3, 5)
Run = Callable[..., list[Any]]


def on_mpi(communicator: Any, function: Callable[..., Any], *args: Any) -> Any:
    from commopt.groups import MPIGroup

    group = MPIGroup(communicator, timeout_s=60)
    result = function(group, *args)
    group.close()
    return result


def over_simulated_peers(n: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """function(peers, *args) on n ranks."""
    world: SimWorld[Any] = SimWorld(n, LinkModel.uniform(n, "100mbit", "1ms"), timeout_s=30)
    return world.run(lambda group: function(group.peers, *args))


def over_tcp_peers(n: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """The same over TCP on this machine, once all have found each other."""

    def work(peers: TcpPeers) -> Any:
        end_s = peers.seconds + 20
        peers.announce(0, is_training=True)
        while not all(peers.is_up(peer) for peer in peers.others):
            assert peers.seconds < end_s, "the members did not find each other"
            peers.sleep(0.01)
        return function(peers, *args)

    return over_tcp(n, work, 40)
