"""Members over TCP: a dead one is noticed soon, a member that returns is heard again, and messages arrive whole or expire."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from members import HELLO, LETTER, PLENTY_S, Members, connect, ends, frame, got, lose, number, until, until_up, vanish
from torch.multiprocessing.reductions import StorageWeakRef

from commopt.errors import GroupError
from commopt.groups import tcp
from commopt.groups.peers import GROUP, KEPT
from commopt.groups.tcp import TcpPeers
from commopt.plan.links import LinkModel
from commopt.wire.payload import Payload


@pytest.fixture
def members(monkeypatch: pytest.MonkeyPatch) -> Iterator[Members]:
    monkeypatch.setattr(tcp, "_BEAT_S", 0.1)  # so that members soon meet again
    with contextlib.closing(Members()) as made:
        yield made


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


def test_a_message_that_was_sent_does_not_stay_in_memory(members: Members) -> None:
    a, b = members.start(2)
    payload = number(1)
    held: Any = StorageWeakRef(payload.buffer.untyped_storage())  # type: ignore[no-untyped-call]
    a.send(1, "c", 1, payload)
    assert got(b, 0, 1) == 1.0
    assert not held.expired()
    del payload
    until(held.expired)


@pytest.mark.parametrize("leave", [vanish, TcpPeers.close])
def test_a_receive_under_way_ends_when_its_sender_goes(members: Members, leave: Callable[[TcpPeers], None]) -> None:
    a, b = members.start(2, silence_s=60.0)
    with ThreadPoolExecutor(1) as lane:
        waiting = lane.submit(got, b, 0, 0, 60.0)
        leave(a)
        assert waiting.result(PLENTY_S) is None
    assert not b.is_up(0)
    assert b.progress(0) is None


def test_a_silent_member_is_down_until_it_is_heard_again(members: Members) -> None:
    a = members.alone(silence_s=0.4)
    with connect(a, frame(HELLO)) as connection:
        for step in range(2):
            connection.sendall(frame({"kind": "beat", "step": step, "is_training": True, "sizes": []}))
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
    "letter", [frame({**LETTER, "layout": [["float32", 1000]]}, 4000), frame(HELLO)], ids=["room", "again"]
)
def test_a_member_that_talks_nonsense_is_cut_off_and_others_are_not(members: Members, letter: bytes) -> None:
    a, _, c = members.start(3)
    a.room_bytes = 3999
    assert ends(connect(a, frame(HELLO), letter))
    c.send(0, "c", 0, number(5))
    assert got(a, 2, 0) == 5.0
    assert got(a, 1, 0, 0.1) is None


@pytest.mark.parametrize("clock_ns", [None, 10], ids=["", "its clock went back while it was down"])
def test_a_member_that_returns_is_heard_again_and_what_came_before_is_gone(
    members: Members, monkeypatch: pytest.MonkeyPatch, clock_ns: int | None
) -> None:
    a, b = members.start(2)
    b.send(0, "c", 3, number(1))
    until(lambda: bool(a._mailbox._boxes))
    place = lose(a, b)
    assert got(a, 1, 2, 0.0) is None  # number 3 is there all the same
    if clock_ns is not None:
        monkeypatch.setattr(tcp.time, "time_ns", lambda: clock_ns)  # type: ignore[attr-defined]
    again = members.add(place)
    until_up(a, again)
    assert got(a, 1, 3, 0.2) is None
    assert ends(connect(a, frame({**HELLO, "incarnation": 9})))  # of a start before this one, which is up
    again.send(0, "c", 3, number(2))
    assert got(a, 1, 3) == 2.0
    a.send(1, "c", 4, number(4))
    assert got(again, 0, 4) == 4.0


def test_what_an_old_connection_still_brings_after_a_return_is_dropped(members: Members) -> None:
    a, old = members.alone(), {**LETTER, "layout": [["uint8", 1]]}
    with connect(a, frame(HELLO)) as first, connect(a) as second:
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
    again = members.add(place)
    until(lambda: again.is_up(0))
    assert got(again, 0, 1) == 1.0


def test_a_transfer_longer_than_the_silence_allowed_counts_as_being_heard(members: Members) -> None:
    a, head = members.alone(), {**LETTER, "layout": [["uint8", 40]]}
    with connect(a, frame(HELLO), frame(head, 40)) as connection:
        until(lambda: a._routes[1].incarnation == HELLO["incarnation"])
        for k in range(4):
            a._routes[1].readers[0].heard_s = float("-inf")
            assert not a.is_up(1)
            connection.sendall(bytes([k] * 10))
            until(lambda: a.is_up(1))
        letter = a.receive(1, "c", 0, PLENTY_S)
    assert letter is not None
    assert letter.payload.tensors[0].tolist() == [k // 10 for k in range(40)]


def test_messages_are_held_back_as_long_as_the_modelled_link_would_take(members: Members) -> None:
    links = LinkModel.uniform(2, "80mbit", "20ms")
    a, b = members.start(2, links=links)
    begun_s = a.seconds
    for k in range(2):
        a.send(1, "c", k, Payload.of(torch.zeros(50_000)))
    assert [got(b, 0, 0), got(b, 0, 1)] == [0.0, 0.0]
    assert a.seconds - begun_s >= links.seconds([{1: 400_000.0}, {}]) > 0.04


def test_many_threads_may_send_and_receive_at_the_same_time(members: Members) -> None:
    some = members.start(3)

    def talk(peers: TcpPeers, k: int) -> float:
        total = 0.0
        for sequence in range(20):
            for peer in peers.others:
                peers.send(peer, f"group {k}", sequence, number(100 * peers.rank + sequence))
            total += sum(got(peers, peer, sequence, channel=f"group {k}") or 0.0 for peer in peers.others)
        return total

    with ThreadPoolExecutor(12) as lanes:
        results = [[lanes.submit(talk, one, k) for k in range(4)] for one in some]
    sums = [[one.result() for one in of_rank] for of_rank in results]
    assert sums == [[20 * 300 + 2 * 190.0] * 4, [20 * 200 + 2 * 190.0] * 4, [20 * 100 + 2 * 190.0] * 4]


def test_big_messages_arrive_whole_and_traffic_counts_what_was_sent_to_whom(members: Members) -> None:
    a, b, c = members.start(3)
    big = torch.randn(5_000_000, generator=torch.Generator().manual_seed(1))  # 20 MB
    a.send(1, "c", 0, Payload.of(big))
    a.send(2, "d", 0, Payload.of(torch.zeros(50_000)))
    letter = b.receive(0, "c", 0, PLENTY_S)
    assert letter is not None
    assert torch.equal(letter.payload.tensors[0], big)
    assert b.is_up(0)
    assert got(c, 0, 0, channel="d") == 0.0
    until(a.is_quiet)
    counted = {operation: nbytes for (_, operation, _), nbytes in a.traffic.nbytes.items()}
    assert counted["c"] == pytest.approx(20_000_000, rel=0.002)
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


def test_nothing_is_left_open_after_closing() -> None:
    def open_sockets() -> int:
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        return sum(os.path.exists(one) and os.readlink(one).startswith("socket:") for one in links)

    before, threads, some = open_sockets(), set(threading.enumerate()), Members()
    for one in some.start(3):
        one.close()
    until(lambda: open_sockets() <= before)
    until(lambda: set(threading.enumerate()) <= threads)


def test_no_more_waits_for_a_dead_member_than_it_would_keep(members: Members) -> None:
    a = members.alone()
    route = a._routes[1]
    for k in range(5 * KEPT):
        a.send(1, f"c{k % 2}", k, Payload.of(torch.zeros(10)))
    assert route.unsent.unfinished_tasks == KEPT
    for k in range(2 * KEPT):
        a.send(1, f"{GROUP}c", k, Payload.of(torch.zeros(10)))
    assert route.unsent.unfinished_tasks == 3 * KEPT  # of an exchange every message is wanted


def test_a_sender_on_a_slow_link_does_not_seem_down(members: Members) -> None:
    links = LinkModel.uniform(3, "1mbit")
    a, b, c = members.start(3, silence_s=1.0, links=links)
    for peer in a.others:
        a.send(peer, "c", 0, Payload.of(torch.zeros(40_000)))  # 1.3 s, one after the other
    assert [got(b, 0, 0), got(c, 0, 0)] == [0.0, 0.0]
