"""Where this process listens, at an IPv4 or IPv6 address, and which of its members hears a connection."""

import contextlib
import errno
import fcntl
import itertools
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from commopt.errors import GroupError
from commopt.groups.frames import Connection
from commopt.groups.membership import Membership

_log = logging.getLogger(__name__)

_SIOCGIFADDR = 0x8915
_LINK_LOCAL = "20"  # the scope, in /proc/net/if_inet6
_STRANGERS = 64  # connections that have not said yet who they are; one more takes the place of the oldest
_WARNINGS = 256  # different ones at most
Hear = Callable[[dict[str, Any], Connection], object]  # a member's: what it does with a hello and the connection


class Listener:
    """A listening socket and the members behind it, each of a job of its own: a connection goes to the job that its hello names."""

    def __init__(self, listening: socket.socket, membership: Membership, silence_s: float) -> None:
        self.socket, self._silence_s = listening, silence_s
        self._rank, self._secret = membership.rank, membership.secret
        self.is_closed, self._changed = False, threading.Condition()
        self._members: dict[str, Hear] = {}
        self._jobs: set[str] = set()  # as their launcher names them
        self._readers: dict[threading.Thread, socket.socket] = {}
        self._strangers: list[socket.socket] = []
        self._warned: set[str] = set()
        self._thread = threading.Thread(target=self._accept, name="commopt listener", daemon=True)

    def add(self, job: str, hear: Hear) -> str:
        """Add a member; returns its job's name: for the second open member of a job "job+1", and so on."""
        with self._changed:
            names = (f"{job}+{k}" if k else job for k in itertools.count())
            name = next(name for name in names if name not in self._members)
            self._members[name] = hear
            if not self._jobs:  # what comes earlier would be of an unknown job
                self._thread.start()
            self._jobs.add(job)
            self._changed.notify_all()
        return name

    def leave(self, name: str) -> None:
        """Take a member away; the last one closes the socket."""
        with _sharing, self._changed:
            del self._members[name]
            if self._members:
                return
            for key in [key for key, one in _shared.items() if one is self]:
                del _shared[key]
            self.is_closed, readers = True, dict(self._readers)
            self._changed.notify_all()
            for one in (self.socket, *readers.values()):
                hang_up(one)
                one.close()
        for thread in (*readers, self._thread):  # a thread in torch's code aborts an interpreter that ends
            thread.join(2.0)

    def warn(self, what: str) -> None:
        """Log it, if this is the first time."""
        if what not in self._warned and len(self._warned) < _WARNINGS and not self.is_closed:
            self._warned.add(what)
            _log.warning("rank %d %s", self._rank, what)

    def _accept(self) -> None:
        while not self.is_closed:
            accepted = None
            try:
                accepted, _ = self.socket.accept()
                reader = threading.Thread(target=self._read, args=(accepted,), name="commopt reader", daemon=True)
                # `leave` reads the readers under this lock, and can only join threads that have started
                with self._changed:
                    if self.is_closed:
                        raise ConnectionAbortedError
                    reader.start()
                    self._readers[reader] = accepted
                    self._strangers.append(accepted)
                    for oldest in self._strangers[:-_STRANGERS]:
                        self._strangers.remove(oldest)
                        hang_up(oldest)
            except (OSError, RuntimeError) as error:  # one broke, or too many are open; the listener still works
                if accepted is not None:
                    accepted.close()
                if not self.is_closed:
                    _log.warning("rank %d could not accept a connection: %s", self._rank, error)
                    time.sleep(0.2)

    def _read(self, accepted: socket.socket) -> None:
        connection = Connection(accepted)
        try:
            deadline_s = time.monotonic() + self._silence_s
            if self._secret is not None:
                connection.agree(self._secret, self._rank, has_dialled=False, deadline_s=deadline_s)
            hello, _ = connection.read(deadline_s=deadline_s)
            self._member_for(hello, accepted, deadline_s)(hello, connection)
        except PermissionError as error:
            with contextlib.suppress(OSError):
                self.warn(f"turned away {accepted.getpeername()[0]}: {error}")
            connection.refuse(str(error))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError):
            pass  # noise, or one that dials again
        finally:
            accepted.close()
            with self._changed:
                self._readers.pop(threading.current_thread(), None)
                if accepted in self._strangers:
                    self._strangers.remove(accepted)

    def _member_for(self, hello: dict[str, Any], accepted: socket.socket, deadline_s: float) -> Hear:
        """Who hears this connection; waits for a member that is attached here a little later than on other ranks."""
        job = str(hello["job"]) if hello["kind"] == "hello" else ""
        with self._changed:
            if not self._jobs & {job, job.rpartition("+")[0]}:
                raise PermissionError("another job: another name in the cluster's file, or another run")
            self._changed.wait_for(lambda: self.is_closed or job in self._members, deadline_s - time.monotonic())
            member = self._members[job]
            self._strangers.remove(accepted)
        return member


_shared: dict[tuple[object, ...], Listener] = {}
_sharing = threading.Lock()


def enter(
    membership: Membership, hear: Hear, silence_s: float, listening: socket.socket | None = None
) -> tuple[Listener, str]:
    """Let a member hear the connections to its address; returns the listener, and the job's name there (`Listener.add`).

    Members of one process at one address share a listener, unless theirs is given. Raises GroupError if it cannot be listened on.
    """
    address = membership.addresses[membership.rank]
    key = (address, membership.rank, membership.secret)
    with _sharing:
        listener = _shared.get(key) if listening is None else Listener(listening, membership, silence_s)
        if listener is None:
            listener = _shared[key] = Listener(listen(address), membership, silence_s)
        return listener, listener.add(membership.job, hear)


def hang_up(connected: socket.socket) -> None:
    """End a connection for the thread that uses it, too."""
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


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
    """An interface's addresses, except link-local ones; none if it does not exist."""
    found = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        told = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        found.append(socket.inet_ntoa(told[20:24]))
    with contextlib.suppress(OSError):
        rows = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
        six = [row[0] for row in rows if row[5] == interface and row[3] != _LINK_LOCAL]
        found += [socket.inet_ntop(socket.AF_INET6, bytes.fromhex(one)) for one in six]
    return found
