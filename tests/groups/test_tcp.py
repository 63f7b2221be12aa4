"""Members over TCP: a dead one is noticed soon, strangers and noise do no harm, and a member that returns is heard again."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from networks import needs_ipv6
from outer_rig import local_memberships

from commopt.cluster.machine import loopback_interface
from commopt.errors import ConfigError, GroupError
from commopt.groups import listening, tcp
from commopt.groups.listening import listen_anywhere
from commopt.groups.membership import Membership
from commopt.groups.peers import GROUP, KEPT
from commopt.groups.tcp import TcpPeers
from commopt.plan.links import LinkModel
from commopt.wire.payload import Payload

PLENTY_S = 20.0


class Members:
    """Members in this process, each of which may be closed and started again at its old address."""

    def __init__(self) -> None:
        self.all: list[TcpPeers] = []

    def start(self, ranks: int, **options: Any) -> list[TcpPeers]:
        started = [TcpPeers(place, listener=listener, **options) for place, listener in local_memberships(ranks)]
        self.all += started
        for one in started:
            one.announce(0)  # which is sent at once
        until(lambda: all(one.is_up(peer) for one in started for peer in one.others))
        return started

    def add(self, membership: Membership, **options: Any) -> TcpPeers:
        self.all.append(TcpPeers(membership, **options))
        self.all[-1].announce(0)
        return self.all[-1]


@pytest.fixture
def members() -> Iterator[Members]:
    made = Members()
    yield made
    for one in made.all:
        one.close(0.0)


def until(is_so: Callable[[], bool]) -> None:
    end_s = time.monotonic() + PLENTY_S
    while not is_so():
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.01)


def number(k: float) -> Payload:
    return Payload.of(torch.tensor([float(k)]))


def got(peers: TcpPeers, peer: int, sequence: int, timeout_s: float = PLENTY_S, channel: str = "c") -> float | None:
    letter = peers.receive(peer, channel, sequence, timeout_s)
    return None if letter is None else float(letter.payload.tensors[0][0])


def place_of(peers: TcpPeers) -> tuple[str, int]:
    host, port = peers._listener.socket.getsockname()[:2]
    return str(host), int(port)


def lose(a: TcpPeers, b: TcpPeers) -> Membership:
    """Let b vanish, wait until a knows it, and return b's place."""
    place = Membership(1, (place_of(a), place_of(b)), "local")
    vanish(b)
    until(lambda: not a.is_up(1))
    return place


def vanish(peers: TcpPeers) -> None:
    """End like a killed process: its sockets close without a word to anybody."""
    peers._is_closed = peers._listener.is_closed = True
    peers._listener.socket.shutdown(socket.SHUT_RDWR)
    peers._listener.socket.close()
    for one in [
        *peers._listener._readers.values(),
        *(one.connection.socket for one in peers._routes.values() if one.connection),
    ]:
        one.shutdown(socket.SHUT_RDWR)


def test_messages_arrive_by_channel_and_number_or_time_out(members: Members) -> None:
    a, b = members.start(2)
    a.send(1, "c", 2, number(2))
    a.send(1, "d", 1, number(11))
    a.send(1, "c", 3, number(3))
    assert [got(b, 0, 2), got(b, 0, 3), got(b, 0, 1, channel="d")] == [2.0, 3.0, 11.0]
    begun_s = b.seconds
    assert got(b, 0, 3, 0.3) is None
    assert b.seconds - begun_s >= 0.3
    assert b.is_up(0)


def test_a_member_that_closes_its_sockets_is_down_at_once(members: Members) -> None:
    a, b = members.start(2, silence_s=60.0)
    vanish(a)
    until(lambda: not b.is_up(0))
    assert b.progress(0) is None
    assert got(b, 0, 0, 60.0) is None  # at once: the test's own limit is less


def test_a_receive_under_way_ends_when_its_sender_goes(members: Members) -> None:
    a, b = members.start(2, silence_s=60.0)
    answers: list[float | None] = []
    waiting = threading.Thread(target=lambda: answers.append(got(b, 0, 0, 60.0)))
    waiting.start()
    a.close()
    waiting.join(PLENTY_S)
    assert answers == [None]


def connect(to: TcpPeers) -> socket.socket:
    return socket.create_connection(place_of(to), timeout=PLENTY_S)


def frame(head: Any, body_bytes: int = 0) -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("!4sIQ", b"cmo1", len(text), body_bytes) + text


