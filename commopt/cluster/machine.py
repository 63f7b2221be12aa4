"""This machine's own commands, addresses, interfaces, ports and byte counters."""

import os
import socket
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from enum import Enum
from pathlib import Path

from commopt.errors import LaunchError

LOOPBACK = ("lo", "lo0")  # on Linux, and elsewhere


class Emulate(str, Enum):
    """How the links are imposed: by the kernel, by pacing, not at all, or by the best that works."""

    AUTO = "auto"
    NETNS = "netns"
    PACED = "paced"
    NONE = "none"


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tool_path() -> str:
    """PATH, and the folders where Debian keeps `tc`, which are not in an ordinary user's."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def tried(words: Sequence[str], given: str = "", *, timeout_s: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run a short command with an input text; the exit code is 1 if it cannot be run, or takes too long."""
    environment = {**os.environ, "PATH": tool_path()}
    try:
        return subprocess.run(words, input=given, env=environment, capture_output=True, text=True, timeout=timeout_s)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(words, 1, "", str(error))


def free_ports(count: int) -> list[int]:
    """Different ports that nothing listens on now. Raises LaunchError for more than this process may open at once."""
    with ExitStack() as stack:
        try:
            listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            cure = "raise it with ulimit -n, or write fewer nodes or slots"
            raise LaunchError(f"{count} ports are too many at once: {why}; {cure}") from None
        return [listener.getsockname()[1] for listener in listeners]


def loopback_interface() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in LOOPBACK if name in names), "lo")


def own_address(host: str | None) -> str | None:
    """The address that a host's name stands for, if it leads to this machine: only then can a socket be bound to it."""
    if not host:
        return None
    try:
        family, _, _, _, place = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(place)
    except OSError:
        return None
    return str(place[0]).partition("%")[0]


def interface_of(host: str) -> str | None:
    """The interface that owns a host's address on this machine, or None.

    None too for a name that /etc/hosts maps to a loopback address, because other machines resolve it differently.
    """
    if (own := own_address(host)) is None:
        return None
    if host.startswith("127.") or host == "::1":
        return loopback_interface()
    listed = tried(["ip", "-oneline", "address", "show", "to", own]).stdout.splitlines()
    return next((name for line in listed if (name := line.split()[1]) not in LOOPBACK), None)


def nic_tx_bytes(interface: str | None) -> int | None:
    """Bytes sent through an interface; None if they are unknown, or not of one node, as on loopback."""
    if interface is None or interface in LOOPBACK:
        return None
    try:
        return int(Path("/sys/class/net", interface, "statistics", "tx_bytes").read_text())
    except (OSError, ValueError):
        return None
