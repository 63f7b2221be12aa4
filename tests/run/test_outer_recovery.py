"""Ranks that got ahead, fell behind, diverged or came back: whose state they take over, and how long they wait for it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from outer_rig import EVERY, STEP_S, Diary, play, run_linked, spoil, train_diary
from rig import make_model, sgd_of

from commopt import Run, attach
from commopt.errors import GroupError
from commopt.groups import SimGroup, SimWorld
from commopt.groups.peers import call_roll
from commopt.run.agree import digest

TIMEOUT_S = 1.0
RANDOM_K = {"compressor": "random_k", "density": 0.1}


def run(
    ranks: int, steps: int, faults: list[dict[str, Any]] | None = None, *, name: str = "diloco", **options: Any
) -> tuple[SimWorld[Any], list[Diary]]:
    return run_linked(ranks, name, steps, faults or (), **{"timeout_s": TIMEOUT_S, **options})


def cut_off(rank: int, at_step: int, for_s: float) -> list[dict[str, Any]]:
    """Faults that part the last of three ranks from the others."""
    return [{"at_step": at_step, "cut": [other, rank], "for_s": for_s} for other in range(3) if other != rank]


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_the_final_average_leaves_out_a_replica_with_a_nan(bad: int) -> None:
    _, diaries = run(3, 12, name="noloco", final_average=True, poison=spoil(bad, 11))  # the last round was after 10
    good = [rank for rank in range(3) if rank != bad]
    mean = torch.stack([diaries[rank].after[12] for rank in good]).mean(0)
    for rank in good:
        torch.testing.assert_close(diaries[rank].attached.flat(), mean)
        assert diaries[rank].events("final average") == [{"ranks": good, "step": 12}]
    assert diaries[bad].events("parameters not finite") == [{"step": 12}]


# -- rounds of some, and roundabout ways


def test_those_drawn_for_a_round_of_random_places_hold_the_same_bits_after_it() -> None:
    played = play(4, "diloco", {"participation": 0.5, "message": RANDOM_K}, 20)
    for t in range(20):
        together = [rank[t].new for rank in played if len(rank[t].members) == 2]
        assert torch.equal(*together)


def test_who_missed_a_round_of_random_places_holds_the_same_bits_after_the_next() -> None:
    _, diaries = run(3, 40, cut_off(2, at_step=10, for_s=1.5), message=RANDOM_K)
    rounds = [[report.members for report in diary.reports] for diary in diaries]
    assert [2] in rounds[2]
    together = [EVERY * (k + 1) for k, members in enumerate(rounds[0]) if members == [0, 1, 2]]
    assert [step for step in together if step > 20]
    for step in together:
        assert all(torch.equal(diary.after[step], diaries[0].after[step]) for diary in diaries)


def test_who_cannot_reach_the_convener_goes_on_alone_at_once() -> None:
    _, diaries = run(3, 40, [{"at_step": 10, "cut": [0, 2]}])
    later = [[report for report in diary.reports if report.step > 10] for diary in diaries]
    assert [report.members for report in later[1]] == [[0, 1]] * 6
    assert [report.members for report in later[2]] == [[2]] * 6
    assert max(report.blocked_s for reports in later for report in reports[2:]) < TIMEOUT_S / 4
    # until the cut is known, and they are in step
    assert max(report.blocked_s for reports in later for report in reports) <= TIMEOUT_S / 2


# -- ranks that are ahead or behind


@pytest.mark.parametrize("name", ["diloco", "local_sgd"])
def test_two_that_fell_behind_a_third_keep_what_they_have_and_average_it_in_the_next_round(name: str) -> None:
    slow = {"at_step": 10, "slow": [0, 1], "factor": 3.0, "for_s": 6.0}
    _, diaries = run(3, 100, [*cut_off(2, at_step=10, for_s=6.0), slow], name=name)
    for diary in diaries[:2]:
        (event,) = diary.events("went on with the others")
        assert event["from"] == 2
        assert event["left_out"] >= 3 * EVERY
        assert not diary.events("caught up")
        own = diary.before[event["step"] - event["left_out"]]
        assert torch.equal(diary.after[event["step"]], own)
    report = next(report for report in diaries[2].reports if report.step > 20 and report.members == [0, 1, 2])
    after = [diary.after[report.step] for diary in diaries]
    assert all(torch.equal(x, after[0]) for x in after)
    if name == "local_sgd":  # it takes the mean of all three, and of none of them what it alone had before
        torch.testing.assert_close(after[0], torch.stack([diary.before[report.step] for diary in diaries]).mean(0))


def test_one_that_fell_behind_three_adopts_what_they_share_in_the_next_round() -> None:
    _, diaries = run(4, 120, [{"at_step": 10, "slow": 3, "factor": 5.0, "for_s": 3.0}])
    event = diaries[3].events("went on with the others")[0]
    assert not diaries[3].events("caught up")
    assert max(report.blocked_s for report in diaries[3].reports) <= TIMEOUT_S
    report = next(one for one in diaries[3].reports if one.step > event["step"] and one.members == [0, 1, 2, 3])
    after = [diary.after[report.step] for diary in diaries]
    assert all(torch.equal(x, after[0]) for x in after)


def test_a_rank_that_asks_one_that_has_done_its_last_step_gives_up_when_that_one_ends() -> None:
    diaries, poison = [Diary(), Diary()], spoil(1, 9)
    world: SimWorld[Any] = SimWorld(2)

    def train(group: SimGroup) -> None:
        options = {"every": EVERY, "timeout_s": TIMEOUT_S}
        spoiled = functools.partial(poison, group.rank)
        train_diary(group, diaries[group.rank], "diloco", options, 10, step_s=STEP_S, poison=spoiled)
        group.peers.sleep(100.0)  # still up, as a rank that evaluates or saves

    with pytest.raises(GroupError, match="not finite after step 10, and no peer to take others over from"):
        world.run(train)
    assert world.clocks[1] < 10 * STEP_S + 2 * TIMEOUT_S + 2.0


def test_two_that_are_behind_ask_those_ahead_only_and_go_on_when_these_end() -> None:
    diaries = [Diary(), Diary()]

    def train(group: SimGroup) -> None:
        options = {"every": EVERY, "timeout_s": TIMEOUT_S}
        if group.rank < 2:
            train_diary(group, diaries[group.rank], "diloco", options, 20, step_s=STEP_S)
            return
        diloco(group, timeout_s=TIMEOUT_S, momentum=0.9).join()  # as in train_diary
        group.peers.announce(100)  # and is busy with what follows its last step
        group.peers.sleep(3.0)
        group.peers.announce(100, is_training=False)

    world: SimWorld[Any] = SimWorld(4)
    world.run(train)
    for diary in diaries:
        assert diary.seen == list(range(20))
        assert diary.attached.peers.traffic.calls["diloco", "ask", ""] <= 2
        assert not diary.events("helped to catch up")
    assert world.seconds < 10.0


# -- starting again


def diloco(group: SimGroup, momentum: float = 0.0, **options: Any) -> Run:
    model = make_model()
    method = {"name": "diloco", "every": EVERY, **options}
    return attach(model, method, sgd_of(model, momentum=momentum), group=group)


def resume(group: SimGroup, steps: int, wait_s: float) -> tuple[int, float]:
    """Start as if a checkpoint of that step had been loaded; the step that training continues from, and the seconds it took."""
    run = diloco(group)
    run.steps = steps
    return run.join(wait_s=wait_s), group.seconds


def test_ranks_that_all_came_back_with_a_checkpoint_start_together() -> None:
    def train(group: SimGroup) -> tuple[int, float]:
        group.peers.returns = True  # as COMMOPT_RETURNS says
        return resume(group, 10, wait_s=5.0)

    assert all(start == 10 and seconds < 1.0 for start, seconds in SimWorld[tuple[int, float]](3).run(train))


def test_a_rank_that_resumes_behind_one_that_dies_before_it_trains_does_not_wait_for_ever() -> None:
    def train(group: SimGroup) -> None:
        if group.rank == 2:
            group.peers.announce(20, is_training=False)
            run: Any = diloco(group)
            words = torch.frombuffer(bytearray(digest(run.configuration)), dtype=torch.int64)
            call_roll(group.peers, "start", 0, torch.cat([torch.tensor([20]), words]), 5.0)
        else:
            resume(group, 10, wait_s=5.0)

    world: SimWorld[Any] = SimWorld(3)
    with pytest.raises(GroupError, match="resumes at step 10, others said 20, and none of those trains"):
        world.run(train)
    assert world.seconds < 70.0