def ends(connection: socket.socket) -> bool:
    """Whether the other side hangs up."""
    with connection:
        try:
            return connection.recv(1) == b""
        except ConnectionResetError:
            return True


HELLO = {"kind": "hello", "job": "local", "rank": 1, "incarnation": 2**61}
LETTER = {"kind": "letter", "channel": "c", "sequence": 0, "step": 0, "is_training": True}


def test_a_silent_member_is_down_until_it_is_heard_again(members: Members) -> None:
    (membership, listener), (_, unused) = local_memberships(2)
    with unused:
        a = members.add(membership, listener=listener, silence_s=0.4)
        with connect(a) as connection:
            connection.sendall(frame(HELLO))
            for step in range(2):
                connection.sendall(frame({"kind": "beat", "step": step, "is_training": True}))
                until(lambda: a.is_up(1))
                assert got(a, 1, 0, 60.0) is None  # when the silence shows: the test's own limit is less
                assert not a.is_up(1)
                assert a.progress(1) is None


def test_members_say_how_far_they_are(members: Members) -> None:
    a, b = members.start(2)
    a.announce(7)
    until(lambda: (p := b.progress(0)) is not None and p.is_training and p.step == 7)
    a.announce(9)
    a.send(1, "c", 0, number(0))  # a message says it too
    got(b, 0, 0)
    told = b.progress(0)
    assert told is not None
    assert told.step == 9
    a.announce(9, is_training=False)
    until(lambda: (p := b.progress(0)) is not None and not p.is_training)


@pytest.mark.parametrize(
    "noise",
    [
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        bytes(range(256)) * 8,
        frame({**HELLO, "job": "another"}),
        frame({**HELLO, "rank": 0}),
        frame({**HELLO, "rank": 7}),
        frame({"kind": "hello", "job": "local", "rank": 1}),
        frame({**LETTER, "layout": []}),
        frame(b"null", 2**63),
        frame({**HELLO, "job": "another"}, 2**40),
        struct.pack("!4sIQ", b"cmo1", 2**31, 0),
    ],
    ids=range(10),
)
def test_strangers_and_noise_are_turned_away(members: Members, noise: bytes) -> None:
    a, b = members.start(2)
    connection = connect(a)
    connection.sendall(noise)
    assert ends(connection)
    b.send(0, "c", 0, number(5))
    assert got(a, 1, 0) == 5.0
    assert a.is_up(1)


@pytest.mark.parametrize(
    "letter",
    [
        frame({**LETTER, "layout": [["float32", 1]]}),
        frame({**LETTER, "layout": [["float32", 1000]]}, 4000),
        frame(b'{"kind": "beat", "step": 1e999, "is_training": true}'),
        frame(HELLO),
    ],
    ids=["size", "room", "step", "again"],
)
def test_a_member_that_talks_nonsense_is_cut_off_and_others_are_not(members: Members, letter: bytes) -> None:
    a, _, c = members.start(3)
    a.room_bytes = 3999
    connection = connect(a)
    connection.sendall(frame(HELLO) + letter)
    assert ends(connection)
    c.send(0, "c", 0, number(5))
    assert got(a, 2, 0) == 5.0
    assert got(a, 1, 0, 0.1) is None


def test_a_member_of_another_job_is_never_heard(members: Members, caplog: pytest.LogCaptureFixture) -> None:
    places = list(local_memberships(2))
    addresses = places[0][0].addresses
    with caplog.at_level(logging.WARNING):
        a = members.add(places[0][0], listener=places[0][1])
        b = members.add(Membership(1, addresses, "another"), listener=places[1][1])
        b.send(0, "c", 0, number(1), expires_s=1.0)
        until(lambda: "turned away a connection that is not of this job" in caplog.text)
    assert got(a, 1, 0, 0.5) is None
    assert not a.is_up(1)
    assert not b.is_up(0)


