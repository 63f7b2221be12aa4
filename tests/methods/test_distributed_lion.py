"""Distributed Lion against its equations in float64, and with clipped gradients."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from rig import start
from synthetic import F64, Parameters, check_steps, gradients, simulate, stacked

from commopt.groups import Group, SimWorld

LR, B1, B2, DECAY = 0.01, 0.8, 0.95, 0.1
SHAPES: list[tuple[int, ...]] = [(50, 90), (7,), (1,), (2049,), (3, 5, 3)]


def reference(x: F64, m: F64, g: F64, vote: str) -> tuple[F64, F64, Any]:
    """Liu et al. 2024, Algorithm 1, in float64. x: (n,), m, g: (N, n). Returns x, m, and (n,) where no sign is in doubt."""
    c = B1 * m + (1 - B1) * g
    total = np.sign(c).sum(0)
    direction = total / len(g) if vote == "average" else np.sign(total)
    clear = (np.abs(c) > 1e-6).all(0) & ((total != 0) | (vote == "average"))  # a majority's tie takes a coin
    return x - LR * (direction + DECAY * x), B2 * m + (1 - B2) * g, clear


OPTIONS: dict[str, Any] = {"lr": LR, "betas": (B1, B2), "weight_decay": DECAY}


@pytest.mark.parametrize("vote", ["average", "majority"])
def test_every_step_is_the_papers_from_the_state_before_it(vote: str) -> None:
    def paper(step: int, before: list[dict[str, F64]]) -> Any:
        x, m, clear = reference(before[0]["x"], stacked(before, "momentum"), gradients(SHAPES, 4, step), vote)
        return {"x": x, "momentum": m}, clear

    runs = simulate(4, SHAPES, 25, "distributed_lion", vote=vote, **OPTIONS)
    # 3/8 of all votes are ties if signs are as good as random
    check_steps(runs, paper, share=0.55 if vote == "majority" else 0.99)
    if vote == "majority":  # ties too
        for before, after in itertools.pairwise(runs[0]):
            np.testing.assert_allclose(np.abs(after["x"] - before["x"] * (1 - LR * DECAY)), LR, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ranks", [3, 4])
def test_a_short_run_stays_with_the_reference(ranks: int) -> None:
    vote = "majority" if ranks % 2 else "average"
    shapes: list[tuple[int, ...]] = [(5,), (3,)]
    run = simulate(ranks, shapes, 40, "distributed_lion", vote=vote, **OPTIONS)[0]
    x, m = run[0]["x"], np.zeros((ranks, 8))
    for step in range(40):
        x, m, _ = reference(x, m, gradients(shapes, ranks, step), vote)
    np.testing.assert_allclose(run[-1]["x"], x, rtol=0, atol=1e-5)
    assert float(np.abs(x - run[0]["x"]).max()) > 0.05


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
