"""Push-sum against its equations in float64, and where the mass is when messages come late or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from outer_rig import Played, after_round, bound, play, start_values
from torch import Tensor

from commopt.gossip.topology import directed_exponential
from commopt.groups import SimGroup, SimWorld
from commopt.wire.payload import Payload


def reference(played: list[list[Played]]) -> list[tuple[Tensor, Tensor]]:
    """(z, w) after each round, f64; z between rounds as the inner steps left it (Algorithm 1, arXiv:1811.10792).

    x_i <- sum_j p_ij x_j;  w_i <- sum_j p_ij w_j;  z_i = x_i / w_i;  p_ij = 1/2 for i itself and the rank that sends to it
    """
    ranks = len(played)
    w = torch.ones(ranks, dtype=torch.float64)
    history = []
    for t in range(len(played[0])):
        p = torch.eye(ranks, dtype=torch.float64) / 2
        for j in range(ranks):
            p[directed_exponential(ranks, t, j), j] += 0.5
        x = torch.stack([one[t].x.double() for one in played]) * w[:, None]
        x, w = p @ x, p @ w
        history.append((x / w[:, None], w))
    return history


@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
def test_rounds_are_those_of_the_paper(ranks: int) -> None:
    played = play(ranks, "push_sum", {}, 12)
    for t, (z, w) in enumerate(reference(played)):
        assert torch.equal(w, torch.ones(ranks, dtype=torch.float64))
        for rank in range(ranks):
            torch.testing.assert_close(played[rank][t].new.double(), z[rank], rtol=0, atol=1e-6)
            source = next(j for j in range(ranks) if directed_exponential(ranks, t, j) == rank)
            assert played[rank][t].members == tuple(sorted((rank, source)))


def gossip(group: SimGroup, rounds: int, weight: float = 1.0, **options: Any) -> tuple[Tensor, list[float], Any]:
    """A replica that does not learn: z after rounds of a virtual second each, w after each of them, and the method."""
    method = bound("push_sum", group, 74, **options)
    method.begin(torch.zeros(74))
    method.state["weight"].fill_(weight)
    z, weights = start_values(74) * (group.rank + 1), list[float]()
    for number in range(rounds):
        group.peers.announce(number)
        group.advance(1.0)
        z, _ = after_round(method, z, number)
        weights.append(float(method.state["weight"]))
    return z, weights, method


@pytest.mark.parametrize(("ranks", "rounds"), [(3, 80), (5, 80), (8, 3)])
@pytest.mark.parametrize("step", [0.0, 1.0])
def test_replicas_that_do_not_learn_reach_their_weighted_mean(ranks: int, rounds: int, step: float) -> None:
    """Eight ranks after three rounds, exactly."""
    start = [1.0 + step * (rank - 0.5) for rank in range(ranks)]
    results = SimWorld[Any](ranks).run(lambda group: gossip(group, rounds, weight=start[group.rank]))
    mean = sum(w * (rank + 1) for rank, w in enumerate(start)) / sum(start)
    for z, weights, _ in results:
        torch.testing.assert_close(z, start_values(74) * mean, rtol=1e-5, atol=1e-5)
        assert step or set(weights) == {1.0}
    for number in range(rounds):
        assert sum(weights[number] for _, weights, _ in results) == pytest.approx(sum(start), rel=1e-12)


def test_what_comes_late_is_added_when_it_comes() -> None:
    """A rank hangs for longer than the others wait: weights differ, and still sum to N with what nobody has read yet."""

    def rank_of(group: SimGroup) -> tuple[Tensor, list[float], float, Tensor]:
        z, weights, method = gossip(group, 30, timeout_s=1.5)
        group.peers.sleep(100.0)
        total, mass = weights[-1], z.double() * weights[-1]
        for _, letter in [*method.early, *group.peers.drain("push_sum")]:
            share, theirs = letter.payload.tensors
            total += float(share)
            mass += theirs.double() * float(share)
        return z, weights, total, mass

    results = SimWorld[Any](4, faults=[{"at_step": 8, "hang": 1, "for_s": 4.0}]).run(rank_of)
    assert min(min(weights) for _, weights, _, _ in results) < 0.8
    assert max(max(weights) for _, weights, _, _ in results) > 1.2
    assert sum(total for _, _, total, _ in results) == pytest.approx(4.0, rel=1e-12)
    mass = sum(mass for *_, mass in results)
    torch.testing.assert_close(mass.float(), start_values(74) * 10, rtol=1e-5, atol=1e-4)
    for z, *_ in results:
        torch.testing.assert_close(z, start_values(74) * 2.5, rtol=1e-3, atol=1e-3)


def test_a_round_before_its_time_waits_for_it() -> None:
    """Rank 0 is a round ahead of rank 1, whose result does not depend on that."""

    def rank_of(group: SimGroup) -> Tensor:
        method = bound("push_sum", group, 3)
        z = torch.full((3,), float(group.rank))
        if group.rank == 1:
            group.peers.sleep(5.0)
        z, _ = after_round(method, z, 0)
        if group.rank == 0:
            method.exchange(z, method.round_after(2))
        return z

    assert [z.tolist() for z in SimWorld[Tensor](2).run(rank_of)] == [[0.5] * 3, [0.5] * 3]


def test_a_rank_that_is_down_is_sent_nothing() -> None:
    world = SimWorld[Any](2, faults=[{"at_step": 5, "kill": 1}])
    survivor, gone = world.run(lambda group: (*gossip(group, 20, timeout_s=1.0), group.traffic.payload_bytes))
    assert gone is None
    _, weights, _, sent = survivor
    assert 5 * (4 * 74 + 8) <= sent <= 7 * (4 * 74 + 8)  # a round or two until it is known
    assert weights[-1] == weights[8] >= 0.25


def test_a_rank_that_nothing_reaches_keeps_some_weight() -> None:
    """Its peer is up and never answers: each message takes half of the weight along."""

    def rank_of(group: SimGroup) -> list[float]:
        if group.rank == 1:
            group.peers.sleep(1000.0)
            return []
        return gossip(group, 40, timeout_s=1.0)[1]

    weights = SimWorld[list[float]](2).run(rank_of)[0]
    assert weights[:3] == [0.5, 0.25, 0.125]
    assert weights[-1] == weights[-20] == 2.0**-10


@pytest.mark.parametrize("payload", ["nan", "size", "weight"])
def test_a_message_that_is_spoilt_is_not_added(payload: str) -> None:
    spoilt = {
        "nan": (torch.ones(1, dtype=torch.float64), torch.full((3,), float("nan"))),
        "size": (torch.ones(1, dtype=torch.float64), torch.ones(4)),
        "weight": (torch.tensor([-1.0], dtype=torch.float64), torch.ones(3)),
    }[payload]

    def rank_of(group: SimGroup) -> Tensor | None:
        method = bound("push_sum", group, 3, timeout_s=1.0)
        if group.rank == 1:
            group.peers.send(0, "push_sum", 0, Payload.of(*spoilt))
            return None
        new, exchanged = after_round(method, torch.zeros(3), 0)
        assert exchanged.is_missed
        return new

    assert SimWorld[Any](2).run(rank_of)[0].tolist() == [0.0, 0.0, 0.0]
