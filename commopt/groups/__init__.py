"""Transports: torch.distributed (Gloo, NCCL), MPI, simulated ranks in threads, and any of them slowed to a link model."""

from typing import TYPE_CHECKING, Any

from commopt.groups.base import Group, LocalGroup, Traffic
from commopt.groups.job import connect
from commopt.groups.paced import PacedGroup
from commopt.groups.peers import PeerGroup, Peers
from commopt.groups.simulated import SimGroup, SimWorld
from commopt.groups.tcp import TcpPeers
from commopt.groups.torch import TorchGroup
from commopt.groups.world import World

if TYPE_CHECKING:
    from commopt.groups.mpi import MPIGroup as MPIGroup

# MPIGroup is imported on first use, and not listed: importing mpi4py starts MPI
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
    "World",
    "connect",
]


def __getattr__(name: str) -> Any:
    if name == "MPIGroup":
        from commopt.groups.mpi import MPIGroup

        return MPIGroup
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