@pytest.mark.parametrize("clock_ns", [None, 10], ids=["", "its clock went back while it was down"])
def test_a_member_that_returns_is_heard_again_and_what_came_before_is_gone(
    members: Members, monkeypatch: pytest.MonkeyPatch, clock_ns: int | None
) -> None:
    monkeypatch.setattr(tcp, "_BEAT_S", 0.1)
    a, b = members.start(2)
    b.send(0, "c", 3, number(1))
    until(lambda: bool(a._mailbox._letters))
    place = lose(a, b)
    assert got(a, 1, 2, 0.0) is None  # number 3 is there all the same
    if clock_ns is not None:
        monkeypatch.setattr(tcp.time, "time_ns", lambda: clock_ns)  # type: ignore[attr-defined]
    again = members.add(place)
    until(lambda: a.is_up(1) and again.is_up(0))
    assert got(a, 1, 3, 0.2) is None
    older = connect(a)
    older.sendall(frame({**HELLO, "incarnation": 9}))  # of a start before this one, which is up
    assert ends(older)
    again.send(0, "c", 3, number(2))
    assert got(a, 1, 3) == 2.0
    a.send(1, "c", 4, number(4))
    assert got(again, 0, 4) == 4.0


def test_what_an_old_connection_still_brings_after_a_return_is_dropped(members: Members) -> None:
    a, _ = members.start(2)
    old = {**LETTER, "layout": [["uint8", 1]]}
    with connect(a) as first, connect(a) as second:
        first.sendall(frame({**HELLO, "incarnation": 2**61}))
        until(lambda: a._routes[1].incarnation == 2**61)
        second.sendall(frame({**HELLO, "incarnation": 2**61 + 1}))
        until(lambda: a._routes[1].incarnation == 2**61 + 1)
        first.sendall(frame({**old, "sequence": 9}, 1) + b"x")
        second.sendall(frame({**old, "sequence": 8}, 1) + b"y")
        assert a.receive(1, "c", 8, PLENTY_S) is not None
        assert a.receive(1, "c", 9, 0.3) is None


def test_sending_to_a_dead_member_returns_at_once_and_the_message_expires(members: Members) -> None:
    a, b = members.start(2)
    place = lose(a, b)
    begun_s = time.monotonic()
    for k in range(50):
        a.send(1, "c", k, Payload.of(torch.zeros(1_000_000)), expires_s=0.3)
    assert time.monotonic() - begun_s < 5.0
    until(lambda: a._routes[1].unsent.unfinished_tasks == 0)
    again = members.add(place)
    until(lambda: again.is_up(0))
    a.send(1, "c", 99, number(99))
    assert got(again, 0, 99) == 99.0
    assert again.drain("c") == []


def test_a_message_waits_for_a_member_that_returns_in_time(members: Members) -> None:
    a, b = members.start(2)
    place = lose(a, b)
    a.send(1, "c", 1, number(1), expires_s=PLENTY_S)
    assert got(members.add(place), 0, 1, 0.0) is None
    until(lambda: members.all[-1].is_up(0))
    assert got(members.all[-1], 0, 1) == 1.0


def test_a_big_message_arrives_whole(members: Members) -> None:
    a, b = members.start(2)
    big = torch.randn(5_000_000, generator=torch.Generator().manual_seed(1))  # 20 MB
    a.send(1, "c", 0, Payload.of(big))
    letter = b.receive(0, "c", 0, PLENTY_S)
    assert letter is not None
    assert torch.equal(letter.payload.tensors[0], big)
    assert b.is_up(0)


