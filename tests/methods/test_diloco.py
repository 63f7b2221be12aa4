"""DiLoCo and local SGD against torch's own outer optimizer in float64, and replicas that stay equal to the last bit."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from allocations import Allocations
from outer_rig import SHAPES, drift, parameters, play, run_world, start_values, thetas_of
from rig import make_model, train_step
from torch import Tensor

from commopt import attach, build
from commopt.errors import ConfigError, GroupError
from commopt.groups import PeerGroup, SimGroup, SimWorld
from commopt.groups.peers import Peers, Roll
from commopt.methods import METHODS
from commopt.methods.diloco import OUTER

MESSAGES: list[Any] = [None, "int8", "sign", "4bit", {"compressor": "top_k", "density": 0.2}]


def reference(thetas: list[list[Tensor]], start: Tensor, outer: Any) -> list[Tensor]:
    """phi after each round: OuterOpt on the mean of phi - theta_i, Algorithm 1; thetas[t][i] as rank i has them in round t."""
    phi = torch.nn.Parameter(start.double().clone())
    rule = outer([phi])
    history = []
    for theta in thetas:
        phi.grad = sum((phi.detach() - x.double() for x in theta), torch.zeros_like(phi)) / len(theta)
        rule.step()
        history.append(phi.detach().clone())
    return history


def sgd(lr: float, momentum: float, nesterov: bool = False) -> Any:
    return partial(torch.optim.SGD, lr=lr, momentum=momentum, nesterov=nesterov)


@pytest.mark.parametrize(
    ("options", "outer"),
    [
        ({}, sgd(0.7, 0.9, True)),
        ({"outer": "nesterov", "lr": 0.4, "momentum": 0.6}, sgd(0.4, 0.6, True)),
        ({"outer": {"name": "sgd", "momentum": 0.5}}, sgd(0.7, 0.5)),
        ({"outer": "sgd"}, sgd(0.7, 0.0)),
        ({"outer": {"name": "sgd", "lr": 1.0}, "momentum": 0.3}, sgd(1.0, 0.3)),
        *(
            ({"outer": {"name": name, "lr": 0.05}}, partial(OUTER[name][0], lr=0.05))
            for name in ("adagrad", "adam", "yogi")
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_outer_step_is_that_of_the_outer_optimizer(ranks: int, options: dict[str, Any], outer: Any) -> None:
    played = play(ranks, "diloco", options, 24)
    expected = reference(thetas_of(played), start_values(74), outer)
    tolerance = 2e-5 if outer.func is torch.optim.SGD else 1e-4
    for rank in played:
        for t, one in enumerate(rank):
            torch.testing.assert_close(one.new.double(), expected[t], rtol=tolerance, atol=tolerance)


def test_fragments_take_turns_and_each_has_its_own_momentum() -> None:
    played = play(3, "diloco", {"every": 6, "fragments": 3}, 30)
    start = start_values(74)
    sizes = [len(one.new) for one in played[0][:3]]
    assert sum(sizes) == 74
    edges = [0, sizes[0], sizes[0] + sizes[1], 74]
    starts_of_parameters = torch.tensor([0] + [torch.Size(shape).numel() for shape in SHAPES.values()]).cumsum(0)
    assert set(edges) <= set(starts_of_parameters.tolist())
    for k in range(3):
        part = slice(edges[k], edges[k + 1])
        mine = [[rank[t].x[part] for rank in played] for t in range(k, 30, 3)]
        for t, phi in enumerate(reference(mine, start[part], sgd(0.7, 0.9, True))):
            torch.testing.assert_close(played[1][3 * t + k].new.double(), phi, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "options"), [("noloco", {}), ("diloco", {}), ("diloco", {"fragments": 2}), ("push_sum", {})], ids=str
)
@pytest.mark.parametrize("delay", [1, 4])
def test_what_inner_steps_add_during_the_exchange_is_kept(
    delay: int, name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    every, steps, fragments, applied = 4, 20, options.get("fragments", 1), dict[tuple[int, int], Any]()
    kind: Any = METHODS[name]
    apply = kind.apply

    def noted(method: Any, x: Tensor, round: Any, exchanged: Any) -> Tensor:
        given, new = x.clone(), apply(method, x, round, exchanged)
        applied[method.peers.rank, round.number] = given, new.clone(), round.part
        return new  # type: ignore[no-any-return]

    monkeypatch.setattr(kind, "apply", noted)
    _, diaries = run_world(4, name, {"every": every, "delay": delay, **options}, steps)
    for (rank, number), (x, new, part) in applied.items():
        begun = number // fragments * every + (number % fragments + 1) * every // fragments
        diary, end = diaries[rank], begun + delay
        # a copy is taken after the step, and after what an earlier round brings at the same time
        assert torch.equal(x, diary.after[begun][part])
        if end <= steps:
            expected = new + diary.before[end][part] - x
            torch.testing.assert_close(diary.after[end][part], expected, rtol=2e-5, atol=2e-5)
    assert len(applied) >= 4 * (steps // every - 1)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_local_sgd_is_plain_averaging(ranks: int) -> None:
    played = play(ranks, "local_sgd", {}, 20)
    for t, theta in enumerate(thetas_of(played)):
        mean = torch.stack(theta).double().mean(0)
        for rank in played:
            torch.testing.assert_close(rank[t].new.double(), mean, rtol=2e-6, atol=2e-6)


def test_local_sgd_averages_the_state_of_the_inner_optimizer_that_is_named() -> None:
    def train(group: SimGroup) -> tuple[list[Tensor], list[Tensor]]:
        model = make_model()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        method = build("local_sgd", every=3, average_state=["exp_avg_sq"])
        for step in attach(model, method, optimizer, group=group).range(6):
            train_step(model, optimizer, group.rank, step)
        states = optimizer.state.values()
        return [s["exp_avg_sq"].clone() for s in states], [s["exp_avg"].clone() for s in states]

    first, second = SimWorld[tuple[list[Tensor], list[Tensor]]](2).run(train)
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize(("name", "message"), [("local_sgd", None), *(("diloco", code) for code in MESSAGES)], ids=str)
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_replicas_are_bit_identical_after_every_round(name: str, ranks: int, message: Any) -> None:
    played = play(ranks, name, {"message": message}, 8)
    for t in range(8):
        assert all(torch.equal(rank[t].new, played[0][t].new) for rank in played)
        assert all(rank[t].members == tuple(range(ranks)) for rank in played)


@pytest.mark.parametrize("message", ["int8", "4bit"])
def test_a_compressed_mean_stays_near_the_exact_one(message: str) -> None:
    exact, compressed = play(4, "diloco", {}, 20)[0][-1].new, play(4, "diloco", {"message": message}, 20)[0][-1].new
    assert float((exact - compressed).norm() / exact.norm()) < 0.05
    assert not torch.equal(exact, compressed)


def test_participants_are_drawn_alike_each_in_turn_and_the_others_keep_their_own_parameters() -> None:
    played, drawn = play(4, "diloco", {"participation": 0.5}, 40), Counter[int]()
    for t in range(40):
        (together,) = {one[t].members for one in played if len(one[t].members) == 2}
        assert all(one[t].members == (together if i in together else (i,)) for i, one in enumerate(played))
        drawn.update(together)
        a, b = together
        assert torch.equal(played[a][t].new, played[b][t].new)  # also if one of them sat out the last round
        assert all(torch.equal(one[t].new, one[t].x) for i, one in enumerate(played) if i not in together)
    assert sorted(drawn) == [0, 1, 2, 3]
    assert min(drawn.values()) > 10


def test_more_fragments_than_parameters_are_refused() -> None:
    with pytest.raises(ConfigError, match="fragments: 5 are too many for a model of 4 parameters"):
        play(2, "diloco", {"every": 5, "fragments": 5}, 1)


@pytest.mark.parametrize(("delay", "copies"), [(0, []), (1, [4 * 5670])])
def test_a_round_copies_nothing_if_the_inner_steps_wait_for_it(delay: int, copies: list[int]) -> None:
    def train(group: SimGroup) -> list[int]:
        method: Any = build("diloco", every=1, delay=delay)
        method.bind(parameters({"a": (80, 70), "b": (70,)}), group.peers)
        method.begin(start_values(5670))
        x = start_values(5670) + group.rank
        with Allocations() as made:
            exchanged = method.exchange(x, method.round_after(1))
        torch.testing.assert_close(exchanged.values["delta"], torch.full((5670,), -0.5))
        with made:
            method.apply(x, method.round_after(1), exchanged)
        return [nbytes for nbytes in made.nbytes if nbytes >= x.nbytes]

    assert SimWorld[list[int]](2).run(train) == [copies] * 2


@pytest.mark.parametrize("message", [None, "int8"])
def test_a_fragment_that_is_part_of_a_larger_copy_is_exchanged_alike(message: Any) -> None:
    def train(group: SimGroup, is_part: bool) -> Tensor:
        method: Any = build("diloco", every=2, fragments=2, message=message)
        method.bind(parameters({"a": (80, 70), "b": (80, 70)}), group.peers)
        method.begin(start_values(11200))
        theta, round = start_values(11200) + drift(group.rank, 1, 11200), method.round_after(2)
        x = theta[round.part]
        return torch.cat(
            [method.exchange(x if is_part else x.clone(), round).values["delta"], theta[: round.part.start]]
        )

    for part, whole in zip(
        *(SimWorld[Tensor](2).run(partial(train, is_part=is_part)) for is_part in (True, False)), strict=True
    ):
        assert torch.equal(part, whole)


@pytest.mark.parametrize("delay", [0, 2])
def test_a_round_that_fails_halfway_is_an_outer_step_alone(monkeypatch: pytest.MonkeyPatch, delay: int) -> None:
    def fail(group: PeerGroup, x: Tensor) -> None:
        x[: len(x) // 2] = 1e3
        raise GroupError("the others are gone")

    def alone(peers: Peers, channel: str, number: int, card: Tensor, *_: Any, **__: Any) -> Roll:
        return Roll((peers.rank,), {peers.rank: card})

    def train() -> list[Any]:
        _, diaries = run_world(2, "diloco", {"every": 3, "delay": delay}, 14)
        assert all(
            report.missed and report.members == [rank] for rank, one in enumerate(diaries) for report in one.reports
        )
        return [one.after for one in diaries]

    monkeypatch.setattr(PeerGroup, "all_reduce", fail)
    failed = train()
    monkeypatch.setattr("commopt.methods.diloco.call_roll", alone)
    for after, expected in zip(failed, train(), strict=True):
        assert all(torch.equal(after[step], expected[step]) for step in range(1, 15))
