"""The command line and the environment of each node's torchrun agent. Starts nothing."""

import hashlib
import json
import os
import secrets
import sys
from collections.abc import Sequence

from commopt.cluster.emulate import Emulation
from commopt.cluster.machine import LOOPBACK, Emulate, free_ports
from commopt.secret import given_secret


def agent_words(emulation: Emulation, node: int, argv: Sequence[str], *, independent: bool = False) -> list[str]:
    """The command line of one node's torchrun agent; an independent one is a job of its own, and needs no other node."""
    cluster, host = emulation.cluster, emulation.addresses[0]
    if independent:
        port = emulation.port if emulation.mode is Emulate.NETNS else free_ports(1)[0]  # on each node's own loopback
        place = ["--node-rank=0", "--master-addr=127.0.0.1", f"--master-port={port}", "--max-restarts=0"]
    elif cluster.rendezvous.backend == "static":
        place = [f"--node-rank={node}", f"--master-addr={host}", f"--master-port={emulation.port}"]
    else:
        place = [
            "--rdzv-backend=c10d",
            f"--rdzv-id={cluster.name}",
            f"--rdzv-endpoint={f'[{host}]' if ':' in host else host}:{emulation.port}",
            f"--rdzv-conf=is_host={str(node == 0).lower()}",  # torchrun can't tell by itself across namespaces
            f"--local-addr={emulation.addresses[node]}",
        ]
    words = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={1 if independent else len(cluster.nodes)}"]
    words += [f"--nproc-per-node={cluster.slots}", *place]
    words += [f"--log-dir={os.devnull}"]  # else torchrun leaves a temporary folder; output goes through a socket
    return [*words, *([] if argv[0].endswith(".py") else ["--no-python"]), *argv]


def peers_json(emulation: Emulation, label: str = "", mark: str | None = None) -> str:
    """`COMMOPT_PEERS`: the job's identifier, and the address and port of each rank, in rank order.

    mark: the identifier, 32 hex digits; by default a hash that is the same on every machine, so that a restarted or an
    added one finds its job. label: part of that hash, to distinguish successive jobs of one cluster, such as those of a comparison.
    """
    told = json.dumps([emulation.cluster.name, label])
    mark = mark or hashlib.sha256(told.encode()).hexdigest()[:32]
    return json.dumps({"job": mark, "members": emulation.members()})


def secret_of(emulation: Emulation) -> dict[str, str]:
    """A new secret for the ranks of one job; nothing if one is given, or if nodes are real machines, which could not know it."""
    is_given = given_secret() is not None  # raises ConfigError for a bad one, before anything starts
    return {} if is_given or emulation.is_elsewhere else {"COMMOPT_SECRET": secrets.token_hex(32)}


def agent_environment(emulation: Emulation, node: int, *, ranks_here: int, peers: str | None = None) -> dict[str, str]:
    """The variables that commopt sets for the ranks of one node; `ranks_here` of them share this machine's cores."""
    cluster, interface = emulation.cluster, emulation.interfaces[node]
    threads = max(1, (os.cpu_count() or 1) // max(1, ranks_here))
    environment = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface if cluster.backend == "nccl" else None,
        "COMMOPT_NODE": cluster.nodes[node].name,
        "COMMOPT_NODE_RANK": str(node),
        "COMMOPT_MTU": str(cluster.links.mtu),
        "COMMOPT_NIC": None if interface in LOOPBACK else interface,  # its counters don't belong to one node
        "COMMOPT_LINKS": emulation.links,
        "COMMOPT_PEERS": peers,
    }
    return {key: value for key, value in environment.items() if value is not None}
