"""What only simulated ranks have: a virtual clock, and an end when one of them fails."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from commopt.errors import GroupError
from commopt.groups import SimGroup, SimWorld
from commopt.plan.links import LinkModel
from commopt.wire.payload import Payload, cut


def test_the_virtual_clock_runs_by_the_link_model() -> None:
    world: SimWorld[float] = SimWorld(4, LinkModel.uniform(4, "8mbit", "10ms"))

    def train(group: SimGroup) -> float:
        group.all_reduce(torch.zeros(250_000))  # 1 MB: 1.5 MB out of each at 1 MB/s, and 6 rounds of 10 ms
        return group.seconds

    assert world.run(train) == pytest.approx([1.56] * 4)
    assert world.seconds == pytest.approx(1.56)


def test_an_exchange_starts_when_the_slowest_rank_joins() -> None:
    world: SimWorld[float] = SimWorld(3, LinkModel.uniform(3, delay="10ms"))

    def train(group: SimGroup) -> float:
        group.advance(2.0 * group.rank)
        group.all_gather(Payload.of(torch.zeros(1)))
        return group.seconds

    assert world.run(train) == pytest.approx([4.02] * 3)


def test_without_links_exchanges_are_free() -> None:
    world: SimWorld[None] = SimWorld(2)
    world.run(lambda group: group.barrier())
    assert world.seconds == 0.0


def test_a_failing_rank_releases_the_others_and_the_world_can_run_again() -> None:
    world: SimWorld[int] = SimWorld(3, timeout_s=60)

    def fail(group: SimGroup) -> int:
        if group.rank == 1:
            raise KeyError("rank 1 is broken")
        group.barrier()
        return 0

    def work(group: SimGroup) -> int:
        group.barrier()
        return group.rank

    start = time.monotonic()
    with pytest.raises(KeyError, match="rank 1 is broken"):
        world.run(fail)
    assert time.monotonic() - start < 30  # not the 60 s of a wait that nobody ends
    assert world.run(work) == [0, 1, 2]


def test_different_operations_at_once_are_an_error() -> None:
    def train(group: SimGroup) -> Any:
        x = torch.zeros(1)
        return group.all_reduce(x) if group.rank else group.broadcast(x)

    with pytest.raises(GroupError, match="different exchanges at the same time: all_reduce, broadcast"):
        SimWorld[Any](3, timeout_s=30).run(train)


@pytest.mark.parametrize(("timeout_s", "real_s"), [(60, 0.0), (0.1, 1.0)], ids=["ends", "computes for too long"])
def test_who_waits_for_a_rank_that_never_joins_is_told(timeout_s: float, real_s: float) -> None:
    def train(group: SimGroup) -> None:
        time.sleep(real_s if group.rank == 2 else 0.0)
        if group.rank < 2 or real_s:
            group.barrier()

    begin_s = time.monotonic()
    with pytest.raises(GroupError, match=rf"another rank failed, has ended, or did not join within {timeout_s} s"):
        SimWorld[None](3, timeout_s=timeout_s).run(train)
    assert time.monotonic() - begin_s < 30


def test_exchanges_of_256_ranks_are_worked_out_once_and_wake_each_rank_once() -> None:
    ranks, priced = 256, []

    class Priced(LinkModel):
        def seconds(self, sent: Sequence[Mapping[int, float]], message_rounds: int = 1) -> float:
            priced.append(message_rounds)
            return super().seconds(sent, message_rounds)

    def train(group: SimGroup) -> tuple[float, list[int], set[str], float]:
        x = torch.full((4,), float(group.rank))
        group.all_reduce(x)
        letters = (ranks * group.rank + torch.arange(ranks)).view(torch.uint8)  # to each rank one number
        received = group.all_to_all(cut(letters, [((torch.int64, 1),)] * ranks))
        gathered = group.all_gather(received[group.rank])
        return float(x[0]), [int(one.tensors[0]) for one in received[::51]], set(group.tell("alike")), len(gathered)

    world: SimWorld[Any] = SimWorld(ranks, Priced.uniform(ranks, delay="1ms"))
    for rank, one in enumerate(world.run(train)):
        assert one == (sum(range(ranks)), [ranks * sender + rank for sender in range(0, ranks, 51)], {"alike"}, ranks)
    assert priced == [2 * (ranks - 1), 1, ranks - 1]
    assert world.seconds == pytest.approx(1e-3 * sum(priced))
    assert world._turns <= 5 * ranks  # to begin, and once for each exchange


def test_turns_of_many_ranks_may_take_longer_than_the_timeout_together() -> None:
    def train(group: SimGroup) -> None:
        time.sleep(0.15)
        group.barrier()

    SimWorld[None](5, timeout_s=0.5).run(train)


@pytest.mark.parametrize("operation", ["all_reduce", "broadcast", "all_gather", "all_to_all"])
def test_tensors_that_do_not_fit_together_are_an_error(operation: str) -> None:
    def train(group: SimGroup) -> Any:
        x = torch.ones(1 + group.rank)  # (1,) on rank 0 would broadcast to (2,)
        if operation in ("all_reduce", "broadcast"):
            return getattr(group, operation)(x)
        return group.all_gather(Payload.of(x)) if operation == "all_gather" else group.all_to_all([Payload.of(x)] * 2)

    with pytest.raises(GroupError, match=operation):
        SimWorld[Any](2, timeout_s=30).run(train)


def test_a_world_refuses_a_model_of_another_size() -> None:
    with pytest.raises(ValueError, match="describes 3 ranks, the world has 2"):
        SimWorld[None](2, LinkModel.uniform(3))
    with pytest.raises(ValueError, match="at least 1 rank"):
        SimWorld[None](0)
