"""Transports for the tests of groups and of peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from members import over_tcp

from commopt.groups import SimGroup, SimWorld
from commopt.plan.links import LinkModel

RANKS = (1, 2, 3, 5)
Run = Callable[..., list[Any]]


def on_mpi(communicator: Any, function: Callable[..., Any], *args: Any) -> Any:
    from commopt.groups import MPIGroup

    group = MPIGroup(communicator, timeout_s=60)
    result = function(group, *args)
    group.close()
    return result


def simulated(n: int, function: Callable[[SimGroup], Any], **options: Any) -> tuple[SimWorld[Any], list[Any]]:
    world: SimWorld[Any] = SimWorld(n, LinkModel.uniform(n, "100mbit", "1ms"), timeout_s=30, **options)
    return world, world.run(function)


def over_simulated_peers(n: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """function(peers, *args) on n ranks."""
    return simulated(n, lambda group: function(group.peers, *args))[1]


def over_tcp_peers(n: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """The same over TCP on this machine, once all have found each other."""
    return over_tcp(n, lambda peers: function(peers, *args))
