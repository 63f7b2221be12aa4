"""Members over TCP that meet port scans, full tables and links that are slower than silence is long."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_tcp import HELLO, Members, connect, ends, frame, got, number, until

from commopt.groups import tcp
from commopt.groups.peers import GROUP, KEPT
from commopt.groups.tcp import local_memberships
from commopt.plan.links import LinkModel
from commopt.wire.payload import Payload


@pytest.fixture
def members() -> Iterator[Members]:
    made = Members()
    yield made
    for one in made.all:
        one.close(0.0)


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


def test_a_member_that_could_not_start_a_thread_for_a_connection_hears_the_next_one(
    members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        connection.sendall(frame({**HELLO, "incarnation": 2**70}))
        until(lambda: a._routes[1].incarnation == 2**70)
    assert b.is_up(0)


def test_a_thread_is_known_to_close_only_once_it_can_be_joined(
    members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, _ = members.start(2)
    was_known = list[bool]()

    class Watched(threading.Thread):
        def start(self) -> None:
            if self.name == "commopt reader":
                was_known.append(self in a._readers)
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
    until(lambda: route.unsent == 0)  # what it says of itself
    for k in range(5 * KEPT):
        a.send(1, f"c{k % 2}", k, Payload.of(torch.zeros(10)))
    assert route.unsent == KEPT
    for k in range(2 * KEPT):
        a.send(1, f"{GROUP}c", k, Payload.of(torch.zeros(10)))
    assert route.unsent == 3 * KEPT  # of an exchange every message is wanted


def test_a_message_that_a_slow_link_holds_back_for_long_does_not_make_its_sender_seem_down(
    members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp, "_BEAT_S", 0.1)
    links = LinkModel.uniform(3, "1mbit")
    a, b, c = members.start(3, silence_s=1.0, links=links)
    for peer in a.others:
        a.send(peer, "c", 0, Payload.of(torch.zeros(40_000)))  # 1.3 s, one after the other
    assert [got(b, 0, 0), got(c, 0, 0)] == [0.0, 0.0]
