"""Where a member listens: its address, IPv4 or IPv6, and the socket on it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from pathlib import Path

from commopt.errors import GroupError

_SIOCGIFADDR = 0x8915
_LINK_LOCAL = "20"  # the scope, in /proc/net/if_inet6


def listen(address: tuple[str, int]) -> socket.socket:
    """A listening socket on an address or a name of this machine, or on all, if others know it by another. Raises GroupError."""
    host, port = address
    try:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            family, *_, place = min(found, key=lambda one: one[0] != socket.AF_INET)
            return socket.create_server(place, family=family, backlog=128)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, socket.EAI_NONAME):
                raise
            if socket.has_dualstack_ipv6():
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
            return socket.create_server(("", port), backlog=128)  # behind NAT the others know another address
    except OSError as error:
        shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        raise GroupError(f"{shown} cannot be listened on: {error.strerror or error}") from None


def listen_anywhere() -> tuple[socket.socket, tuple[str, int]]:
    """A listening socket on a free port, and its address for other ranks: that of GLOO_SOCKET_IFNAME, or of the host's name.

    An IPv4 address if there is one, but IPv6 first if the ranks have met at such an address (MASTER_ADDR).
    """
    is_ipv6 = ":" in os.environ.get("MASTER_ADDR", "")
    found = _addresses_of(os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0])
    if not found:
        with contextlib.suppress(OSError):
            found = [str(place[0]) for *_, place in socket.getaddrinfo(socket.gethostname(), 0)]
    host = min(found, key=lambda one: (":" in one) != is_ipv6, default="::1" if is_ipv6 else "127.0.0.1")
    listener = listen((host, 0))
    return listener, (host, int(listener.getsockname()[1]))


def _addresses_of(interface: str) -> list[str]:
    """An interface's addresses, without those that are good on one cable only; none if there is no such interface."""
    found = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        told = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        found.append(socket.inet_ntoa(told[20:24]))
    with contextlib.suppress(OSError):
        rows = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
        six = [row[0] for row in rows if row[5] == interface and row[3] != _LINK_LOCAL]
        found += [socket.inet_ntop(socket.AF_INET6, bytes.fromhex(one)) for one in six]
    return found
