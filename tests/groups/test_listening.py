"""Who is heard at a member's address: the members of its job that know its secret, and no number of strangers does harm."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from members import HELLO, LETTER, Members, connect, ends, frame, got, local_memberships, number, until, until_up
from networks import needs_ipv6

from commopt.cluster.machine import loopback_interface
from commopt.errors import GroupError
from commopt.groups import listening, tcp
from commopt.groups.listening import listen_anywhere
from commopt.groups.membership import Membership
from commopt.groups.tcp import TcpPeers

SECRET = b"a secret of 16 bytes, or longer"


@pytest.fixture
def members(monkeypatch: pytest.MonkeyPatch) -> Iterator[Members]:
    monkeypatch.setattr(tcp, "_BEAT_S", 0.1)  # so that members soon meet again
    with contextlib.closing(Members()) as made:
        yield made


@pytest.mark.parametrize(
    "noise",
    [
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        frame({**HELLO, "job": "another"}),
        frame({**HELLO, "rank": 0}),
        frame({**HELLO, "rank": 7}),
        frame({"kind": "hello", "job": "local", "rank": 1}),
        frame({**LETTER, "layout": []}),
    ],
    ids=range(6),
)
def test_strangers_and_noise_are_turned_away(members: Members, noise: bytes) -> None:
    a, b = members.start(2)
    assert ends(connect(a, noise))
    b.send(0, "c", 0, number(5))
    assert got(a, 1, 0) == 5.0
    assert a.is_up(1)


def test_a_member_of_another_job_is_never_heard(members: Members, caplog: pytest.LogCaptureFixture) -> None:
    (place, listener), (other_place, other_listener) = local_memberships(2)
    with caplog.at_level(logging.WARNING):
        a = members.add(place, listener=listener)
        b = members.add(dataclasses.replace(other_place, job="another"), listener=other_listener)
        b.send(0, "c", 0, number(1), expires_s=1.0)
        until(lambda: "turned away 127.0.0.1: another job: " in caplog.text)
    assert got(a, 1, 0, 0.5) is None
    assert not a.is_up(1)
    assert not b.is_up(0)


def test_a_taken_port_is_named() -> None:
    taken, (host, port) = listen_anywhere()
    with taken, pytest.raises(GroupError, match=f"{host}:{port} cannot be listened on: Address already in use"):
        TcpPeers(Membership(0, ((host, port),), "local"))


@pytest.mark.parametrize("secret", [None, SECRET], ids=["", "secret"])
def test_members_of_one_process_share_its_address_and_meet_in_the_order_of_attaching(
    members: Members, caplog: pytest.LogCaptureFixture, secret: bytes | None
) -> None:
    places = [listen_anywhere() for _ in range(2)]
    for unused, _ in places:
        unused.close()
    of = [Membership(k, tuple(address for _, address in places), "gan", secret=secret) for k in range(2)]
    first = [members.add(one) for one in of]
    until_up(*first)
    early = members.add(of[0])  # its connections to rank 1 are held until its second member is there
    until(lambda: early._routes[1].connection is not None)
    late = members.add(of[1])
    until_up(early, late)
    first[0].send(1, "c", 0, number(1))
    early.send(1, "c", 0, number(2))
    assert (got(first[1], 0, 0), got(late, 0, 0)) == (1.0, 2.0)
    assert caplog.text == ""
    for one in first:
        one.close(0.0)  # the others go on, and the next takes its name
    again = [members.add(one) for one in of]
    until_up(*again)
    until_up(early, late)
    assert [one._job for one in (*again, early, late)] == ["gan", "gan", "gan+1", "gan+1"]
    members.close()
    assert not listening._shared


def test_a_member_that_nobody_attaches_is_turned_away_quietly(
    members: Members, caplog: pytest.LogCaptureFixture
) -> None:
    a, _ = members.start(2, silence_s=0.2)
    assert ends(connect(a, frame({**HELLO, "job": "local+1"})))
    assert caplog.text == ""


@needs_ipv6
def test_members_meet_at_ipv6_addresses(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", loopback_interface())
    monkeypatch.setenv("MASTER_ADDR", "::1")
    places = [listen_anywhere() for _ in range(2)]
    addresses = tuple(address for _, address in places)
    assert {host for host, _ in addresses} == {"::1"}
    a, b = (members.add(Membership(k, addresses, "six"), listener=listener) for k, (listener, _) in enumerate(places))
    until_up(a, b)
    a.send(1, "c", 0, number(5))
    assert got(b, 0, 0) == 5.0
    with pytest.raises(GroupError, match=rf"\[::1\]:{addresses[0][1]} cannot be listened on: Address already in use"):
        TcpPeers(Membership(0, addresses, "six"))


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
    until_up(a, b)
    b.send(0, "c", 0, number(5))
    assert got(a, 1, 0) == 5.0


def test_a_connection_without_a_thread_does_no_harm(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = members.start(2)
    was_known = list[bool]()

    class Refused(threading.Thread):
        def start(self) -> None:
            if self.name == "commopt reader":
                was_known.append(self in a._listener._readers)
                if len(was_known) == 1:
                    raise RuntimeError("can't start new thread")
            super().start()

    monkeypatch.setattr(threading, "Thread", Refused)
    assert ends(connect(a))
    with connect(a, frame(HELLO)):
        until(lambda: a._routes[1].incarnation == HELLO["incarnation"])
    assert b.is_up(0)
    assert not any(was_known)  # closing would join a thread that has not started


def test_a_stranger_that_says_one_byte_at_a_time_is_hung_up_on(members: Members) -> None:
    a = members.alone(silence_s=0.4)
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


def test_strangers_cannot_use_up_a_members_files_and_threads(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "_STRANGERS", 8)
    a, b = members.start(2)
    strangers = [connect(a) for _ in range(40)]
    strangers += [connect(a, frame(HELLO)) for _ in range(20)]
    until(lambda: len(a._listener._readers) <= listening._STRANGERS + tcp._READERS + 1 and b.is_up(0))
    assert ends(strangers[0])
    for one in strangers:
        one.close()
    b.send(0, "c", 0, number(5))
    until(lambda: a.is_up(1))


@pytest.mark.parametrize(
    "given", [(SECRET, SECRET[::-1]), (SECRET, None), (None, SECRET)], ids=["another", "none there", "none here"]
)
def test_a_member_with_another_secret_is_turned_away(
    members: Members, given: Sequence[bytes | None], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp, "_DIAL_S", 0.3)
    pairs = zip(local_memberships(2), given, strict=True)
    a, b = (members.add(dataclasses.replace(place, secret=one), listener=listener) for (place, listener), one in pairs)
    until(lambda: "was turned away by rank 1 (127.0.0.1): " in caplog.text or "turned away 127.0.0.1: " in caplog.text)
    assert not a.is_up(1)
    assert not b.is_up(0)
