"""CHOCO against its paper in float64, consensus under coarse messages, and pairs that lose a message."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from outer_rig import Played, after_round, bound, play, run_world, spread, start_values
from rig import normal
from torch import Tensor

from commopt.groups import SimGroup, SimWorld
from commopt.methods.choco import mean_mixing
from commopt.plan.links import LinkModel

SHAPE = {"a": (40, 10)}
TOP_K = {"compressor": "top_k", "density": 0.1}
MESSAGES: list[Any] = ["4bit", "int8", "sign", "2bit", "qsgd", "ternary", TOP_K]
MESSAGES += [{"compressor": "random_k", "density": 0.2}]


def sign(x: Tensor) -> Tensor:
    return torch.where(x >= 0, x.abs().mean(), -x.abs().mean())


def top_k(x: Tensor) -> Tensor:
    kept = x.abs().topk(len(x) // 10).indices
    return torch.zeros_like(x).scatter_(0, kept, x[kept])


def reference(played: list[list[Played]], w: Tensor, gamma: float, compress: Any) -> list[Tensor]:
    """(ranks, P) f64 after each round; x_i(t + 1/2) as the inner steps left it (Algorithm 2, arXiv:1902.00340).

    q_i = C(x_i - x^_i);  x^_i <- x^_i + q_i;  x_i <- x_i + gamma sum_j w_ij (x^_j - x^_i)
    """
    ranks, elements = len(played), len(played[0][0].x)
    public = start_values(elements).double().repeat(ranks, 1)
    history = []
    for t in range(len(played[0])):
        x = torch.stack([one[t].x for one in played]).double()
        public = public + torch.stack([compress(x[i] - public[i]) for i in range(ranks)])
        history.append(x + gamma * (w @ public - public))
    return history


@pytest.mark.parametrize(("message", "compress"), [("sign", sign), ({**TOP_K, "value_bits": 32}, top_k)])
@pytest.mark.parametrize(("topology", "ranks"), [("ring", 4), ("ring", 5), ("complete", 4), ("one_peer_exp", 8)])
def test_rounds_are_those_of_the_paper(message: Any, compress: Any, topology: str, ranks: int) -> None:
    options = {"message": message, "topology": topology, "gamma": 0.2}
    played = play(ranks, "choco", options, 12, SHAPE)
    w = torch.from_numpy(mean_mixing(topology, ranks))
    for t, expected in enumerate(reference(played, w, 0.2, compress)):
        for rank in range(ranks):
            torch.testing.assert_close(played[rank][t].new.double(), expected[rank], rtol=0, atol=1e-5)


def test_the_ring_gives_each_neighbour_a_quarter() -> None:
    assert mean_mixing("ring", 4)[0].tolist() == [0.5, 0.25, 0.0, 0.25]
    assert mean_mixing("complete", 4)[0].tolist() == [0.25] * 4


def gossip(group: SimGroup, options: dict[str, Any], rounds: int, name: str = "choco") -> tuple[list[Tensor], Any]:
    """A replica that does not learn, before and after each round, and its method."""
    method = bound(name, group, 400, **options)
    method.begin(torch.zeros(400))
    x = normal(400, group.rank)
    history = [x]
    for number in range(rounds):
        x = after_round(method, x, number)[0].clone()
        history.append(x)
    return history, method


def distances(ranks: int, options: dict[str, Any], rounds: int) -> list[float]:
    """Root mean square distance of the replicas from their mean, after each round."""
    results = SimWorld[tuple[list[Tensor], Any]](ranks).run(lambda group: gossip(group, options, rounds))
    stacked = torch.stack([torch.stack(history) for history, _ in results]).double()  # (ranks, rounds + 1, P)
    means = stacked.mean(0)
    torch.testing.assert_close(means, means[0].expand_as(means), rtol=0, atol=2e-5)  # each round keeps the mean
    check_copies_agree([method for _, method in results])
    return [float(d) for d in (stacked - means).square().mean(dim=(0, 2)).sqrt()]


def test_a_tenth_of_the_entries_reaches_consensus_on_a_ring_linearly() -> None:
    distance = distances(4, {"message": {**TOP_K, "value_bits": 32}}, 90)
    assert distance[30] < 0.3 * distance[0]
    assert distance[60] < 0.5 * distance[30]
    assert distance[90] < 0.5 * distance[60]


def test_signs_reach_consensus_on_a_ring() -> None:
    distance = distances(4, {"message": {"compressor": "sign", "block_size": 64}}, 220)
    average = [sum(distance[k : k + 20]) / 20 for k in (20, 80, 140, 200)]  # signs make single rounds uneven
    assert average[0] < 0.8 * distance[0]
    assert all(later < 0.5 * earlier for earlier, later in itertools.pairwise(average)), average


@pytest.mark.parametrize(
    ("message", "topology", "ranks"),
    [*((message, "ring", 5) for message in MESSAGES), *((message, "complete", 4) for message in MESSAGES[2:7:2])],
    ids=str,
)
def test_the_default_step_size_lets_every_compressor_converge(message: Any, topology: str, ranks: int) -> None:
    distance = distances(ranks, {"message": message, "topology": topology}, 40)
    assert distance[-1] < 0.5 * distance[0]
    assert max(distance) < 1.2 * distance[0]


def check_copies_agree(methods: list[Any]) -> None:
    for rank, method in enumerate(methods):
        for peer, pair in method.copies.pairs.items():
            other = methods[peer].copies.pairs[rank]
            assert torch.equal(pair.mine, other.theirs)
            assert pair.marks[0] == other.marks[1]
            assert pair.mine.abs().sum() > 0


def with_losses(faults: list[dict[str, Any]], rounds: int, *, late: int = -1) -> list[list[Any]]:
    """Rounds of a ring of 4 every virtual second: methods, members of each round, full messages sent; by rank."""

    def rank_of(group: SimGroup) -> tuple[Any, list[tuple[int, ...]], int]:
        method = bound("choco", group, 4000, timeout_s=2.0)
        method.begin(torch.zeros(4000))
        x = normal(4000, group.rank)
        members, full, before = [], 0, 0.0
        for number in range(rounds):
            group.peers.announce(number)
            group.advance(1.0 if (group.rank, number) != (0, late) else 5.0)
            new, exchanged = after_round(method, x, number)
            x = new.clone()
            members.append(exchanged.members)
            full += int((group.traffic.payload_bytes - before) // 16000)
            before = group.traffic.payload_bytes
        return method, members, full

    results = SimWorld[Any](4, LinkModel.uniform(4, "1gbit", "1ms"), faults=faults).run(rank_of)
    return [list(part) for part in zip(*results, strict=True)]


def test_a_pair_that_lost_messages_starts_again_from_full_ones() -> None:
    methods, members, full = with_losses([{"at_step": 5, "cut": [0, 1], "for_s": 12}], 24)
    assert full == [1, 1, 0, 0]  # the other pairs noticed nothing
    assert sum(1 not in one for one in members[0]) in range(4, 12)
    assert all(one == (0, 1, 3) for one in members[0][-6:])
    assert all(3 in one for one in members[0])
    check_copies_agree(methods)


def test_without_a_loss_nothing_travels_in_full_though_messages_are_late() -> None:
    methods, members, full = with_losses([], 16, late=6)
    assert full == [0, 0, 0, 0]
    assert all(len(one) == 3 for rank in members for one in rank[:6])
    assert any(0 not in one for one in members[1])  # rank 0 was missed
    assert all(one == (0, 1, 2) for one in members[1][-4:])
    check_copies_agree(methods)


def test_a_rank_that_came_back_is_taken_in_again() -> None:
    faults = [{"at_step": 15, "kill": 2}, {"at_step": 30, "restart": 2}]
    _, diaries = run_world(4, "choco", {"timeout_s": 2.0}, 80, faults=faults, step_s=0.5)
    for rank in (1, 2, 3):
        assert diaries[rank].attached.steps == 80
    assert diaries[1].reports[-1].members == [0, 1, 2]
    check_copies_agree([diary.attached.method for diary in diaries])
    assert spread([diary.attached.flat() for diary in diaries]) < 0.1


def test_a_message_that_does_not_fit_is_answered_in_full_once() -> None:
    def rank_of(group: SimGroup) -> tuple[list[int], list[bool]]:
        history, method = gossip(group, {"topology": "complete"}, 0)
        x, sizes, is_full, before = history[0], list[int](), list[bool](), 0.0
        for number in range(7):
            if (group.rank, number) == (1, 2):
                method.copies.pairs[0].marks[0] += 1  # as if a message had been lost
            x, exchanged = after_round(method, x, number)
            sizes.append(len(exchanged.members))
            is_full.append(group.traffic.payload_bytes - before > 4 * len(x))
            before = group.traffic.payload_bytes
        return sizes, is_full

    lost, (never, full) = SimWorld[tuple[list[int], list[bool]]](2).run(rank_of)
    assert lost == ([2, 2, 1, 1, 2, 2, 2], [False] * 7)
    assert never == [2] * 7
    assert full == [False] * 4 + [True] + [False] * 2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("choco", {}),
        ("choco", {"message": {"compressor": "random_k", "density": 0.2}}),
        ("decentralized_adam", {"message": "int8", "topology": "ring"}),
    ],
)
def test_resumed_ranks_go_on_bit_for_bit(name: str, options: dict[str, Any]) -> None:
    whole = SimWorld[Any](4).run(lambda group: gossip(group, options, 6, name=name)[0][-1])

    def resumed(group: SimGroup) -> Tensor:
        history, first = gossip(group, options, 3, name=name)
        second = bound(name, group, 400, **options)
        second.begin(torch.ones(400))
        second.load(first.saved())
        x = history[-1]
        for number in (3, 4, 5):
            x, _ = after_round(second, x, number)
        return x

    for one, other in zip(SimWorld[Tensor](4).run(resumed), whole, strict=True):
        assert torch.equal(one, other)
