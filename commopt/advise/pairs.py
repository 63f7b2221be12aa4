"""Latency and rate between machines over plain TCP, without anything that is built on it."""

import json
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from commopt.errors import GroupError
from commopt.groups.listening import listen_anywhere
from commopt.plan.links import LinkModel

_PINGS, _FEWEST_PINGS, _PINGS_S = 9, 3, 0.25
_FIRST_BYTES, _MOST_BYTES = 1 << 14, 1 << 26
_SHORTEST_S, _WANTED_S, _RING_S = 0.06, 0.12, 0.4  # of what a rate is measured over
_PATIENCE_S = 30.0
_BLOCK = bytes(1 << 16)
_NUMBERS = struct.Struct("!d")
Tell = Callable[[str], list[str]]


class Machines:
    """One machine of several that measure the links between them; every rank takes part in `tell`, one of each machine measures.

    names: of all machines. number: this one's. measures: whether this rank measures. tell: every rank's text, machine after machine.
    links: what pacing imposes on exchanges, but not on these sockets.
    """

    def __init__(
        self, names: Sequence[str], number: int, measures: bool, tell: Tell, links: LinkModel | None = None
    ) -> None:
        self.names, self.number, self.measures, self.links = names, number, measures, links
        self.count, self._tell = len(names), tell
        self._listener, address = listen_anywhere()
        self._listener.settimeout(_PATIENCE_S)
        told = [json.loads(text) for text in tell(json.dumps([measures, *address]))]
        self._addresses = [(host, port) for is_one, host, port in told if is_one]

    def pairs(self, budget_s: float, say: Callable[[str], object]) -> dict[tuple[int, int], tuple[float, float]]:
        """Latency (half a round trip) and bytes/s by direction, neighbours first, until the time is over.

        One pair at a time if there is time for all, else pairs without a machine in common at the same time.
        """
        found: dict[tuple[int, int], tuple[float, float]] = {}
        began_s, elapsed_s, took_s = time.monotonic(), 0.0, 0.0
        left, is_alone = list(_near_first(self.count)), True
        while left and (not found or elapsed_s + took_s <= budget_s):
            now = left[:1] if is_alone else _apart(left)
            more = f" and {len(now) - 1} more pairs" if len(now) > 1 else ""
            say(f"latency and rate: {self.names[now[0][0]]} - {self.names[now[0][1]]}{more}")
            own: list[float] = []
            for one, other in now if self.measures else ():
                if self.number in (one, other):
                    with self._connected(other if self.number == one else one, dials=self.number == one) as link:
                        measured = _measured(link, self.number == one)
                    own = [one, other, *measured] if self.number == one else []
            told = [json.loads(text) for text in self._tell(json.dumps([time.monotonic() - began_s, own]))]
            for one, other, latency_s, there, back in (row for _, row in told if row):
                for a, b, rate in ((one, other, there), (other, one, back)):
                    found[a, b] = self._paced(latency_s, rate, a, b)
            took_s, elapsed_s = told[0][0] - elapsed_s, told[0][0]
            left = [pair for pair in left if pair not in now]
            is_alone = is_alone and elapsed_s + len(left) * took_s <= budget_s
        if left:
            say(f"the time is over: {len(left)} of {len(left) + len(found) // 2} pairs were left out")
        return found

    def together(self, found: dict[tuple[int, int], tuple[float, float]]) -> list[float]:
        """Bytes/s that each machine sends to the next one while all do; found: by `pairs`."""
        slowest, rate = min(found.values(), key=lambda pair: pair[1]), 0.0
        rates = {
            (k, after): found.get((k, after), slowest) for k in range(self.count) for after in [(k + 1) % self.count]
        }
        if self.measures:
            after, before = (self.number + 1) % self.count, (self.number - 1) % self.count
            sizes = [_clamped(_RING_S * rates[k, (k + 1) % self.count][1]) for k in range(self.count)]
            with self._connected(after, dials=True) as out, self._accepted() as link:
                self._tell("ready")
                sending = threading.Thread(target=_send, args=(out, sizes[self.number]), daemon=True)
                sending.start()
                received, seconds = _receive(link, sizes[before])
                sending.join(_PATIENCE_S)
                rate = received / seconds if seconds > 0 else 0.0
                told = self._tell(json.dumps([self.number, rate]))  # before anybody hangs up
        else:
            self._tell("ready")
            told = self._tell(json.dumps([self.number, 0.0]))
        received_by = {number: rate for number, rate in map(json.loads, told) if rate}
        every = [received_by.get((k + 1) % self.count, rates[k, (k + 1) % self.count][1]) for k in range(self.count)]
        return [self._paced(0.0, rate, k, (k + 1) % self.count)[1] for k, rate in enumerate(every)]

    def close(self) -> None:
        self._listener.close()

    def _paced(self, latency_s: float, rate: float, sender: int, receiver: int) -> tuple[float, float]:
        """What a link would do that pacing imposes on exchanges."""
        if self.links is None:
            return latency_s, rate
        slots = self.links.ranks // self.count
        ends = (sender * slots, receiver * slots)
        empty_s, full_s = (self.links.message_seconds(*ends, nbytes) for nbytes in (0, 1e9))
        return max(latency_s, empty_s), min(rate, 1e9 / (full_s - empty_s)) if full_s > empty_s else rate

    @contextmanager
    def _connected(self, peer: int, *, dials: bool) -> Iterator[socket.socket]:
        if not dials:
            with self._accepted() as link:
                yield link
            return
        host, port = self._addresses[peer]
        try:
            link = socket.create_connection((host, port), timeout=_PATIENCE_S)
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise GroupError(
                f"{self.names[self.number]} cannot reach {self.names[peer]} at {host}:{port}: {why}"
            ) from None
        with link:
            yield _prepared(link)

    @contextmanager
    def _accepted(self) -> Iterator[socket.socket]:
        try:
            link, _ = self._listener.accept()
        except OSError:
            raise GroupError(
                f"{self.names[self.number]} has waited {_PATIENCE_S:g} s for another machine to connect"
            ) from None
        with link:
            yield _prepared(link)


