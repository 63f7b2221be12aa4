"""Members over TCP in this process, and what strangers can write to them."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from commopt.groups.membership import Membership
from commopt.groups.tcp import TcpPeers
from commopt.wire.payload import Payload

T = TypeVar("T")
PLENTY_S = 20.0
HELLO = {"kind": "hello", "job": "local", "rank": 1, "incarnation": 2**61, "members": []}
LETTER = {"kind": "letter", "channel": "c", "sequence": 0, "step": 0, "is_training": True, "sizes": []}


class Members:
    """Members in this process, each of which may be closed and started again at its old address; closed at the end."""

    def __init__(self) -> None:
        self.all: list[TcpPeers] = []

    def start(self, ranks: int, **options: Any) -> list[TcpPeers]:
        """Start all members of a job, and wait until they have found each other."""
        started = [self.add(place, listener=listener, **options) for place, listener in local_memberships(ranks)]
        until_up(*started)
        return started

    def alone(self, **options: Any) -> TcpPeers:
        """Start the first of two members, of which the other never comes."""
        (place, listener), (_, unused) = local_memberships(2)
        unused.close()
        return self.add(place, listener=listener, **options)

    def add(self, membership: Membership, **options: Any) -> TcpPeers:
        self.all.append(TcpPeers(membership, **options))
        return self.all[-1]

    def close(self) -> None:
        for one in self.all:
            one.close(0.0)


def local_memberships(ranks: int) -> Sequence[tuple[Membership, socket.socket]]:
    """Members on the loopback interface, each with a socket that listens already."""
    listeners = [socket.create_server(("127.0.0.1", 0), backlog=128) for _ in range(ranks)]
    addresses = tuple(("127.0.0.1", int(one.getsockname()[1])) for one in listeners)
    return [(Membership(rank, addresses, "local"), listener) for rank, listener in enumerate(listeners)]


def over_tcp(ranks: int, work: Callable[[TcpPeers], T]) -> list[T]:
    """What `work` returns on each rank; ranks are threads with real sockets on this machine, which have found each other."""
    with contextlib.closing(Members()) as members, ThreadPoolExecutor(ranks) as lanes:
        results = list(lanes.map(work, members.start(ranks)))
        until(lambda: all(one.is_quiet() for one in members.all))  # the last messages are counted when they have left
        return results


def until(is_so: Callable[[], bool]) -> None:
    end_s = time.monotonic() + PLENTY_S
    while not is_so():
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.01)


def until_up(*members: TcpPeers) -> None:
    """Wait until these see each other as up."""
    until(lambda: all(one.is_up(other.rank) for one in members for other in members))


def number(k: float) -> Payload:
    return Payload.of(torch.tensor([float(k)]))


def got(peers: TcpPeers, peer: int, sequence: int, timeout_s: float = PLENTY_S, channel: str = "c") -> float | None:
    letter = peers.receive(peer, channel, sequence, timeout_s)
    return None if letter is None else float(letter.payload.tensors[0][0])


def lose(a: TcpPeers, b: TcpPeers) -> Membership:
    """Let b vanish, wait until a knows it, and return b's place."""
    place = Membership(1, (b._routes[0].address, a._routes[1].address), "local")
    vanish(b)
    until(lambda: not a.is_up(1))
    return place


def vanish(peers: TcpPeers) -> None:
    """End like a killed process: its sockets close without a word to anybody."""
    peers._is_closed = peers._listener.is_closed = True
    dialled = [route.connection.socket for route in peers._routes.values() if route.connection]
    for one in (peers._listener.socket, *peers._listener._readers.values(), *dialled):
        one.shutdown(socket.SHUT_RDWR)
    peers._listener.socket.close()


def connect(to: TcpPeers, *begin: bytes) -> socket.socket:
    """A connection to a member, over which these bytes were sent."""
    connection = socket.create_connection(to._listener.socket.getsockname()[:2], timeout=PLENTY_S)
    connection.sendall(b"".join(begin))
    return connection


def frame(head: Any, body_bytes: int = 0) -> bytes:
    """The begin of a frame, without its body."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("!4sIQ", b"cmo2", len(text), body_bytes) + text


def ends(connection: socket.socket) -> bool:
    """Whether the other side hangs up, whatever it says before."""
    with connection:
        try:
            while connection.recv(1000):
                connection.shutdown(socket.SHUT_WR)
        except ConnectionResetError:
            pass
        return True
