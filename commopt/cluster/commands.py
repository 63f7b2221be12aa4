"""From a cluster to the processes of a job: the words and the environment of each node's torchrun agent. Pure."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from commopt.cluster.machine import LOOPBACK
from commopt.cluster.spec import Backend, ClusterSpec, RendezvousBackend


@dataclass(frozen=True)
class Meeting:
    """Where the agents of one job meet: the address of each node, and the port of node 0."""

    addresses: tuple[str, ...]
    port: int


def program_words(program: str, arguments: Sequence[str]) -> list[str]:
    """What torchrun is given to run: a Python file as it is, anything else without an interpreter."""
    return [program, *arguments] if program.endswith(".py") else ["--no-python", program, *arguments]


def agent_words(cluster: ClusterSpec, node: int, program: Sequence[str], *, meeting: Meeting) -> list[str]:
    """The torchrun agent of one node. `program` is what `program_words` returns."""
    host = meeting.addresses[0]
    if cluster.rendezvous.backend is RendezvousBackend.STATIC:
        place = [f"--node-rank={node}", f"--master-addr={host}", f"--master-port={meeting.port}"]
    else:
        place = [
            "--rdzv-backend=c10d",
            f"--rdzv-id={cluster.name}",
            f"--rdzv-endpoint={host}:{meeting.port}",
            f"--rdzv-conf=is_host={str(node == 0).lower()}",  # between namespaces nobody recognises the address as its own
            f"--local-addr={meeting.addresses[node]}",
        ]
    return _torchrun(len(cluster.nodes), cluster.slots, place, program)


def lone_agent_words(cluster: ClusterSpec, program: Sequence[str], *, port: int) -> list[str]:
    """The torchrun agent of a node that is a job of its own: it needs no other node, and ends none.

    port: on that node's loopback interface, where the agent meets its own ranks.
    """
    place = ["--node-rank=0", "--master-addr=127.0.0.1", f"--master-port={port}", "--max-restarts=0"]
    return _torchrun(1, cluster.slots, place, program)


def _torchrun(nodes: int, slots: int, place: Sequence[str], program: Sequence[str]) -> list[str]:
    words = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={slots}", *place]
    return [
        *words,
        f"--log-dir={os.devnull}",
        *program,
    ]  # else a temporary folder is left; the output comes through a pipe


def peers_json(job: str, members: Sequence[tuple[str, int]]) -> str:
    """`COMMOPT_PEERS`: what tells this job from others, and where each rank listens, in rank order."""
    return json.dumps({"job": job, "members": members})


def job_mark(cluster: ClusterSpec, members: Sequence[tuple[str, int]], label: str = "") -> str:
    """A job's mark that every machine finds by itself, so that one that comes back finds its job again; 32 hex digits.

    label: tells the jobs of one cluster apart that follow one another, as those of a comparison.
    """
    return hashlib.sha256(json.dumps([cluster.name, members, label]).encode()).hexdigest()[:32]


def agent_environment(
    cluster: ClusterSpec,
    node: int,
    *,
    interface: str | None,
    ranks_here: int,
    links: str | None = None,
    peers: str | None = None,
) -> dict[str, str]:
    """The variables that commopt sets for the ranks of one node.

    interface: the one that peers are reached through, or None where it is not known. ranks_here: all ranks on this
    machine, which share its cores: where the user has set OMP_NUM_THREADS, it stays. links: `COMMOPT_LINKS`, in paced mode.
    peers: `COMMOPT_PEERS`, where every node is on its own.
    """
    threads = max(1, (os.cpu_count() or 1) // max(1, ranks_here))
    environment = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface if cluster.backend is Backend.NCCL else None,
        "COMMOPT_NODE": cluster.nodes[node].name,
        "COMMOPT_NODE_RANK": str(node),
        "COMMOPT_MTU": str(cluster.links.mtu),
        "COMMOPT_NIC": None
        if interface in LOOPBACK
        else interface,  # where all nodes' bytes pass, nothing is said of one
        "COMMOPT_LINKS": links,
        "COMMOPT_PEERS": peers,
    }
    return {key: value for key, value in environment.items() if value is not None}
