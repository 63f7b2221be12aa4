"""Transports: torch.distributed (Gloo, NCCL), MPI, simulated ranks in threads, and any of them slowed to a link model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from commopt.groups.base import Group, LocalGroup, Traffic
from commopt.groups.job import connect
from commopt.groups.paced import PacedGroup
from commopt.groups.peers import PeerGroup, Peers
from commopt.groups.simulated import SimGroup, SimWorld
from commopt.groups.tcp import TcpPeers
from commopt.groups.torch import TorchGroup

if TYPE_CHECKING:
    from commopt.groups.mpi import MPIGroup as MPIGroup

# MPIGroup is not listed: `import *` would start MPI
__all__ = [
    "Group",
    "LocalGroup",
    "PacedGroup",
    "PeerGroup",
    "Peers",
    "SimGroup",
    "SimWorld",
    "TcpPeers",
    "TorchGroup",
    "Traffic",
    "connect",
]


def __getattr__(name: str) -> Any:
    if name == "MPIGroup":  # only for those who ask: importing mpi4py starts MPI
        from commopt.groups.mpi import MPIGroup

        return MPIGroup
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
