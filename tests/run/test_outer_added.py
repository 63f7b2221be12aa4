"""A machine that is added to a running job: it catches up, and all agree from which round on it is drawn."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from members import PLENTY_S, Members, local_memberships
from outer_rig import EVERY, STEP_S, Diary, run_linked, train_diary
from rig import make_model
from test_outer_machines import on_machines

from commopt import attach
from commopt.errors import AttachError, GroupError
from commopt.groups import SimGroup, SimWorld, tcp
from commopt.groups.membership import Membership
from commopt.groups.tcp import TcpPeers
from commopt.run import members as run_members

ADD = [{"at_step": 20, "add": 2}]
TIMEOUT_S = 1.0


def run(name: str, steps: int, faults: Sequence[Mapping[str, Any]], ranks: int = 3, **options: Any) -> list[Diary]:
    return run_linked(ranks, name, steps, faults, timeout_s=TIMEOUT_S, **options)[1]


def first_round_of(diaries: Sequence[Diary], added: int) -> int:
    """From which round on all members draw an added one: they agree."""
    (first,) = {event["round"] for one in diaries for event in one.events("peer added") if event["rank"] == added}
    return int(first)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("noloco", {}),
        ("noloco", {"delay": 3, "message": "int8"}),
        ("diloco", {"fragments": 2}),
        ("local_sgd", {}),
        ("push_sum", {"every": 5}),
    ],
    ids=str,
)
def test_an_added_machine_catches_up_and_takes_part_from_a_round_that_all_agree_on(
    name: str, options: dict[str, Any]
) -> None:
    diaries = run(name, 120, ADD, **options)
    new = diaries[2]
    (event,) = new.events("caught up")
    assert new.begun_at == [event["step"]]
    assert 20 <= event["step"] <= 30
    donor = diaries[event["from"]]
    if event["step"] in donor.after:
        assert torch.equal(new.started[0], donor.after[event["step"]])
    for own, theirs in zip(new.momentum[event["step"]], donor.momentum[event["step"]], strict=True):
        assert torch.equal(own, theirs)
    assert new.learning_rate[event["step"]] == donor.learning_rate[event["step"]]
    first = first_round_of(diaries, 2)
    fragments = options.get("fragments", 1)
    assert event["step"] // EVERY * fragments < first < 20 * fragments
    for diary in diaries[:2]:
        assert diary.seen == list(range(120))
        assert diary.attached.ranks == 3
        assert not any(2 in report.members for report in diary.reports if report.round < first)
        assert not any(report.missed for report in diary.reports), "nobody meets one that does not know of it"
    assert [report.round for report in new.reports] == list(range(first, 24 * fragments))
    assert not any(report.missed for report in new.reports)
    assert any(len(report.members) > 1 for report in new.reports)


def test_two_machines_are_added_one_after_the_other() -> None:
    diaries = run("noloco", 200, [*ADD, {"at_step": 60, "add": 3}], ranks=4)
    first, second = first_round_of(diaries[:3], 2), first_round_of(diaries, 3)
    assert first < second
    tables = [diary.attached.peers.sizes for diary in diaries]
    assert all(table == ((0, 2), (first, 3), (second, 4)) for table in tables)
    later = [report for diary in diaries for report in diary.reports if report.round >= second]
    assert all(len(report.members) == 2 and not report.missed for report in later)


@pytest.mark.parametrize("dead", [0, 1])
def test_a_machine_that_dies_meanwhile_does_not_keep_another_one_out(dead: int) -> None:
    faults = [*ADD, {"at_step": 22, "kill": dead}, {"at_step": 60, "restart": dead}]
    diaries = run("noloco", 160, faults)
    first = first_round_of(diaries, 2)
    assert all(diary.attached.peers.sizes[-1] == (first, 3) for diary in diaries)
    last = [report for diary in diaries for report in diary.reports if report.round > 26]
    assert any(2 in report.members for report in last)
    assert not any(report.missed for report in last)


def test_a_job_of_one_machine_can_have_a_second_one_added() -> None:
    diaries = run("diloco", 80, [{"at_step": 20, "add": 1}], ranks=2)
    first = first_round_of(diaries, 1)
    assert [report.round for report in diaries[0].reports] == list(range(first, 16))
    assert all(report.members == [0, 1] for diary in diaries for report in diary.reports)
    assert torch.equal(diaries[0].after[80], diaries[1].after[80])


@pytest.mark.parametrize("name", ["noloco", "diloco"])
def test_a_machine_of_two_ranks_is_added_as_one(name: str) -> None:
    found = on_machines(3, 2, (name, {}), [{"at_step": 10, "add": [4, 5]}], steps=80, step_s=STEP_S)
    tables = {run.peers.sizes for _, run in found}
    assert len(tables) == 1
    ((_, (first, members)),) = tables
    assert members == 3
    assert [report.round for report in found[4][1].reports] == [report.round for report in found[5][1].reports]
    assert found[4][1].reports[0].round == first
    assert not any(report.missed for _, run in found for report in run.reports)
    for rank in (0, 2, 4):
        assert torch.equal(found[rank][0], found[rank + 1][0])


@pytest.mark.parametrize("name", ["decentralized_adam", "choco"])
def test_a_method_with_a_fixed_topology_takes_no_more_members(name: str) -> None:
    diaries, options = [Diary() for _ in range(3)], {"timeout_s": TIMEOUT_S, "topology": "ring"}

    def train(group: SimGroup) -> None:
        if group.rank < 2:
            train_diary(group, diaries[group.rank], name, options, 60, step_s=STEP_S)
            return
        with pytest.raises(GroupError, match="rank 2 has a longer list of members than its peers, and found no peer"):
            train_diary(group, diaries[2], name, options, 60, step_s=STEP_S)

    SimWorld[None](3, faults=ADD).run(train)
    for diary in diaries[:2]:
        assert diary.attached.peers.fixed_because is not None
        assert diary.attached.peers.fixed_because.startswith(f"the topology of {name} is fixed")
        assert diary.attached.peers.sizes == ((0, 2),)


def test_a_machine_with_another_configuration_is_told_how_and_the_others_say_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    diaries = [Diary() for _ in range(3)]

    def train(group: SimGroup) -> None:
        options = {"every": EVERY, "timeout_s": TIMEOUT_S}
        if group.rank < 2:
            train_diary(group, diaries[group.rank], "noloco", options, 60, step_s=STEP_S)
            return
        with pytest.raises(AttachError, match=r"method\.lr is 0\.7 on rank 0 and 0\.8 on rank 2"):
            train_diary(group, diaries[2], "noloco", {**options, "lr": 0.8}, 60, step_s=STEP_S)

    with caplog.at_level(logging.WARNING):
        SimWorld[None](3, faults=ADD).run(train)
    told = "rank 0: rank 2 is turned away, as its configuration differs; it prints how"
    assert [one for one in caplog.messages if "turned away" in one] == [told]
    assert not diaries[0].events("helped to catch up")
    assert not any(diary.events("peer added") for diary in diaries[:2])


def test_lost_and_returned_peers_are_told_of_once_each(caplog: pytest.LogCaptureFixture) -> None:
    faults = [{"at_step": 20, "kill": 2}, {"at_step": 60, "restart": 2}]
    with caplog.at_level(logging.WARNING):
        diaries = run("noloco", 120, faults)
    for rank in (0, 1):
        (lost,), (back,) = (
            [event["step"] // EVERY - 1 for event in diaries[rank].events(kind)] for kind in ("peer lost", "peer back")
        )
        assert 4 <= lost < back
        assert [one for one in caplog.messages if one.startswith(f"rank {rank}: ")] == [
            f"rank {rank}: rank 2 is not answering since round {lost}; training continues without it",
            f"rank {rank}: rank 2 is back at round {back}",
        ]


def test_peers_that_have_finished_are_not_said_to_be_lost(caplog: pytest.LogCaptureFixture) -> None:
    def train(group: SimGroup) -> None:
        steps = 60 if group.rank else 20
        train_diary(group, Diary(), "noloco", {"every": EVERY, "timeout_s": TIMEOUT_S}, steps, step_s=STEP_S)

    with caplog.at_level(logging.WARNING):
        SimWorld[None](3).run(train)
    assert not [one for one in caplog.messages if "is not answering" in one]


# -- over TCP


@pytest.fixture
def members(monkeypatch: pytest.MonkeyPatch) -> Iterator[Members]:
    monkeypatch.setattr(tcp, "_BEAT_S", 0.1)  # so that members soon meet again
    with contextlib.closing(Members()) as made:
        yield made


def listing(members: Members, listed: int, of: tuple[Membership, socket.socket]) -> TcpPeers:
    place, listener = of
    own = dataclasses.replace(place, addresses=place.addresses[:listed], secret=b"a secret of 16 bytes, or longer")
    return members.add(own, listener=listener)


def test_a_machine_is_added_over_tcp(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_members, "_TELL_S", 0.5)
    places, diaries, is_long_enough = local_memberships(3), [Diary() for _ in range(3)], threading.Event()
    options = {"every": 4, "timeout_s": 20.0}

    def pause(_: int, __: torch.nn.Module) -> None:
        time.sleep(0.02)
        if len(diaries[0].seen) >= 20:
            is_long_enough.set()

    def train(rank: int) -> None:
        peers = listing(members, 2 if rank < 2 else 3, places[rank])
        train_diary(peers, diaries[rank], "noloco", options, 160, poison=pause)

    with ThreadPoolExecutor(3) as lanes:
        running = [lanes.submit(train, rank) for rank in (0, 1)]
        assert is_long_enough.wait(PLENTY_S)
        for one in [*running, lanes.submit(train, 2)]:
            one.result()
    first = first_round_of(diaries, 2)
    assert 5 <= first < 40
    assert diaries[2].begun_at[0] >= 20
    assert {diary.attached.peers.sizes for diary in diaries} == {((0, 2), (first, 3))}
    assert [report.round for report in diaries[2].reports] == list(range(first, 40))
    assert sum(report.missed for diary in diaries for report in diary.reports) == 0


def test_one_that_the_others_cannot_reach_is_told_so(members: Members) -> None:
    *two, (third, listener), (_, unused) = local_memberships(4)
    unused.close()
    a, b = (listing(members, 2, place) for place in two)
    a.fixed_because = b.fixed_because = None
    elsewhere = (*third.addresses[:2], third.addresses[3])  # as behind a firewall: not where it listens
    c = listing(members, 3, (dataclasses.replace(third, addresses=elsewhere), listener))
    model = make_model()
    run = attach(model, "noloco", torch.optim.SGD(model.parameters(), lr=0.1), group=c)
    with pytest.raises(
        GroupError, match=r"rank 2 is not let in: rank 0 \(127.*it does not reach this one; is the port"
    ):
        run.join(wait_s=2.0)
