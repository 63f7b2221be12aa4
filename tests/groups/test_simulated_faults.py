"""Members that die, return, are cut off, slow down or hang, in virtual time: the cost to the others, and the results."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from outer_rig import EVERY, STEP_S, Diary, run_linked, spoil, spread
from torch import Tensor

from commopt.errors import ConfigError, GroupError
from commopt.groups import SimGroup, SimWorld
from commopt.plan.links import LinkModel
from commopt.wire.payload import Payload

METHODS = ["noloco", "diloco"]  # and local_sgd, which is a form of diloco, for what is quick
TIMEOUT_S = 4.0


def run(
    name: str, steps: int, faults: Sequence[Any] = (), *, ranks: int = 4, **options: Any
) -> tuple[SimWorld[Any], list[Diary]]:
    return run_linked(ranks, name, steps, faults, **{"timeout_s": TIMEOUT_S, **options})


@functools.cache
def undisturbed_run(name: str, steps: int, timeout_s: float = TIMEOUT_S, delay: int = 0) -> list[Diary]:
    """The diaries of ranks without faults."""
    return run(name, steps, timeout_s=timeout_s, delay=delay)[1]


@functools.cache
def parted_run(name: str) -> list[Diary]:
    """Two halves that do not hear of each other from step 20 to 60."""
    faults = [{"at_step": 20, "cut": [a, b], "for_s": 4.0} for a in (0, 1) for b in (2, 3)]
    return run(name, 110, faults, timeout_s=1.0)[1]


def check_ended(diary: Diary, steps: int, timeout_s: float = TIMEOUT_S) -> None:
    """It trained to the end, repeated no data step, and no round blocked it for longer than the timeout."""
    assert diary.attached.steps == steps
    assert diary.seen == sorted(set(diary.seen))
    assert max(report.blocked_s for report in diary.reports) <= timeout_s + 0.1
    assert bool(diary.after[steps].isfinite().all())


def missed(diary: Diary) -> int:
    return sum(report.missed for report in diary.reports)


@pytest.mark.parametrize(
    ("name", "dead", "delay"),
    [
        ("noloco", 0, 0),
        ("noloco", 0, 3),
        ("noloco", 2, 0),
        ("diloco", 0, 0),
        ("diloco", 2, 3),
    ],
)
def test_survivors_of_a_kill_train_to_the_end(name: str, dead: int, delay: int) -> None:
    world, diaries = run(name, 60, [{"at_step": 20, "kill": dead}], delay=delay)
    undisturbed = undisturbed_run(name, 60, delay=delay)
    alive = [rank for rank in range(4) if rank != dead]
    for rank in alive:
        check_ended(diaries[rank], 60)
        assert diaries[rank].seen == list(range(60))
        assert not any(dead in report.members for report in diaries[rank].reports if report.round > 4)
        assert diaries[rank].events("peer lost")[0]["rank"] == dead
        assert missed(undisturbed[rank]) == 0
    assert sum(missed(diaries[rank]) for rank in alive) > 2
    assert diaries[dead].seen == list(range(20))
    assert world.seconds < 60 * STEP_S + TIMEOUT_S  # one round waits until the death is known
    apart, apart_before = (spread([all[r].after[60] for r in alive]) for all in (diaries, undisturbed))
    assert apart < 2 * apart_before + 1e-6


@pytest.mark.parametrize("name", [*METHODS, "local_sgd"])
def test_the_last_member_goes_on_alone(name: str) -> None:
    world, diaries = run(name, 60, [{"at_step": 20 + rank, "kill": rank} for rank in (3, 0, 1)])
    check_ended(diaries[2], 60)
    assert diaries[2].reports[-1].members == [2]
    assert sorted(event["rank"] for event in diaries[2].events("peer lost")) == [0, 1, 3]
    assert world.seconds < 60 * STEP_S + TIMEOUT_S


def test_a_kill_of_several_ends_all_of_them() -> None:
    _, diaries = run("noloco", 40, [{"at_step": 12, "kill": [0, "node2"]}])
    assert [len(diary.seen) for diary in diaries] == [12, 40, 12, 40]


@pytest.mark.parametrize(("name", "dead"), [("noloco", 0), ("noloco", 3), ("diloco", 0)])
def test_who_is_started_again_takes_a_live_members_place(name: str, dead: int) -> None:
    faults = [{"at_step": 20, "kill": dead}, {"at_step": 48, "restart": dead}]
    _, diaries = run(name, 90, faults)
    back = diaries[dead]
    first, again = back.begun_at
    assert first == 0
    assert 48 <= again <= 50
    (caught_up,) = back.events("caught up")
    donor = diaries[caught_up["from"]]
    assert caught_up["step"] == again
    assert torch.equal(back.started[1], donor.after[again])  # its parameters when its next step began
    assert len(back.momentum[again]) == 6
    assert all(torch.equal(a, b) for a, b in zip(back.momentum[again], donor.momentum[again], strict=True))
    assert back.seen == [*range(20), *range(again, 90)]
    for diary in diaries:
        check_ended(diary, 90)
        assert diary.learning_rate[89] == pytest.approx(0.05 / (1 + 0.1 * 89))
        assert any(dead in report.members for report in diary.reports[-6:] if len(report.members) > 1)
    assert all(back.learning_rate[step] == donor.learning_rate[step] for step in range(again, 90))


def apart_at(diaries: list[Diary], step: int) -> float:
    return spread([diary.after[step] for diary in diaries])


@pytest.mark.parametrize("name", METHODS)
def test_both_halves_of_a_partition_train_and_come_together_again(name: str) -> None:
    diaries, undisturbed = parted_run(name), undisturbed_run(name, 110, timeout_s=1.0)
    for diary in diaries:
        check_ended(diary, 110, timeout_s=1.0)
        assert diary.seen == list(range(110))
        assert missed(diary) >= 2
    during = [set(report.members) for report in diaries[0].reports if 35 <= report.step <= 55]
    assert all(members <= {0, 1} for members in during)
    assert [0, 1] in [report.members for report in diaries[1].reports if 35 <= report.step <= 55]
    assert max(apart_at(diaries, step) for step in range(40, 60, 5)) > 1.5 * apart_at(undisturbed, 55)
    assert apart_at(diaries, 110) < 1.25 * apart_at(undisturbed, 110) + 1e-6
    assert all(len(report.members) > 1 for report in diaries[2].reports[-5:])


def test_after_a_partition_diloco_takes_the_mean_of_what_both_halves_have() -> None:
    states = [diary.attached.method.tensors() for diary in parted_run("diloco")]
    for key, x in states[0].items():
        assert all(torch.equal(x, state[key]) for state in states), key


@pytest.mark.parametrize(("name", "slow"), [("noloco", 0), ("noloco", 3), ("diloco", 3)])
def test_a_slow_member_ends_with_the_others(name: str, slow: int) -> None:
    world, diaries = run(name, 120, [{"at_step": 20, "slow": slow, "factor": 5.0, "for_s": 15.0}], timeout_s=1.0)
    for diary in diaries:
        check_ended(diary, 120, timeout_s=1.0)
    others = [diary for rank, diary in enumerate(diaries) if rank != slow]
    events = [*diaries[slow].events("went on with the others"), *diaries[slow].events("caught up")]
    assert events
    assert len(diaries[slow].seen) < 120
    assert all(event["left_out"] >= 3 * EVERY for event in events)
    assert sum(len(diary.seen) for diary in others) > 3 * 90
    assert world.seconds < 120 * 5 * STEP_S / 2
    for diary in diaries:
        rates = {step: 0.05 / (1 + 0.1 * step) for step in diary.seen}
        assert {step: diary.learning_rate[step] for step in diary.seen} == pytest.approx(rates)


@pytest.mark.parametrize("name", METHODS)
def test_a_member_that_hangs_costs_the_others_no_more_than_timeouts(name: str) -> None:
    world, diaries = run(name, 80, [{"at_step": 20, "hang": 1, "for_s": 3.0}], timeout_s=1.0)
    for rank, diary in enumerate(diaries):
        check_ended(diary, 80, timeout_s=1.0)
        assert rank == 1 or missed(diary) > 0 or name == "noloco"
    assert world.seconds < 80 * STEP_S + 3.0 + 3.0
    assert [report.members for report in diaries[1].reports if len(report.members) > 1 and report.step > 60]


@pytest.mark.parametrize("name", METHODS)
def test_a_replica_with_a_nan_takes_over_another_one_and_tells_nobody(name: str) -> None:
    _, diaries = run(name, 60, poison=spoil(1, 22))
    assert not diaries[1].after[23].isfinite().all()
    assert diaries[1].events("parameters not finite") == [{"step": 25}]
    assert diaries[1].events("caught up")[0]["from"] == 0
    for rank, diary in enumerate(diaries):
        bad = {step for step, x in diary.after.items() if not x.isfinite().all()}
        assert bad <= ({23, 24} if rank == 1 else set())  # step 24 was done again, as its donor was there
        assert diary.attached.steps == 60
    assert diaries[1].learning_rate[59] == pytest.approx(0.05 / (1 + 0.1 * 59))


@pytest.mark.parametrize("name", [*METHODS, "local_sgd"])
def test_a_nan_with_nobody_to_take_over_from_is_an_error(name: str) -> None:
    with pytest.raises(GroupError, match="rank 1: parameters that are not finite after step 35, and no peer to take"):
        run(name, 60, [{"at_step": 10, "kill": 0}], ranks=2, poison=spoil(1, 30, float("inf")))


@pytest.mark.parametrize("name", METHODS)
def test_a_world_with_faults_plays_the_same_way_twice(name: str) -> None:
    faults: list[dict[str, Any]] = [
        {"at_step": 8, "kill": 3},
        {"at_step": 12, "cut": [0, 1], "for_s": 2.0},
        {"at_step": 15, "slow": 2, "factor": 3.0, "for_s": 4.0},
        {"at_step": 30, "restart": 3},
        {"at_step": 40, "hang": 0, "for_s": 1.0},
    ]
    once, again = (run(name, 60, faults, timeout_s=1.0) for _ in range(2))
    assert once[0].clocks == again[0].clocks
    for a, b in zip(once[1], again[1], strict=True):
        assert a.seen == b.seen
        assert a.attached.events == b.attached.events
        assert a.reports == b.reports
        assert torch.equal(a.after[60], b.after[60])


# -- the faults themselves


def letters(group: SimGroup, peer: int, timeout_s: float) -> Tensor | None:
    letter = group.peers.receive(peer, "c", 0, timeout_s)
    return None if letter is None else letter.payload.tensors[0]


def test_a_cut_holds_back_what_goes_over_it_and_nothing_else() -> None:
    faults = [{"at_step": 1, "cut": [0, 1], "for_s": 5.0}]
    world: SimWorld[Any] = SimWorld(3, LinkModel.uniform(3, "8mbit"), faults=faults)

    def rank_of(group: SimGroup) -> float:
        group.peers.announce(1)
        if group.rank == 0:
            for peer in (1, 2):
                group.peers.send(peer, "c", 0, Payload.of(torch.zeros(250_000)))
            group.peers.sleep(20.0)
            return 0.0
        if group.rank == 1:
            assert letters(group, 0, 20.0) is None  # it is taken to be down
            assert group.seconds == pytest.approx(1.0)
            assert not group.peers.is_up(0)
            group.peers.sleep(4.5)
            assert group.peers.is_up(0)
        assert letters(group, 0, 20.0) is not None
        return group.seconds

    # 1 MB at 1 MB/s; the one for rank 1 goes when the cut ends
    assert world.run(rank_of) == pytest.approx([0.0, 6.0, 1.0])


def test_what_waits_at_a_cut_for_too_long_expires() -> None:
    world: SimWorld[Any] = SimWorld(2, faults=[{"at_step": 1, "cut": [0, 1], "for_s": 5.0}])

    def rank_of(group: SimGroup) -> bool:
        group.peers.announce(1)
        group.peers.sleep(0.5)  # so that the cut, which begins at rank 0's step, comes before what rank 1 sends
        group.peers.send(1 - group.rank, "c", 0, Payload.of(torch.zeros(1)), expires_s=4.0)
        group.peers.sleep(7.5)
        return letters(group, 1 - group.rank, 1.0) is None

    assert world.run(rank_of) == [True, True]
    assert world.seconds == 9.0


def test_arithmetic_takes_longer_while_a_member_is_slow() -> None:
    world: SimWorld[Any] = SimWorld(2, faults=[{"at_step": 2, "slow": [0, 1], "factor": 3.0, "for_s": 2.5}])

    def rank_of(group: SimGroup) -> list[float]:
        ends = []
        for step in range(1, 6):
            group.advance(1.0)
            ends.append(group.seconds)
            group.peers.announce(step)
        return ends

    assert world.run(rank_of) == [[1.0, 2.0, 5.0, 6.0, 7.0]] * 2


def test_a_fault_that_is_written_twice_happens_twice() -> None:
    def rank_of(group: SimGroup) -> float:
        group.peers.announce(1)
        return group.seconds

    assert SimWorld[Any](1, faults=[{"at_step": 1, "hang": 0, "for_s": 2.0}] * 2).run(rank_of) == [4.0]


def test_a_killed_rank_returns_nothing_and_one_that_is_started_again_does() -> None:
    faults = [{"at_step": 2, "kill": 1}, {"at_step": 6, "restart": 1}]

    def rank_of(group: SimGroup) -> float:
        for step in range(1, 3 if group.peers.returns else 9):
            group.advance(1.0)
            group.peers.announce(step)
        return group.seconds

    assert SimWorld[Any](2, faults=faults[:1]).run(rank_of) == [8.0, None]
    assert SimWorld[Any](2, faults=faults).run(rank_of) == [8.0, 8.0]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"at_step": 3}, "write at_step and one of kill, restart, add, cut, slow, hang"),
        ({"kill": 1}, "write at_step and one of"),
        ({"at_step": 3, "kill": 1, "hang": 1}, "write at_step and one of"),
        ({"at_step": 3, "kill": 4}, "faults: kill: 4 is not among 4 ranks"),
        ({"at_step": 3, "cut": ["node0", "node9"]}, "is not among 4 ranks"),
        ({"at_step": 3, "kill": "foo"}, "faults: kill: 'foo' is not among 4 ranks"),
        ({"at_step": 3, "kill": None}, "faults: kill: None is not among 4 ranks"),
        ({"at_step": "soon", "kill": 1}, "faults: {'at_step': 'soon', .*}: at_step, for_s and factor must be numbers"),
        ({"at_step": float("inf"), "kill": 1}, "must be numbers"),
        ({"at_step": 3, "hang": 1, "for_s": "10 s"}, "must be numbers"),
        ({"at_step": 3, "slow": 1, "factor": [2]}, "must be numbers"),
    ],
)
def test_a_fault_that_names_nothing_is_refused(fault: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SimWorld[Any](4, faults=[fault])
