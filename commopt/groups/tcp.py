"""Peers over plain TCP: no store, no leader, no process group; any member may die, and be restarted alone.

Every member listens on its own address and dials every other one, so each pair has two connections, each used in one direction.
A thread per peer sends its queued messages, or once a second this member's progress; it dials again when a connection breaks.

Frame: "!4sIQ" (magic, bytes of the head, bytes of the body); the head is JSON, the body a payload's buffer. Nothing is unpickled.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import json
import logging
import os
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch

from commopt.errors import ConfigError, GroupError
from commopt.groups.base import Traffic
from commopt.groups.peers import GROUP, KEPT, Letter, Mailbox, Peers, Progress
from commopt.plan.links import LinkModel
from commopt.wire.payload import Payload, layout_bytes

_log = logging.getLogger(__name__)
_FRAME, _MAGIC = struct.Struct("!4sIQ"), b"cmo1"
_BEAT_S = 1.0
_DIAL_S = 2.0
_SIOCOUTQ, _SIOCGIFADDR = 0x5411, 0x8915
_HEAD_LIMIT = 1 << 16
T = TypeVar("T")


@dataclass(frozen=True)
class Membership:
    """The members of a job as the launcher lists them: (address, port) of every rank, and a word that only its members know."""

    rank: int
    addresses: tuple[tuple[str, int], ...]
    job: str
    returns: bool = False

    @classmethod
    def from_environment(cls) -> Membership | None:
        """Read COMMOPT_PEERS, and this rank's place from COMMOPT_NODE_RANK, LOCAL_WORLD_SIZE and LOCAL_RANK; None without COMMOPT_PEERS.

        COMMOPT_RETURNS=1 says that this rank was restarted in a running job. Raises ConfigError for a value that is not the launcher's.
        """
        text = os.environ.get("COMMOPT_PEERS")
        if not text:
            return None
        try:
            given = json.loads(text)
            addresses = tuple((str(host), int(port)) for host, port in given["members"])
            place = [int(os.environ.get(key, "0")) for key in ("COMMOPT_NODE_RANK", "LOCAL_RANK")]
            rank = place[0] * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + place[1]
            if not 0 <= rank < len(addresses):
                raise ValueError(f"there is no rank {rank} among {len(addresses)} members")
            return cls(rank, addresses, str(given["job"]), os.environ.get("COMMOPT_RETURNS") == "1")
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"environment: COMMOPT_PEERS={text:.80}: {error}") from None

    def of_number(self, number: int, ranks: int) -> Membership:
        """The members that have this number on their machines, which have `ranks` each."""
        if len(self.addresses) % ranks or self.rank % ranks != number:
            raise ConfigError(f"environment: {len(self.addresses)} members do not make machines of {ranks} ranks")
        addresses, job = self.addresses[number::ranks], f"{self.job} {number}" if ranks > 1 else self.job
        return replace(self, rank=self.rank // ranks, addresses=addresses, job=job)


@dataclass
class _Frame:
    head: dict[str, Any]
    body: torch.Tensor | None = None
    expires_s: float = float("inf")


@dataclass
class _Route:
    """What this member knows of one peer, and the frames to be sent to it."""

    address: tuple[str, int]
    unsent: queue.Queue[_Frame | None] = field(default_factory=queue.Queue)
    socket: socket.socket | None = None
    heard_s: float = float("-inf")
    readers: int = 0
    incarnation: int = -1
    progress: Progress = field(default_factory=lambda: Progress(0, False))


class TcpPeers(Peers):
    """The members of a job over TCP.

    silence_s: a peer that is silent for so long is down until it is heard again; all members send something every second.
    listener: a listening socket, if the port had to be known before; else one is bound to this member's address.
    links: messages are slowed down to this model, if the kernel does not do that.
    Raises GroupError if the address cannot be bound.
    """

    def __init__(
        self,
        membership: Membership,
        *,
        silence_s: float = 5.0,
        listener: socket.socket | None = None,
        links: LinkModel | None = None,
    ) -> None:
        self.rank, self.size, self.traffic = membership.rank, len(membership.addresses), Traffic()
        self.silence_s, self._job, self.returns = silence_s, membership.job, membership.returns
        self._incarnation = time.time_ns()
        self._mailbox, self._changed = Mailbox(), threading.Condition()
        self._routes = {r: _Route(address) for r, address in enumerate(membership.addresses) if r != self.rank}
        self._own = Progress(0, False)
        self._is_closed = False
        self._listener = listener or _listen(membership.addresses[self.rank])
        self._readers: dict[threading.Thread, socket.socket] = {}
        self._background = ThreadPoolExecutor(1, thread_name_prefix="commopt lane")
        self._links, self._link_is_busy = links, threading.Lock()
        self._threads = [threading.Thread(target=self._accept, name="commopt listener", daemon=True)]
        self._threads += [
            threading.Thread(target=self._serve, args=(peer,), name=f"commopt to rank {peer}", daemon=True)
            for peer in self._routes
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close, 0.0)

    @property
    def seconds(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def start(self, job: Callable[[], T]) -> Callable[[], T]:
        return self._background.submit(job).result

    def send(self, peer: int, channel: str, sequence: int, payload: Payload, *, expires_s: float = 30.0) -> None:
        layout = [[str(dtype).removeprefix("torch."), n] for dtype, n in payload.layout]
        # a peer keeps no more than KEPT: messages to one that is down must not fill memory
        most = 4 * KEPT if self.is_up(peer) else KEPT
        if not channel.startswith(GROUP) and self._routes[peer].unsent.unfinished_tasks >= most:
            return
        head = {**self._beat().head, "kind": "letter", "channel": channel, "sequence": sequence, "layout": layout}
        self._queue(peer, _Frame(head, payload.buffer.detach().cpu(), self.seconds + expires_s))

    def receive(
        self, peer: int, channel: str, sequence: int, timeout_s: float, *, or_newer: bool = False
    ) -> Letter | None:
        deadline_s = self.seconds + timeout_s
        with self._changed:
            while True:
                letter = self._mailbox.take(peer, channel, sequence, or_newer=or_newer)
                left_s = deadline_s - self.seconds
                if letter is not None or left_s <= 0 or not self.is_up(peer):
                    return letter
                self._changed.wait(min(left_s, 0.5))  # no event wakes it when a peer falls silent

    def drain(self, channel: str) -> list[tuple[int, Letter]]:
        with self._changed:
            return self._mailbox.drain(channel)

    def is_up(self, peer: int) -> bool:
        if peer == self.rank:
            return True
        route = self._routes[peer]
        return route.readers > 0 and self.seconds - route.heard_s < self.silence_s

    def progress(self, peer: int) -> Progress | None:
        if peer == self.rank:
            return self._own
        return self._routes[peer].progress if self.is_up(peer) else None

    def announce(self, step: int, *, is_training: bool = True) -> None:
        was, self._own = self._own, Progress(step, is_training)
        if was.is_training != is_training:
            for peer in self._routes:
                self._queue(peer, self._beat())

    def is_quiet(self) -> bool:
        routes = self._routes.values()
        is_sent = not any(route.unsent.unfinished_tasks for route in routes)
        return is_sent and not any(one and _unacknowledged(one) for one in [route.socket for route in routes])

    def close(self, linger_s: float = 5.0) -> None:
        if self._is_closed:
            return
        atexit.unregister(self.close)
        end_s = self.seconds + linger_s
        while self.seconds < end_s and any(r.unsent.unfinished_tasks for k, r in self._routes.items() if self.is_up(k)):
            time.sleep(0.01)
        self._is_closed = True
        self._background.shutdown(wait=False, cancel_futures=True)
        for route in self._routes.values():
            route.unsent.put(None)
        for thread in self._threads[1:]:
            thread.join(max(0.1, min(1.0, end_s - self.seconds)))
        with self._changed:
            readers = dict(self._readers)
            self._changed.notify_all()
        outgoing = [route.socket for route in self._routes.values()]
        for one in (self._listener, *readers.values(), *filter(None, outgoing)):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in (*readers, *self._threads):  # a thread in torch's code aborts an interpreter that ends
            if thread is not threading.current_thread():
                thread.join(2.0)

    def _beat(self) -> _Frame:
        return _Frame({"kind": "beat", "step": self._own.step, "is_training": self._own.is_training})

    def _queue(self, peer: int, frame: _Frame) -> None:
        if self._is_closed:
            raise GroupError("these peers have been closed")
        self._routes[peer].unsent.put(frame)

    # -- sending: one thread for each peer

    def _serve(self, peer: int) -> None:
        route = self._routes[peer]
        pause_s = 0.02  # short at first, so that ranks that start together soon find each other
        while not self._is_closed:
            try:
                frame = route.unsent.get(timeout=pause_s)
            except queue.Empty:
                is_told = self._transmit(peer, route, self._beat())
                pause_s = _BEAT_S if is_told else min(2 * pause_s, _BEAT_S)
                continue
            if frame is None:
                break
            while self.seconds < frame.expires_s and not self._is_closed and not self._transmit(peer, route, frame):
                if frame.body is None:
                    break  # the next beat replaces it
                time.sleep(0.2)
            route.unsent.task_done()
        with contextlib.suppress(OSError):
            if route.socket is not None:
                route.socket.settimeout(0.5)
                _write(route.socket, _Frame({"kind": "bye"}))

    def _transmit(self, peer: int, route: _Route, frame: _Frame) -> bool:
        """Send one frame, dialling first if there is no connection; whether the kernel took all of it."""
        try:
            if route.socket is None:
                self._dial(route)
            assert route.socket is not None
            if self._links is not None and frame.body is not None:
                self._pace(self._links, peer, route.socket, frame.body.numel())
            sent = _write(route.socket, frame)
        except OSError as error:
            if route.socket is not None:
                _log.info("rank %d lost rank %d: %s", self.rank, peer, error)
                route.socket.close()
                route.socket = None
            return False
        with self._changed:
            self.traffic.record(frame.head.get("channel", frame.head["kind"]), {peer: float(sent)})
        return True

    def _pace(self, links: LinkModel, peer: int, to: socket.socket, nbytes: int) -> None:
        """Delay a message as the link would: for its bytes, one message after the other, and then for its latency; beats go on."""
        delay_s, all_s = (links.message_seconds(self.rank, peer, n) for n in (0, nbytes))
        while not self._link_is_busy.acquire(timeout=_BEAT_S):
            _write(to, self._beat())
        try:
            self._sleep_and_beat(to, all_s - delay_s)
        finally:
            self._link_is_busy.release()
        self._sleep_and_beat(to, delay_s)

    def _sleep_and_beat(self, to: socket.socket, seconds: float) -> None:
        end_s = self.seconds + seconds
        while (left_s := end_s - self.seconds) > _BEAT_S:
            time.sleep(_BEAT_S)
            _write(to, self._beat())
        time.sleep(max(0.0, left_s))

    def _dial(self, route: _Route) -> None:
        route.socket = dialled = socket.create_connection(route.address, timeout=_DIAL_S)
        dialled.settimeout(None)
        dialled.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # a connection breaks after this long without an acknowledgement, not after a minute of the kernel's retries
        dialled.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self.silence_s * 1000))
        hello = {"kind": "hello", "job": self._job, "rank": self.rank, "incarnation": self._incarnation}
        _write(dialled, _Frame(hello))
        _write(dialled, self._beat())

    # -- receiving: one thread for each connection that was accepted

    def _accept(self) -> None:
        while not self._is_closed:
            accepted = None
            try:
                accepted, _ = self._listener.accept()
                reader = threading.Thread(target=self._read, args=(accepted,), name="commopt reader", daemon=True)
                # `close` reads the readers under this lock, and can only join threads that have started
                with self._changed:
                    if self._is_closed:
                        raise ConnectionAbortedError
                    reader.start()
                    self._readers[reader] = accepted
            except (OSError, RuntimeError) as error:  # one broke, or too many are open; the listener still works
                if accepted is not None:
                    accepted.close()
                if not self._is_closed:
                    _log.warning("rank %d could not accept a connection: %s", self.rank, error)
                    time.sleep(0.2)

    def _read(self, accepted: socket.socket) -> None:
        peer: int | None = None
        try:
            hello, _ = _read_frame(accepted, deadline_s=self.seconds + self.silence_s)
            peer = self._greet(hello)
            accepted.settimeout(max(30.0, 4 * self.silence_s))  # peers beat every second: a silent one is gone
            while True:
                self._take(peer, hello["incarnation"], *_read_frame(accepted, self._routes[peer]))
        except PermissionError as error:
            _log.warning("rank %d turned away %s", self.rank, error)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            if not self._is_closed and peer is not None:
                _log.info("rank %d no longer hears rank %d: %s", self.rank, peer, error)
        finally:
            accepted.close()
            with self._changed:
                self._readers.pop(threading.current_thread(), None)
                if peer is not None:
                    self._routes[peer].readers -= 1
                self._changed.notify_all()

    def _greet(self, hello: dict[str, Any]) -> int:
        """The rank at the other end of a new connection. Raises PermissionError if it is not to be heard."""
        peer = hello.get("rank")
        if hello.get("kind") != "hello" or hello.get("job") != self._job or peer not in self._routes:
            raise PermissionError("a connection that is not of this job")
        route = self._routes[peer]
        with self._changed:
            if hello["incarnation"] < route.incarnation and self.is_up(peer):  # late, of a process since replaced
                raise PermissionError(f"an older start of rank {peer} than the one that is up")
            if hello["incarnation"] != route.incarnation:  # lower if the machine's clock was set back
                self._mailbox.forget(peer)
            route.incarnation = hello["incarnation"]
            route.readers += 1
            route.heard_s = self.seconds
            self._changed.notify_all()
        return int(peer)

    def _take(self, peer: int, incarnation: Any, head: dict[str, Any], body: torch.Tensor) -> None:
        route = self._routes[peer]
        with self._changed:
            if incarnation != route.incarnation:
                raise OSError("it has been started again since")
            route.heard_s = self.seconds
            if head["kind"] == "bye":
                raise OSError("it has left")
            route.progress = Progress(int(head["step"]), bool(head["is_training"]))
            if head["kind"] == "letter":
                layout = tuple((getattr(torch, name), int(n)) for name, n in head["layout"])
                if layout_bytes(layout) != body.numel():
                    raise ValueError("the layout does not fit the message")
                self._mailbox.put(peer, head["channel"], Letter(int(head["sequence"]), Payload(body, layout)))
            self._changed.notify_all()


def _listen(address: tuple[str, int]) -> socket.socket:
    try:
        try:
            return socket.create_server(address, backlog=128)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, socket.EAI_NONAME):
                raise
            return socket.create_server(("", address[1]), backlog=128)  # behind NAT the others know another address
    except OSError as error:
        raise GroupError(f"{address[0]}:{address[1]} cannot be listened on: {error.strerror or error}") from None


def listen_anywhere() -> tuple[socket.socket, tuple[str, int]]:
    """A listening socket on a free port, and its address for other ranks: that of GLOO_SOCKET_IFNAME, or of the host's name."""
    host = _own_address()
    listener = _listen((host, 0))
    return listener, (host, int(listener.getsockname()[1]))


