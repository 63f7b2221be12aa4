"""Distributed Lion against its equations in float64, against Lion, and where bits hide what a rank has to say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from rig import start
from synthetic import F64, Parameters, gradients, simulate
from torch import Tensor, nn

from commopt.groups import Group, SimWorld

LR, B1, B2, DECAY = 0.01, 0.8, 0.95, 0.1
SHAPES: list[tuple[int, ...]] = [(50, 90), (7,), (1,), (2049,), (3, 5, 3)]


def reference(x: F64, m: F64, g: F64, vote: str) -> tuple[F64, F64, Any]:
    """Liu et al. 2024, Algorithm 1, in float64. x: (n,), m, g: (N, n). Returns x, m, and (n,) where nothing hangs by a hair."""
    c = B1 * m + (1 - B1) * g
    total = np.sign(c).sum(0)
    direction = total / len(g) if vote == "average" else np.sign(total)
    clear = (np.abs(c) > 1e-6).all(0) & ((total != 0) | (vote == "average"))  # a majority's tie takes a coin
    return x - LR * (direction + DECAY * x), B2 * m + (1 - B2) * g, clear


def train(ranks: int, shapes: list[tuple[int, ...]], steps: int, **given: Any) -> list[list[tuple[F64, F64]]]:
    """[rank][step] parameters and this rank's momentum, before each step and after the last."""
    runs = simulate(ranks, shapes, steps, "distributed_lion", **given)
    return [[(one["x"], one["momentum"]) for one in run] for run in runs]


OPTIONS: dict[str, Any] = {"lr": LR, "betas": (B1, B2), "weight_decay": DECAY}


@pytest.mark.parametrize("vote", ["average", "majority"])
def test_every_step_is_the_papers_from_the_state_before_it(vote: str) -> None:
    runs = train(4, SHAPES, 25, vote=vote, **OPTIONS)
    compared = 0
    for step in range(25):
        m = np.stack([run[step][1] for run in runs])
        x, m, clear = reference(runs[0][step][0], m, gradients(SHAPES, 4, step), vote)
        compared += int(clear.sum())
        for rank, run in enumerate(runs):
            assert np.array_equal(run[step + 1][0], runs[0][step + 1][0])
            np.testing.assert_allclose(run[step + 1][0][clear], x[clear], rtol=0, atol=1e-6)
            np.testing.assert_allclose(run[step + 1][1], m[rank], rtol=1e-5, atol=1e-6)
        moved = runs[0][step + 1][0] - runs[0][step][0] * (1 - LR * DECAY)
        if vote == "majority":  # ties too
            np.testing.assert_allclose(np.abs(moved), LR, rtol=0, atol=1e-6)
    # a tie: 3/8 of all votes where signs are as good as random
    assert compared > (0.55 if vote == "majority" else 0.99) * 25 * runs[0][0][0].size


@pytest.mark.parametrize("ranks", [3, 4])
def test_a_short_run_stays_with_the_reference(ranks: int) -> None:
    vote = "majority" if ranks % 2 else "average"
    shapes: list[tuple[int, ...]] = [(5,), (3,)]
    runs = train(ranks, shapes, 40, vote=vote, **OPTIONS)
    x, m = runs[0][0][0], np.zeros((ranks, 8))
    for step in range(40):
        x, m, _ = reference(x, m, gradients(shapes, ranks, step), vote)
    np.testing.assert_allclose(runs[0][-1][0], x, rtol=0, atol=1e-5)
    assert float(np.abs(x - runs[0][0][0]).max()) > 0.05


@pytest.mark.parametrize("vote", ["average", "majority"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_an_unused_embedding_row_does_not_drift(ranks: int, vote: str) -> None:
    lr, steps = 0.01, 41

    def work(group: Group) -> Tensor:
        model = nn.Embedding(12, 300)
        with torch.no_grad():
            model.weight.copy_(torch.randn(12, 300, generator=torch.Generator().manual_seed(0)))
        before = model.weight.detach().clone()
        run = start(model, "distributed_lion", group, lr=lr, vote=vote)
        for step in range(steps):
            tokens = torch.randint(0, 6, (16,), generator=torch.Generator().manual_seed(100 * step + group.rank))
            run.optimizer.zero_grad()
            (model(tokens) - 5.0).square().mean().backward()
            run.optimizer.step()
        return model.weight.detach() - before

    for moved in SimWorld[Any](ranks).run(work):
        assert float(moved[6:].abs().max()) <= lr + 1e-5
        assert float(moved[6:].mean().abs()) < 4 * lr / math.sqrt(6 * 300)
        assert float(moved[:6].mean()) > 0.8 * lr * steps


def test_max_norm_clips_gradients_by_one_norm_for_all_ranks() -> None:
    def work(group: Group) -> tuple[float, float]:
        model = Parameters((40,), (7,))
        run = start(model, "distributed_lion", group, max_norm=0.5)
        method = run.method
        model.set_gradients(group.rank, 0)
        raw = torch.cat([p.grad.view(-1) for p in model.all if p.grad is not None])
        run.optimizer.step()
        return float(raw.norm()), float(method.state["momentum"].norm())

    both = SimWorld[Any](3).run(work)
    joint = math.sqrt(sum(raw**2 for raw, _ in both) / 3)
    assert joint > 0.5
    for raw, momentum in both:
        assert momentum == pytest.approx(0.01 * raw * 0.5 / joint, rel=1e-4)