def test_a_transfer_longer_than_the_silence_allowed_counts_as_being_heard(members: Members) -> None:
    a, _ = members.start(2, silence_s=1.6)
    head = {**LETTER, "layout": [["uint8", 40]]}
    with connect(a) as connection:
        connection.sendall(frame(HELLO) + frame(head, 40))
        until(lambda: a._routes[1].incarnation == HELLO["incarnation"])
        for k in range(4):
            a._routes[1].heard_s = float("-inf")
            assert not a.is_up(1)
            connection.sendall(bytes([k] * 10))
            until(lambda: a.is_up(1))
        letter = a.receive(1, "c", 0, PLENTY_S)
    assert letter is not None
    assert letter.payload.tensors[0].tolist() == [k // 10 for k in range(40)]


@pytest.mark.parametrize("rate", ["8mbit", "80mbit"])
def test_messages_are_held_back_as_long_as_the_modelled_link_would_take(members: Members, rate: str) -> None:
    links = LinkModel.uniform(2, rate, "20ms")
    a, b = members.start(2, links=links)
    begun_s = a.seconds
    for k in range(2):
        a.send(1, "c", k, Payload.of(torch.zeros(50_000)))
    assert [got(b, 0, 0), got(b, 0, 1)] == [0.0, 0.0]
    assert a.seconds - begun_s >= links.seconds([{1: 400_000.0}, {}]) > 0.04


def test_many_threads_may_send_and_receive_at_the_same_time(members: Members) -> None:
    some = members.start(3)

    def talk(peers: TcpPeers, k: int, sums: list[float]) -> None:
        total = 0.0
        for sequence in range(20):
            for peer in peers.others:
                peers.send(peer, f"group {k}", sequence, number(100 * peers.rank + sequence))
            total += sum(got(peers, peer, sequence, channel=f"group {k}") or 0.0 for peer in peers.others)
        sums.append(total)

    results: list[list[float]] = [[] for _ in some]
    threads = [threading.Thread(target=talk, args=(one, k, results[one.rank])) for one in some for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PLENTY_S)
    assert results == [[20 * 300 + 2 * 190.0] * 4, [20 * 200 + 2 * 190.0] * 4, [20 * 100 + 2 * 190.0] * 4]


def test_traffic_counts_what_was_sent_to_whom(members: Members) -> None:
    a, b, c = members.start(3)
    a.send(1, "c", 0, Payload.of(torch.zeros(100_000)))
    a.send(2, "d", 0, Payload.of(torch.zeros(50_000)))
    assert got(b, 0, 0) == 0.0
    assert got(c, 0, 0, channel="d") == 0.0
    until(a.is_quiet)
    counted = {operation: nbytes for (_, operation, _), nbytes in a.traffic.nbytes.items()}
    assert counted["c"] == pytest.approx(400_000, rel=0.002)
    assert counted["d"] == pytest.approx(200_000, rel=0.002)


def test_work_beside_the_training_is_done_in_order(members: Members) -> None:
    (a,) = members.start(1)
    order: list[int] = []
    waits = [a.start(lambda k=k: order.append(k)) for k in range(5)]  # type: ignore[misc]
    for wait in waits:
        wait()
    assert order == [0, 1, 2, 3, 4]
    with pytest.raises(ZeroDivisionError):
        a.start(lambda: 1 / 0)()


def test_closing_sends_what_is_waiting_first(members: Members) -> None:
    a, b = members.start(2)
    for k in range(20):
        a.send(1, "group c", k, Payload.of(torch.full((100_000,), float(k))))
    a.close()
    assert [got(b, 0, k, 1.0, "group c") for k in range(20)] == [float(k) for k in range(20)]
    with pytest.raises(GroupError, match="these peers have been closed"):
        a.send(1, "c", 0, number(0))


def test_a_taken_port_is_named(members: Members) -> None:
    (a,) = members.start(1)
    host, port = place_of(a)
    with pytest.raises(GroupError, match=f"{host}:{port} cannot be listened on: Address already in use"):
        TcpPeers(Membership(0, ((host, port),), "local"))


@pytest.mark.parametrize("secret", [None, b"one" * 6], ids=["", "secret"])
def test_members_of_one_process_share_its_address_and_meet_in_the_order_of_attaching(
    members: Members, caplog: pytest.LogCaptureFixture, secret: bytes | None
) -> None:
    places = [listen_anywhere() for _ in range(2)]
    for unused, _ in places:
        unused.close()
    of = [Membership(k, tuple(address for _, address in places), "gan", secret=secret) for k in range(2)]
    first = [members.add(one) for one in of]
    until(lambda: first[0].is_up(1) and first[1].is_up(0))
    early = members.add(of[0])  # its connections to rank 1 are held until its second member is there
    until(lambda: early._routes[1].connection is not None)
    late = members.add(of[1])
    until(lambda: early.is_up(1) and late.is_up(0))
    first[0].send(1, "c", 0, number(1))
    early.send(1, "c", 0, number(2))
    assert (got(first[1], 0, 0), got(late, 0, 0)) == (1.0, 2.0)
    assert caplog.text == ""
    for one in first:
        one.close(0.0)  # the others go on, and the next takes its name
    again = [members.add(one) for one in of]
    until(lambda: again[0].is_up(1) and again[1].is_up(0) and early.is_up(1))
    assert [one._job for one in (*again, early, late)] == ["gan", "gan", "gan+1", "gan+1"]
    for one in members.all:
        one.close(0.0)
    assert not listening._shared


def test_a_member_that_nobody_attaches_is_turned_away_quietly(
    members: Members, caplog: pytest.LogCaptureFixture
) -> None:
    a, _ = members.start(2, silence_s=0.2)
    connection = connect(a)
    connection.sendall(frame({**HELLO, "job": "local+1"}))
    assert ends(connection)
    assert caplog.text == ""


@needs_ipv6
def test_members_meet_at_ipv6_addresses(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", loopback_interface())
    monkeypatch.setenv("MASTER_ADDR", "::1")
    places = [listen_anywhere() for _ in range(2)]
    addresses = tuple(address for _, address in places)
    assert {host for host, _ in addresses} == {"::1"}
    a, b = (members.add(Membership(k, addresses, "six"), listener=listener) for k, (listener, _) in enumerate(places))
    until(lambda: a.is_up(1) and b.is_up(0))
    a.send(1, "c", 0, number(5))
    assert got(b, 0, 0) == 5.0
    with pytest.raises(GroupError, match=rf"\[::1\]:{addresses[0][1]} cannot be listened on: Address already in use"):
        TcpPeers(Membership(0, addresses, "six"))


def test_a_place_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    members = [["10.77.0.1", 29501], ["10.77.0.1", 29502], ["10.77.0.2", 29501], ["10.77.0.2", 29502]]
    monkeypatch.setenv("COMMOPT_PEERS", json.dumps({"job": "ab12", "members": members}))
    for key, value in (("COMMOPT_NODE_RANK", "1"), ("LOCAL_WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("COMMOPT_RETURNS", raising=False)
    assert Membership.from_environment() == Membership(3, tuple((h, p) for h, p in members), "ab12")  # type: ignore[misc]
    monkeypatch.setenv("COMMOPT_RETURNS", "1")
    found = Membership.from_environment()
    assert found is not None
    assert found.returns
    monkeypatch.delenv("COMMOPT_PEERS")
    assert Membership.from_environment() is None


@pytest.mark.parametrize(
    ("text", "rank", "words"),
    [
        ("{", "0", "environment: COMMOPT_PEERS={"),
        ('{"job": "a"}', "0", "'members'"),
        ('{"job": "a", "members": [["h", "x"]]}', "0", "invalid literal"),
        ('{"job": "a", "members": [["h", 1]]}', "4", "there is no rank 4 among 1 members"),
    ],
)
def test_an_environment_that_no_launcher_wrote_is_refused(
    monkeypatch: pytest.MonkeyPatch, text: str, rank: str, words: str
) -> None:
    monkeypatch.setenv("COMMOPT_PEERS", text)
    monkeypatch.setenv("COMMOPT_NODE_RANK", rank)
    for key in ("LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)
    with pytest.raises(ConfigError, match=words):
        Membership.from_environment()


def test_nothing_is_left_open_after_closing() -> None:
    def open_sockets() -> int:
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        return sum(os.path.exists(one) and os.readlink(one).startswith("socket:") for one in links)

    before, threads, some = open_sockets(), set(threading.enumerate()), Members()
    for one in some.start(3):
        one.close()
    until(lambda: open_sockets() <= before)
    until(lambda: set(threading.enumerate()) <= threads)


# -- port scans, full tables, and links that are slower than silence is long


class FullTable(socket.socket):
    """A listener that finds no free file descriptor for the first connections."""

    refusals = 2

    def accept(self) -> tuple[socket.socket, Any]:
        if self.refusals:
            self.refusals -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


def test_a_member_that_could_not_accept_for_a_moment_still_hears_the_others(members: Members) -> None:
    (place, listener), (other_place, other_listener) = local_memberships(2)
    a = members.add(place, listener=FullTable(fileno=listener.detach()))
    b = members.add(other_place, listener=other_listener)
    until(lambda: a.is_up(1) and b.is_up(0))
    b.send(0, "c", 0, number(5))
    assert got(a, 1, 0) == 5.0


def test_a_connection_without_a_thread_does_no_harm(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = members.start(2)
    refused = list[str]()

    class NoneLeft(threading.Thread):
        def start(self) -> None:
            if self.name == "commopt reader" and not refused:
                refused.append(self.name)
                raise RuntimeError("can't start new thread")
            super().start()

    monkeypatch.setattr(threading, "Thread", NoneLeft)
    assert ends(connect(a))
    assert refused
    with connect(a) as connection:
        connection.sendall(frame({**HELLO, "incarnation": 2**61}))
        until(lambda: a._routes[1].incarnation == 2**61)
    assert b.is_up(0)


def test_close_joins_no_thread_that_has_not_started(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    a, _ = members.start(2)
    was_known = list[bool]()

    class Watched(threading.Thread):
        def start(self) -> None:
            if self.name == "commopt reader":
                was_known.append(self in a._listener._readers)
            super().start()

    monkeypatch.setattr(threading, "Thread", Watched)
    connect(a).close()
    until(lambda: bool(was_known))
    assert was_known == [False]


def test_a_stranger_that_says_one_byte_at_a_time_is_hung_up_on(members: Members) -> None:
    (place, listener), (_, unused) = local_memberships(2)
    with unused:
        a = members.add(place, listener=listener, silence_s=0.4)
        hello, said = frame(HELLO), 0
        with connect(a) as connection:
            connection.settimeout(0.05)  # far less than the silence allowed
            for said in range(len(hello)):
                try:
                    connection.sendall(hello[said : said + 1])
                    if connection.recv(1) == b"":
                        break
                except TimeoutError:
                    continue
                except OSError:
                    break
        assert said < len(hello) - 1
        assert a._routes[1].incarnation == -1


def test_no_more_waits_for_a_dead_member_than_it_would_keep(members: Members) -> None:
    (place, listener), (_, unused) = local_memberships(2)
    unused.close()
    a = members.add(place, listener=listener)
    route = a._routes[1]
    until(lambda: route.unsent.unfinished_tasks == 0)  # what it says of itself
    for k in range(5 * KEPT):
        a.send(1, f"c{k % 2}", k, Payload.of(torch.zeros(10)))
    assert route.unsent.unfinished_tasks == KEPT
    for k in range(2 * KEPT):
        a.send(1, f"{GROUP}c", k, Payload.of(torch.zeros(10)))
    assert route.unsent.unfinished_tasks == 3 * KEPT  # of an exchange every message is wanted


def test_a_sender_on_a_slow_link_does_not_seem_down(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "_BEAT_S", 0.1)
    links = LinkModel.uniform(3, "1mbit")
    a, b, c = members.start(3, silence_s=1.0, links=links)
    for peer in a.others:
        a.send(peer, "c", 0, Payload.of(torch.zeros(40_000)))  # 1.3 s, one after the other
    assert [got(b, 0, 0), got(c, 0, 0)] == [0.0, 0.0]


# -- connections without end, and a job with a secret


def test_strangers_cannot_use_up_a_members_files_and_threads(members: Members) -> None:
    a, b = members.start(2)
    strangers = [connect(a) for _ in range(300)]
    strangers += [connect(a) for _ in range(20)]
    for one in strangers[-20:]:
        one.sendall(frame(HELLO))
    until(lambda: len(a._listener._readers) <= listening._STRANGERS + tcp._READERS + 1 and b.is_up(0))
    assert ends(strangers[0])
    for one in strangers:
        one.close()
    b.send(0, "c", 0, number(5), expires_s=PLENTY_S)
    until(lambda: a.is_up(1))


SECRETS: list[tuple[bytes | None, bytes | None]] = [(b"one" * 6, b"two" * 6), (b"one" * 6, None), (None, b"two" * 6)]


def test_members_with_one_secret_hear_each_other(members: Members) -> None:
    a, b = (
        members.add(dataclasses.replace(place, secret=b"one" * 6), listener=listener)
        for place, listener in local_memberships(2)
    )
    until(lambda: a.is_up(1) and b.is_up(0))
    for k in range(3):
        a.send(1, "c", k, Payload.of(torch.full((1000,), float(k))))
    assert [got(b, 0, k) for k in range(3)] == [0.0, 1.0, 2.0]
    connection = connect(a)
    connection.sendall(frame(HELLO))  # without the secret
    assert connection.recv(16, socket.MSG_WAITALL)
    assert ends(connection)
    assert b.is_up(0)


@pytest.mark.parametrize("given", SECRETS, ids=["another", "none here", "none there"])
def test_a_member_with_another_secret_is_turned_away(
    members: Members, given: tuple[bytes, bytes], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp, "_DIAL_S", 0.3)
    pairs = zip(local_memberships(2), given, strict=True)
    a, b = (members.add(dataclasses.replace(place, secret=one), listener=listener) for (place, listener), one in pairs)
    until(lambda: "give every rank the same COMMOPT_SECRET" in caplog.text or "was not signed with" in caplog.text)
    assert not a.is_up(1)
    assert not b.is_up(0)
