"""Members that are added to a running job over TCP, and what those who are turned away are told."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence

import pytest
from members import HELLO, Members, connect, frame, got, local_memberships, number, until, until_up

from commopt.groups import frames, tcp
from commopt.groups.membership import Membership
from commopt.groups.peers import Sizes, merged, size_at
from commopt.groups.tcp import TcpPeers

SECRET = b"a secret of 16 bytes, or longer"


@pytest.fixture
def members(monkeypatch: pytest.MonkeyPatch) -> Iterator[Members]:
    monkeypatch.setattr(tcp, "_BEAT_S", 0.1)  # so that members soon meet again
    with contextlib.closing(Members()) as made:
        yield made


def start(
    members: Members,
    listed: Sequence[int],
    *,
    secrets: Sequence[bytes | None] = (SECRET,) * 3,
    fixed: str | None = None,
    jobs: Sequence[str] = ("j",) * 3,
) -> list[TcpPeers]:
    """Members 0, 1, ..., of which each lists so many."""
    places, started = local_memberships(len(listed)), []
    for (place, listener), n, secret, job in zip(places, listed, secrets, jobs, strict=False):
        own = dataclasses.replace(place, addresses=place.addresses[:n], secret=secret, job=job)
        started.append(members.add(own, listener=listener))
        started[-1].fixed_because = fixed
    return started


def test_a_member_with_a_longer_list_is_heard_by_those_with_the_shorter_one(members: Members) -> None:
    a, b, c = start(members, [2, 2, 3])
    until(lambda: a.known == b.known == 3)
    assert a.size == b.size == 2  # until the training script's thread takes it in
    until_up(a, b, c)
    c.send(0, "c", 1, number(7))
    assert got(a, 2, 1) == 7.0
    b.send(2, "c", 1, number(8))
    assert got(c, 1, 1) == 8.0


def test_members_that_the_added_one_cannot_reach_hear_of_it_from_others(members: Members) -> None:
    (place, listener), (other, other_listener), (third, unused) = local_memberships(3)
    unused.close()
    two = place.addresses[:2]
    a = members.add(dataclasses.replace(place, addresses=two, secret=SECRET), listener=listener)
    b = members.add(dataclasses.replace(other, addresses=two, secret=SECRET), listener=other_listener)
    a.fixed_because = b.fixed_because = None
    until_up(a, b)
    a._extend(third.addresses)  # as if the added member, which is behind a firewall for b, had greeted a
    until(lambda: b.known == 3)


TURNED_AWAY = {
    "a list without a secret": (
        {"secrets": (None,) * 3},
        "a longer list of members in a job without a secret; give every rank the same",
    ),
    "another secret": (
        {"secrets": (SECRET, SECRET, SECRET[::-1])},
        "another secret; give every rank the same COMMOPT_SECRET",
    ),
    "no secret": (
        {"secrets": (SECRET, SECRET, None)},
        "no secret, and this job has one; give every rank the same COMMOPT_SECRET",
    ),
    "a fixed topology": (
        {"fixed": "the topology is fixed"},
        "a longer list of members than this job began with: the topology is fixed",
    ),
    "another job": ({"jobs": ("j", "j", "k")}, "another job: another name in the cluster's file, or another run"),
}


@pytest.mark.parametrize("case", TURNED_AWAY)
def test_one_that_is_turned_away_is_told_why_and_the_others_say_so_once(
    case: str, members: Members, caplog: pytest.LogCaptureFixture
) -> None:
    given, why = TURNED_AWAY[case]
    with caplog.at_level(logging.WARNING):
        a, b, c = start(members, [2, 2, 3], **given)  # type: ignore[arg-type]
        until(lambda: set(c.refusals) == {0, 1})
        c._refusals.clear()
        until(lambda: set(c.refusals) == {0, 1})  # it knocks again
    assert all(why in told for told in c.refusals.values())
    assert not c.is_up(0)
    assert a.known == b.known == 2
    said = [record.getMessage() for record in caplog.records if why in record.getMessage()]
    assert sorted(line.partition(why)[0] for line in said) == [
        "rank 0 turned away 127.0.0.1: ",
        "rank 1 turned away 127.0.0.1: ",
        "rank 2 was turned away by rank 0 (127.0.0.1): ",
        "rank 2 was turned away by rank 1 (127.0.0.1): ",
    ]
    a.send(1, "c", 0, number(5))
    assert got(b, 0, 0) == 5.0


def test_a_list_that_contradicts_is_turned_away_with_the_place(members: Members) -> None:
    a, b = start(members, [2, 2])
    until_up(a, b)
    (place, listener), (_, unused), (third, third_listener) = local_memberships(3)
    listed = (a._addresses[0], place.addresses[0], third.addresses[2])
    c = members.add(Membership(2, listed, "j", secret=SECRET), listener=third_listener)
    for one in (listener, unused):
        one.close()
    until(lambda: 0 in c.refusals)
    there, here = (":".join(map(str, one)) for one in (listed[1], a._addresses[1]))
    assert f"member 1 is {there} in one list and {here} in the other" in c.refusals[0]
    assert a.known == 2


def test_another_version_is_told_so(members: Members, caplog: pytest.LogCaptureFixture) -> None:
    a = members.alone()
    with connect(a, frame(HELLO).replace(frames._MAGIC, b"cmo1")) as connection:
        told = b"".join(iter(lambda: connection.recv(1000), b""))
    assert told == frames._NO + b"another version of commopt; install the same on every machine"
    assert caplog.messages == [f"rank 0 turned away 127.0.0.1: {told.removeprefix(frames._NO).decode()}"]


@pytest.mark.parametrize(
    ("own", "theirs", "both"),
    [
        (((0, 2),), ((0, 2), (9, 3)), ((0, 2), (9, 3))),
        (((0, 2), (7, 3)), ((0, 2), (9, 3)), ((0, 2), (9, 3))),
        (((0, 2), (20, 4)), ((0, 2), (9, 3)), ((0, 2), (9, 3), (20, 4))),
        (((0, 3),), ((0, 2), (9, 3)), ((0, 2), (9, 3))),
    ],
)
def test_what_two_know_of_added_members_is_the_same_in_any_order(own: Sizes, theirs: Sizes, both: Sizes) -> None:
    assert merged(own, theirs) == merged(theirs, own) == merged(both, own) == both


def test_members_are_drawn_from_their_round_on() -> None:
    sizes = ((0, 2), (9, 3), (12, 5))
    assert [size_at(sizes, round) for round in (0, 8, 9, 11, 12, 99)] == [2, 2, 3, 3, 5, 5]
