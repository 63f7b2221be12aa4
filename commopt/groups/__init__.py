"""Transports: torch.distributed (Gloo, NCCL), simulated ranks in threads, and any of them slowed to a link model."""

from commopt.groups.base import Group, LocalGroup, Traffic
from commopt.groups.paced import PacedGroup
from commopt.groups.peers import PeerGroup, Peers
from commopt.groups.simulated import SimGroup, SimWorld
from commopt.groups.tcp import TcpPeers
from commopt.groups.torch import TorchGroup

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
]
