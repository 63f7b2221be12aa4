"""Peers over plain TCP: no store, no leader, no process group; any member may die, and be started again alone.

Every member listens on its own address and dials every other one, so that there are two connections for each pair, each used one way.
A thread for each peer sends what is queued for it, or once a second how far this member is; a broken connection is dialled again.

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
from dataclasses import dataclass, field
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
    """The members of a job as the launcher names them: [address, port] of every rank, and a word that only this job's members know."""

    rank: int
    addresses: tuple[tuple[str, int], ...]
    job: str
    returns: bool = False

    @classmethod
    def from_environment(cls) -> Membership | None:
        """Read COMMOPT_PEERS, and this rank's place from COMMOPT_NODE_RANK, LOCAL_WORLD_SIZE and LOCAL_RANK; None without COMMOPT_PEERS.

        COMMOPT_RETURNS=1 says that this rank was started again in a job that goes on.

        Raises ConfigError for a value that the launcher did not write.
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


@dataclass
class _Frame:
    head: dict[str, Any]
    body: torch.Tensor | None = None
    expires_s: float = float("inf")


@dataclass
class _Route:
    """What this member knows of one peer, and what waits to be sent to it."""

    address: tuple[str, int]
    waiting: queue.SimpleQueue[_Frame | None] = field(default_factory=queue.SimpleQueue)
    socket: socket.socket | None = None
    unsent: int = 0
    heard_s: float = float("-inf")
    readers: int = 0
    incarnation: int = -1
    progress: Progress = field(default_factory=lambda: Progress(0, False))


class TcpPeers(Peers):
    """The members of a job over TCP.

    silence_s: a peer that has not been heard of for so long is taken to be down until it is heard again; all say something every second.
    listener: a socket that listens already, where the port had to be known before; else one is bound to this member's address.
    links: what is sent is slowed down to this model, where the kernel does not do it.
    Raises GroupError where that address cannot be had.
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
        self._incoming: set[socket.socket] = set()
        self._readers: set[threading.Thread] = set()
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
        # more than the peer would keep when it comes is not queued: of what one sends to the dead, memory must not fill up
        most = 4 * KEPT if self.is_up(peer) else KEPT
        if not channel.startswith(GROUP) and self._routes[peer].unsent >= most:
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
                self._changed.wait(min(left_s, 0.5))  # silence is not an event that would wake it

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
        with self._changed:
            routes = self._routes.values()
            return not any(r.unsent or (r.socket and _unacknowledged(r.socket)) for r in routes)

    def close(self, linger_s: float = 5.0) -> None:
        if self._is_closed:
            return
        atexit.unregister(self.close)
        end_s = self.seconds + linger_s
        while self.seconds < end_s and any(r.unsent for peer, r in self._routes.items() if self.is_up(peer)):
            time.sleep(0.01)
        self._is_closed = True
        self._background.shutdown(wait=False, cancel_futures=True)
        for route in self._routes.values():
            route.waiting.put(None)
        for thread in self._threads[1:]:
            thread.join(max(0.1, min(1.0, end_s - self.seconds)))
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._changed:
            sockets = [*self._incoming, *(route.socket for route in self._routes.values() if route.socket)]
            readers = [*self._readers]
            self._changed.notify_all()
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in (*readers, *self._threads):  # one that is in torch's code when the interpreter ends, aborts it
            if thread is not threading.current_thread():
                thread.join(2.0)

    def _beat(self) -> _Frame:
        return _Frame({"kind": "beat", "step": self._own.step, "is_training": self._own.is_training})

    def _queue(self, peer: int, frame: _Frame) -> None:
        if self._is_closed:
            raise GroupError("these peers have been closed")
        route = self._routes[peer]
        with self._changed:
            route.unsent += 1
        route.waiting.put(frame)

    # -- sending: one thread for each peer

    def _serve(self, peer: int) -> None:
        route = self._routes[peer]
        pause_s = 0.02  # short at first: ranks that start together find each other as soon as they are there
        while not self._is_closed:
            try:
                frame = route.waiting.get(timeout=pause_s)
            except queue.Empty:
                is_told = self._transmit(peer, route, self._beat())
                pause_s = _BEAT_S if is_told else min(2 * pause_s, _BEAT_S)
                continue
            if frame is None:
                break
            while self.seconds < frame.expires_s and not self._is_closed and not self._transmit(peer, route, frame):
                if frame.body is None:
                    break  # the next beat says it as well
                time.sleep(0.2)
            with self._changed:
                route.unsent -= 1
        with contextlib.suppress(OSError):
            if route.socket is not None:
                route.socket.settimeout(0.5)
                _write(route.socket, _Frame({"kind": "bye"}))

    def _transmit(self, peer: int, route: _Route, frame: _Frame) -> bool:
        """Send one frame, dialling first where there is no connection; whether it was handed to the kernel as a whole."""
        try:
            if route.socket is None:
                route.socket = self._dial(route.address)
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
        """Hold a message back for as long as the link would take: one after the other, and then its delay; beats go on."""
        sent: list[dict[int, float]] = [{} for _ in range(self.size)]
        sent[self.rank] = {peer: 0.0}
        delay_s = links.seconds(sent)
        sent[self.rank] = {peer: float(nbytes)}
        while not self._link_is_busy.acquire(timeout=_BEAT_S):
            _write(to, self._beat())
        try:
            self._sleep_and_beat(to, links.seconds(sent) - delay_s)
        finally:
            self._link_is_busy.release()
        self._sleep_and_beat(to, delay_s)

    def _sleep_and_beat(self, to: socket.socket, seconds: float) -> None:
        end_s = self.seconds + seconds
        while (left_s := end_s - self.seconds) > _BEAT_S:
            time.sleep(_BEAT_S)
            _write(to, self._beat())
        time.sleep(max(0.0, left_s))

    def _dial(self, address: tuple[str, int]) -> socket.socket:
        dialled = socket.create_connection(address, timeout=_DIAL_S)
        dialled.settimeout(None)
        dialled.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # what nobody acknowledges for so long breaks the connection, instead of a minute of the kernel's retries
        dialled.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self.silence_s * 1000))
        hello = {"kind": "hello", "job": self._job, "rank": self.rank, "incarnation": self._incarnation}
        try:
            _write(dialled, _Frame(hello))
            _write(dialled, self._beat())
        except OSError:
            dialled.close()
            raise
        return dialled

    # -- receiving: one thread for each connection that was accepted

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                accepted, _ = self._listener.accept()
            except OSError as error:  # of one connection that broke, or of too many: not the listener's end
                self._note_refusal(error)
                continue
            reader = threading.Thread(target=self._read, args=(accepted,), name="commopt reader", daemon=True)
            try:
                # `close` takes sockets and threads under this lock: it must not find a thread that has not started
                with self._changed:
                    if self._is_closed:
                        accepted.close()
                        return
                    reader.start()
                    self._incoming.add(accepted)
                    self._readers.add(reader)
            except RuntimeError as error:
                accepted.close()
                self._note_refusal(error)

    def _note_refusal(self, error: Exception) -> None:
        if not self._is_closed:
            _log.warning("rank %d could not accept a connection: %s", self.rank, error)
            time.sleep(0.2)

    def _read(self, accepted: socket.socket) -> None:
        peer: int | None = None
        try:
            hello, _ = _read_frame(accepted, deadline_s=self.seconds + self.silence_s)
            peer = self._checked_hello(hello)
            incarnation = hello.get("incarnation")
            if peer is None:
                return
            accepted.settimeout(max(30.0, 4 * self.silence_s))  # all beat every second: this one is gone without a word
            while True:
                self._take(peer, incarnation, *_read_frame(accepted, self._routes[peer]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            if not self._is_closed and peer is not None:
                _log.info("rank %d no longer hears rank %d: %s", self.rank, peer, error)
        finally:
            accepted.close()
            with self._changed:
                self._incoming.discard(accepted)
                self._readers.discard(threading.current_thread())
                if peer is not None:
                    self._routes[peer].readers -= 1
                self._changed.notify_all()

    def _checked_hello(self, head: dict[str, Any]) -> int | None:
        peer = head.get("rank")
        if head.get("kind") != "hello" or head.get("job") != self._job or peer not in self._routes:
            _log.warning("rank %d turned away a connection that is not of this job", self.rank)
            return None
        route = self._routes[peer]
        with self._changed:
            if head["incarnation"] < route.incarnation and self.is_up(peer):  # late, of a process that was replaced
                _log.warning("rank %d turned away an older start of rank %d than the one that is up", self.rank, peer)
                return None
            if head["incarnation"] != route.incarnation:  # lower where the machine's clock went back meanwhile
                self._mailbox.forget(peer)
            route.incarnation = head["incarnation"]
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
    """A listening socket on a free port, and the address that other ranks reach it by: of GLOO_SOCKET_IFNAME, or of this host's name."""
    host = _address_of(os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0])
    if host is None:
        try:
            host = socket.gethostbyname(socket.gethostname())
        except OSError:
            host = "127.0.0.1"
    listener = _listen((host, 0))
    return listener, (host, int(listener.getsockname()[1]))


def _address_of(interface: str) -> str | None:
    """The IPv4 address of an interface, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(found[20:24])


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
    """One frame; a long body counts as being heard of while it comes in. Without `route`, of a peer still unknown: no body."""
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
        if deadline_s is not None:  # for all of it: one byte now and then keeps nobody's place
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
