"""Distributed Lion against its equations in float64, and with clipped gradients."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from rig import start
from synthetic import F64, Parameters, Shapes, check_free_run, check_steps, gradients, simulate, stacked

from commopt.groups import Group, SimWorld

LR, B1, B2, DECAY = 0.01, 0.8, 0.95, 0.1
SHAPES: list[tuple[int, ...]] = [(50, 90), (7,), (1,), (2049,), (3, 5, 3)]


OPTIONS: dict[str, Any] = {"lr": LR, "betas": (B1, B2), "weight_decay": DECAY}


def reference(vote: str, shapes: Shapes, step: int, before: list[dict[str, F64]]) -> Any:
    """Liu et al. 2024, Algorithm 1, in float64. Returns x and m, and (n,) where no sign is in doubt."""
    g, x, m = gradients(shapes, len(before), step), before[0]["x"], stacked(before, "momentum")
    c = B1 * m + (1 - B1) * g
    total = np.sign(c).sum(0)
    direction = total / len(g) if vote == "average" else np.sign(total)
    clear = (np.abs(c) > 1e-6).all(0) & ((total != 0) | (vote == "average"))  # a majority's tie takes a coin
    return {"x": x - LR * (direction + DECAY * x), "momentum": B2 * m + (1 - B2) * g}, clear


@pytest.mark.parametrize("vote", ["average", "majority"])
def test_every_step_is_the_papers_from_the_state_before_it(vote: str) -> None:
    runs = simulate(4, SHAPES, 25, "distributed_lion", vote=vote, **OPTIONS)
    # 3/8 of all votes are ties if signs are as good as random
    check_steps(runs, partial(reference, vote, SHAPES), share=0.55 if vote == "majority" else 0.99)
    if vote == "majority":  # ties too
        for before, after in itertools.pairwise(runs[0]):
            np.testing.assert_allclose(np.abs(after["x"] - before["x"] * (1 - LR * DECAY)), LR, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("ranks", "vote"), [(3, "majority"), (4, "average")])
def test_a_short_run_stays_with_the_reference(ranks: int, vote: str) -> None:
    runs = simulate(ranks, [(5,), (3,)], 40, "distributed_lion", vote=vote, **OPTIONS)
    check_free_run(runs, partial(reference, vote, [(5,), (3,)]), 40)


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