def _own_address() -> str:
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0].encode()
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface[:15]))
        return socket.inet_ntoa(found[20:24])
    with contextlib.suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return "127.0.0.1"


def _write(to: socket.socket, frame: _Frame) -> int:
    """Send one frame; returns its bytes."""
    head = json.dumps(frame.head).encode()
    body = memoryview(b"") if frame.body is None else memoryview(cast(Any, frame.body.numpy()))
    to.sendall(_FRAME.pack(_MAGIC, len(head), len(body)) + head)
    if len(body):
        to.sendall(body)
    return _FRAME.size + len(head) + len(body)


def _read_frame(
    source: socket.socket, route: _Route | None = None, deadline_s: float | None = None
) -> tuple[dict[str, Any], torch.Tensor]:
    """Read one frame; its peer counts as heard while a long body comes in. Without `route` (an unknown peer) it must have no body."""
    magic, head_bytes, body_bytes = _FRAME.unpack(_filled(source, bytearray(_FRAME.size), deadline_s=deadline_s))
    if magic != _MAGIC or head_bytes > _HEAD_LIMIT or (route is None and body_bytes):
        raise ValueError("this is not a frame")
    head = json.loads(_filled(source, bytearray(head_bytes), deadline_s=deadline_s))
    body = torch.empty(body_bytes, dtype=torch.uint8)
    _filled(source, body.numpy(), route)
    return head, body


def _filled(source: socket.socket, buffer: Any, route: _Route | None = None, deadline_s: float | None = None) -> Any:
    view = memoryview(buffer)
    while len(view):
        if deadline_s is not None:  # for all of it, so that a slow trickle does not keep the connection
            source.settimeout(max(0.01, deadline_s - time.monotonic()))
        n = source.recv_into(view)
        if n == 0:
            raise OSError("closed by the peer")
        if route is not None:
            route.heard_s = time.monotonic()
        view = view[n:]
    return buffer


def _unacknowledged(connection: socket.socket) -> int:
    """Bytes that the other end has not acknowledged yet."""
    try:
        return int(struct.unpack("i", fcntl.ioctl(connection.fileno(), _SIOCOUTQ, b"\0" * 4))[0])
    except (OSError, ValueError):
        return 0
