"""Peers over plain TCP: no store, no leader, no process group; any member may die, and be restarted alone.

Every member listens on its own address and dials every other one, so each pair has two connections, each used in one direction.
A hello has the list of members. If it goes on where this member's own ends, those added are members from then on, too.
A thread per peer sends its queued messages, or once a second this member's progress; it dials again when a connection breaks.
What comes in is checked before it is used (`frames`), and what is kept of it and the connections that are open are bounded.
"""

import atexit
import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from commopt.errors import GroupError
from commopt.groups.base import Traffic
from commopt.groups.frames import Connection, Frame
from commopt.groups.listening import enter, hang_up
from commopt.groups.membership import Membership
from commopt.groups.peers import GROUP, KEPT, Letter, Mailbox, Peers, Progress
from commopt.plan.links import LinkModel
from commopt.wire.payload import Payload

_log = logging.getLogger(__name__)
_BEAT_S = 1.0
_DIAL_S = 2.0
_MOST = 1 << 10  # members
_READERS = 4  # connections from one peer; one more takes the place of the oldest, which may be of its last start
T = TypeVar("T")


@dataclass
class _Route:
    """What this member knows of one peer, and the frames to be sent to it."""

    address: tuple[str, int]
    unsent: queue.Queue[Frame | None] = field(default_factory=queue.Queue)
    connection: Connection | None = None
    readers: list[Connection] = field(default_factory=list)
    incarnation: int = -1
    progress: Progress = field(default_factory=Progress)


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
        self.silence_s, self.returns, self._secret = silence_s, membership.returns, membership.secret
        self.sizes, self._addresses, self._refusals = ((0, self.size),), membership.addresses, dict[int, str]()
        self._incarnation = time.time_ns()
        self._mailbox, self._changed = Mailbox(), threading.Condition()
        self._routes = {r: _Route(address) for r, address in enumerate(membership.addresses) if r != self.rank}
        self._own = Progress(sizes=self.sizes)
        self._is_closed = False
        self._background = ThreadPoolExecutor(1, thread_name_prefix="commopt lane")
        self._links, self._link_free_s = links, 0.0  # when the last message has left it
        self._listener, self._job = enter(membership, self._hear, silence_s, listener)
        self._threads: list[threading.Thread] = []
        with self._changed:
            self._start_sending([*self._routes])
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
        self._queue(peer, Frame(head, payload.buffer.detach().cpu(), self.seconds + expires_s))

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
        oldest_s = self.seconds - self.silence_s
        return peer == self.rank or any(one.heard_s > oldest_s for one in [*self._routes[peer].readers])

    def last_progress(self, peer: int) -> Progress:
        return self._own if peer == self.rank else self._routes[peer].progress

    @property
    def known(self) -> int:
        return len(self._addresses)

    @property
    def refusals(self) -> Mapping[int, str]:
        return {**self._refusals}

    @property
    def unheard(self) -> list[int]:
        return [peer for peer, route in self._routes.items() if route.connection is not None and not self.is_up(peer)]

    def name_of(self, peer: int) -> str:
        return f"rank {peer} ({self._addresses[peer][0]})"

    def announce(self, step: int, *, is_training: bool = True) -> None:
        was, self._own = self._own, Progress(step, is_training, self.sizes)
        if was.is_training != is_training:
            for peer in self._routes:
                self._queue(peer, self._beat())

    def is_quiet(self) -> bool:
        routes = self._routes.values()
        is_sent = not any(route.unsent.unfinished_tasks for route in routes)
        return is_sent and not any(one and one.unacknowledged() for one in [route.connection for route in routes])

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
        for thread in self._threads:
            thread.join(max(0.1, min(1.0, end_s - self.seconds)))
        with self._changed:
            for route in self._routes.values():
                for one in (*route.readers, route.connection):
                    if one is not None:
                        hang_up(one.socket)
            self._changed.notify_all()
            self._changed.wait_for(lambda: not any(route.readers for route in self._routes.values()), 2.0)
        self._listener.leave(self._job)
        for thread in self._threads:  # a thread in torch's code aborts an interpreter that ends
            thread.join(2.0)

    def _beat(self) -> Frame:
        own = self._own
        return Frame({"kind": "beat", "step": own.step, "is_training": own.is_training, "sizes": own.sizes})

    def _queue(self, peer: int, frame: Frame) -> None:
        if self._is_closed:
            raise GroupError("these peers have been closed")
        self._routes[peer].unsent.put(frame)

    # -- sending: one thread for each peer

    def _start_sending(self, peers: Sequence[int]) -> None:
        started = [
            threading.Thread(target=self._serve, args=(peer,), name=f"commopt to rank {peer}", daemon=True)
            for peer in peers
        ]
        self._threads += started
        for thread in started:
            thread.start()

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
            frame = None  # it may be as large as the model, and the next one may be long in coming
        if route.connection is not None:
            with contextlib.suppress(OSError), route.connection.socket as dialled:
                dialled.settimeout(0.5)
                route.connection.write(Frame({"kind": "bye"}))

    def _transmit(self, peer: int, route: _Route, frame: Frame) -> bool:
        """Send one frame, dialling first if there is no connection; whether the kernel took all of it."""
        try:
            connection = route.connection or self._dial(peer, route)
            connection.check_open()
            if self._links is not None and frame.body is not None and max(self.rank, peer) < self._links.ranks:
                self._pace(self._links, peer, connection, frame.body.numel())
            sent = connection.write(frame)
        except OSError as error:
            if isinstance(error, PermissionError):
                self._refusals[peer] = str(error)
                self._listener.warn(f"was turned away by {self.name_of(peer)}: {error}")
            if route.connection is not None:
                _log.info("rank %d lost rank %d: %s", self.rank, peer, error)
                route.connection.socket.close()
                route.connection = None
            return False
        with self._changed:
            self.traffic.record(frame.head.get("channel", frame.head["kind"]), {peer: float(sent)})
        return True

    def _pace(self, links: LinkModel, peer: int, to: Connection, nbytes: int) -> None:
        """Delay a message as the link would: for its bytes, one message after the other, and then for its latency; beats go on."""
        delay_s, all_s = (links.message_seconds(self.rank, peer, n) for n in (0, nbytes))
        with self._changed:
            self._link_free_s = max(self.seconds, self._link_free_s) + all_s - delay_s
            end_s = self._link_free_s + delay_s
        while (left_s := end_s - self.seconds) > _BEAT_S:
            time.sleep(_BEAT_S)
            to.write(self._beat())
        time.sleep(max(0.0, left_s))

    def _dial(self, peer: int, route: _Route) -> Connection:
        dialled = socket.create_connection(route.address, timeout=_DIAL_S)
        route.connection = connection = Connection(dialled)
        if self._secret is not None:
            connection.agree(self._secret, peer, has_dialled=True, deadline_s=self.seconds + _DIAL_S)
        dialled.settimeout(None)
        dialled.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # a connection breaks after this long without an acknowledgement, not after a minute of the kernel's retries
        dialled.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self.silence_s * 1000))
        hello = {"job": self._job, "rank": self.rank, "incarnation": self._incarnation, "members": self._addresses}
        connection.write(Frame({"kind": "hello", **hello}))
        connection.write(self._beat())
        return connection

    # -- receiving: a thread of the listener for each connection that was accepted

    def _hear(self, hello: dict[str, Any], connection: Connection) -> None:
        """Take in what comes over a connection until it ends. Raises PermissionError if it is not to be heard."""
        peer = self._greet(hello, connection)
        try:
            connection.socket.settimeout(max(30.0, 4 * self.silence_s))  # peers beat every second: a silent one is gone
            while True:
                self._take(peer, hello["incarnation"], *connection.read(self.room_bytes))
        except PermissionError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            if not self._is_closed:
                _log.info("rank %d no longer hears rank %d: %s", self.rank, peer, error)
        finally:
            with self._changed:
                self._routes[peer].readers.remove(connection)
                self._changed.notify_all()

    def _greet(self, hello: dict[str, Any], accepted: Connection) -> int:
        """The rank at the other end of a new connection. Raises PermissionError if it is not to be heard."""
        peer: int = hello["rank"]
        self._extend(hello["members"])
        if peer not in self._routes:
            raise PermissionError(f"rank {peer}, which is this one's own, or not in its list of members")
        route = self._routes[peer]
        with self._changed:
            if self._is_closed:
                raise OSError("these peers have been closed")
            if hello["incarnation"] < route.incarnation and self.is_up(peer):  # late, of a process since replaced
                raise PermissionError(f"an older start of rank {peer} than the one that is up; end that one first")
            if hello["incarnation"] != route.incarnation:  # lower if the machine's clock was set back
                self._mailbox.forget(peer)
            route.incarnation = hello["incarnation"]
            self._refusals.pop(peer, None)
            route.readers.append(accepted)
            for oldest in route.readers[:-_READERS]:
                hang_up(oldest.socket)
            self._changed.notify_all()
        return peer

    def _extend(self, listed: Any) -> None:
        """Take in the members that a longer list adds. Raises PermissionError if it contradicts this one's, or may not be longer."""
        given = tuple((str(host), int(port)) for host, port in listed)
        with self._changed:
            own = self._addresses
            for k, (here, there) in enumerate(zip(own, given, strict=False)):
                if here != there:
                    told = f"member {k} is {there[0]}:{there[1]} in one list and {here[0]}:{here[1]} in the other"
                    raise PermissionError(
                        f"a list of members that contradicts: {told}; only append to the list of a running job"
                    )
            if len(given) <= len(own) or self._is_closed:
                return
            if self._secret is None:
                raise PermissionError(
                    "a longer list of members in a job without a secret; give every rank the same COMMOPT_SECRET"
                )
            if self.fixed_because == "":
                raise OSError("it is not known yet whether there can be more members")
            if self.fixed_because is not None or len(given) > _MOST:
                because = self.fixed_because or f"a job has {_MOST} members at most"
                raise PermissionError(f"a longer list of members than this job began with: {because}")
            added = range(len(own), len(given))
            self._routes = {**self._routes, **{peer: _Route(given[peer]) for peer in added}}
            self._addresses = given
            for peer in self._routes:  # those that the new ones cannot reach hear of them, too
                self._queue(peer, Frame({"kind": "members", "members": given}))
            self._start_sending(added)

    def _take(self, peer: int, incarnation: int, head: dict[str, Any], payload: Payload | None) -> None:
        route = self._routes[peer]
        with self._changed:
            if incarnation != route.incarnation:
                raise OSError("it has been started again since")
            if head["kind"] == "bye":
                raise OSError("it has left")
            if head["kind"] == "members":
                self._extend(head["members"])
                return
            sizes = tuple((first, members) for first, members in head["sizes"])
            route.progress = Progress(head["step"], head["is_training"], sizes)
            if payload is not None:
                self._mailbox.put(peer, head["channel"], Letter(head["sequence"], payload), self.room_bytes)
            self._changed.notify_all()