def _near_first(count: int) -> Iterator[tuple[int, int]]:
    """Every pair once: neighbours on a ring first, then those two apart, and so on."""
    seen = set()
    for apart in range(1, count // 2 + 1):
        for one in range(count):
            pair = (one, (one + apart) % count)
            if frozenset(pair) not in seen:
                seen.add(frozenset(pair))
                yield pair


def _apart(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """As many of the first pairs as have no machine in common."""
    found, busy = [], set[int]()
    for pair in pairs:
        if busy.isdisjoint(pair):
            found.append(pair)
            busy.update(pair)
    return found


def _prepared(link: socket.socket) -> socket.socket:
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.settimeout(_PATIENCE_S)
    return link


def _measured(link: socket.socket, is_first: bool) -> tuple[float, float, float]:
    """Latency, bytes/s from the first to the other end, and back; both ends call it."""
    trips, is_last = list[float](), False
    while not is_last:
        if is_first:
            is_last = len(trips) + 1 == _PINGS or (len(trips) + 1 >= _FEWEST_PINGS and sum(trips) > _PINGS_S)
            began_s = time.perf_counter()
            link.sendall(bytes([is_last]) * 8)
            _read(link, 8)
            trips.append(time.perf_counter() - began_s)
        else:
            ping = _read(link, 8)
            link.sendall(ping)
            is_last = bool(ping[0])
    there, back = (_rate(link, sends=is_first is way) for way in (True, False))
    return statistics.median(trips[1:]) / 2 if is_first else 0.0, there, back


def _rate(link: socket.socket, *, sends: bool) -> float:
    """Bytes/s one way, as the receiver sees them; sends more until it takes long enough to be measured."""
    nbytes = _FIRST_BYTES
    while True:
        if sends:
            _send(link, nbytes)
            (rate,) = _NUMBERS.unpack(_read(link, _NUMBERS.size))
        else:
            received, seconds = _receive(link, nbytes)
            is_long = seconds >= _SHORTEST_S or nbytes == _MOST_BYTES
            rate = received / max(seconds, 1e-6) * (1 if is_long else -1)  # negative: once more, with more bytes
            link.sendall(_NUMBERS.pack(rate))
        if rate > 0:
            return float(rate)
        nbytes = _clamped(max(4 * nbytes, min(64 * nbytes, -rate * _WANTED_S)))


def _clamped(nbytes: float) -> int:
    return int(min(max(nbytes, _FIRST_BYTES), _MOST_BYTES))


def _send(link: socket.socket, nbytes: int) -> None:
    for at in range(0, nbytes, len(_BLOCK)):
        link.sendall(_BLOCK[: nbytes - at])


def _read(link: socket.socket, nbytes: int) -> bytes:
    found = b""
    while len(found) < nbytes:
        found += _some(link.recv(nbytes - len(found)))
    return found


def _receive(link: socket.socket, nbytes: int) -> tuple[int, float]:
    """Bytes after the first piece, and the seconds from that piece to the last one."""
    first = left = nbytes - len(_some(link.recv(min(nbytes, 1 << 16))))
    began_s = time.perf_counter()
    while left:
        left -= len(_some(link.recv(min(left, 1 << 20))))
    return first, time.perf_counter() - began_s


def _some(data: bytes) -> bytes:
    if not data:
        raise GroupError("another machine has ended while the link to it was measured; its output says why")
    return data
