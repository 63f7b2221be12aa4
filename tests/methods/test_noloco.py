"""NoLoCo against its equations 1 to 3 in float64, and who averages with whom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from outer_rig import after_round, bound, play, run_world, spread, start_values, thetas_of
from rig import normal
from torch import Tensor

from commopt.errors import ConfigError
from commopt.groups import SimGroup, SimWorld
from commopt.wire.draws import group_of


def reference(
    thetas: list[list[Tensor]],
    group_in: Callable[[int, int], tuple[int, ...]],
    lr: float,
    momentum: float,
    gamma: float,
) -> list[list[Tensor]]:
    """The slow weights after each round, by round and rank; thetas[t][i]: x of rank i after its inner steps in round t.

    delta_i <- momentum delta_i + lr mean_j (theta_j - phi_j) - gamma (phi_i - mean_j phi_j);  phi_i <- phi_i + delta_i
    """
    ranks, elements = len(thetas[0]), len(thetas[0][0])
    phi = [start_values(elements).double() for _ in range(ranks)]
    delta = [torch.zeros(elements, dtype=torch.float64) for _ in range(ranks)]
    history = []
    for t, theta in enumerate(thetas):
        pull = []
        for i in range(ranks):
            group = group_in(t, i)
            change = sum(theta[j].double() - phi[j] for j in group) / len(group)
            mean_phi = sum(phi[j] for j in group) / len(group)
            pull.append(lr * change - gamma * (phi[i] - mean_phi))
        delta = [momentum * delta[i] + pull[i] for i in range(ranks)]
        phi = [phi[i] + delta[i] for i in range(ranks)]
        history.append(phi)
    return history


DEFAULTS: dict[str, Any] = {"lr": 0.7, "momentum": 0.5, "gamma": 0.7, "group_size": 2, "seed": 0}
OF_PAIRS: list[dict[str, Any]] = [{}, {"two_tensors": True}, {"seed": 3}, {"gamma": 0.55}, {"gamma": 1.2}]
OF_THREE: dict[str, Any] = {"group_size": 3, "lr": 0.5, "momentum": 0.3, "gamma": 0.6}
CASES = [(ranks, options) for ranks in (2, 4, 5) for options in OF_PAIRS] + [(ranks, OF_THREE) for ranks in (3, 5, 6)]


@pytest.mark.parametrize(("ranks", "options"), CASES, ids=str)
def test_pairs_and_groups_of_three_follow_equations_2_and_3(ranks: int, options: dict[str, Any]) -> None:
    played, o = play(ranks, "noloco", options, 20), {**DEFAULTS, **options}

    def group_in(t: int, i: int) -> tuple[int, ...]:
        return group_of(i, ranks, o["group_size"], o["seed"], t)

    expected = reference(thetas_of(played), group_in, o["lr"], o["momentum"], o["gamma"])
    for i in range(ranks):
        for t, one in enumerate(played[i]):
            assert one.members == group_in(t, i)
            torch.testing.assert_close(one.new.double(), expected[t][i], rtol=2e-5, atol=2e-5)


def test_who_sits_out_moves_by_its_own_momentum_and_misses_nothing() -> None:
    _, diaries = run_world(3, "noloco", {"every": 2}, 12)
    for diary in diaries:
        alone = [report for report in diary.reports if len(report.members) == 1]
        assert len(alone) == 2
        assert not any(report.missed for report in diary.reports)


def apart(rounds: int, **options: Any) -> list[float]:
    """The spread of four replicas after each round."""
    return [spread([one.new for one in ranks]) for ranks in zip(*play(4, "noloco", options, rounds), strict=True)]


@pytest.mark.parametrize("message", ["int8", "sign", {"compressor": "top_k", "density": 0.1}], ids=str)
def test_compressed_replicas_stay_together(message: Any) -> None:
    assert apart(40, message=message, slow_share=1.0)[-1] < 2 * apart(40)[-1]
    by_parts = apart(100, message=message)
    assert by_parts[-1] < 1.5 * by_parts[39]


@pytest.mark.parametrize("compressor", ["int8", "4bit", {"compressor": "top_k", "density": 0.2}], ids=str)
def test_compressed_pairs_lose_nothing(compressor: Any) -> None:
    """What both have sent plus what they still hold is what both have changed."""

    def rank_of(group: SimGroup) -> tuple[Tensor, Tensor]:
        method = bound("noloco", group, 300, every=1, message=compressor)
        method.begin(torch.zeros(300))
        method.ready(0)
        total, sent = torch.zeros(300), torch.zeros(300)
        for number in range(10):
            x = method.state["slow"] + normal(300, number + 100 * group.rank)
            total += x - method.state["slow"]
            sent += after_round(method, x, number)[1].values["mean"]
        return total - method.message.feedback.residual, sent

    (a, sent), (b, sent_too) = SimWorld[tuple[Tensor, Tensor]](2).run(rank_of)
    assert torch.equal(sent, sent_too)
    torch.testing.assert_close(sent, (a + b) / 2, rtol=1e-4, atol=1e-4)


def test_a_group_larger_than_the_job_is_refused() -> None:
    with pytest.raises(ConfigError, match="group_size: 4 is more than the 3 ranks there are"):
        play(3, "noloco", {"group_size": 4}, 1)


@pytest.mark.parametrize("gamma", [0.55, 0.7, 1.45])
def test_inside_the_bounds_of_equation_74_differences_die_out(gamma: float) -> None:
    """200 rounds of a pair in which nothing is learnt."""

    def rank_of(group: SimGroup) -> float:
        method = bound("noloco", group, 1, every=1, gamma=gamma, momentum=0.5)
        method.begin(torch.tensor([1.0 - 2.0 * group.rank]))
        method.ready(0)
        for number in range(200):
            after_round(method, method.state["slow"].clone(), number)
        return float(method.state["slow"].abs())

    assert max(SimWorld[float](2).run(rank_of)) < 1e-6
