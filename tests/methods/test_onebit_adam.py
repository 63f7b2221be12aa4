"""1-bit Adam against its equations in float64, against Adam, and at the freeze."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from codes import SignExchange
from rig import start
from synthetic import F64, Shapes, check_free_run, check_steps, gradients, parameters, simulate

from commopt.groups import Group, SimWorld

LR, B1, B2, EPS, DECAY, FREEZE = 0.01, 0.9, 0.99, 1e-6, 0.02, 10


def reference(scale: str, corrects: bool, shapes: Shapes, step: int, before: list[dict[str, F64]]) -> Any:
    """Tang et al. 2021, Algorithm 1, in float64. Returns x, m and v, and (n,) where no sign is in doubt."""
    g = gradients(shapes, len(before), step, mean=0.5, dead=2)
    x, m, v = (before[0][key] for key in ("x", "momentum", "variance"))
    exchange = SignExchange.of(before, [math.prod(shape) for shape in shapes], scale)
    if step < FREEZE:
        m, v = B1 * m + (1 - B1) * g.mean(0), B2 * v + (1 - B2) * g.mean(0) ** 2
        clear = np.ones_like(x, dtype=bool)
    else:
        m = exchange.mean(B1 * m + (1 - B1) * g) * (v > 0)
        clear = exchange.margin > 1e-5
    root, m_hat = np.sqrt(v), m
    if corrects:
        root, m_hat = root / np.sqrt(1 - B2 ** min(step + 1, FREEZE)), m / (1 - B1 ** (step + 1))
    x = x * (1 - LR * DECAY) - LR * m_hat / (root + EPS)
    return {"x": x, "momentum": m, "variance": v}, clear, exchange


def train(shapes: Shapes, scale: str, corrects: bool) -> list[list[dict[str, Any]]]:
    options = {"freeze_step": FREEZE, "scale": scale, "bias_correction": corrects, "lr": LR, "betas": (B1, B2)}
    return simulate(4, shapes, 50, "onebit_adam", parameters, eps=EPS, weight_decay=DECAY, **options)


@pytest.mark.parametrize("corrects", [True, False])
@pytest.mark.parametrize("scale", ["rms", "l2"])
def test_every_step_is_the_papers_from_the_state_before_it(scale: str, corrects: bool) -> None:
    shapes = [(50, 90), (7,), (1,), (2049,), (3, 5, 3)]
    check_steps(train(shapes, scale, corrects), partial(reference, scale, corrects, shapes), share=0.99, rtol=2e-5)


@pytest.mark.parametrize("corrects", [True, False])
@pytest.mark.parametrize("scale", ["rms", "l2"])
def test_a_short_run_stays_with_the_reference(scale: str, corrects: bool) -> None:
    runs = train([(5,), (3,)], scale, corrects)
    check_free_run(runs, partial(reference, scale, corrects, [(5,), (3,)]), 50, rtol=1e-4)


def test_update_sizes_do_not_jump_at_the_freeze() -> None:
    """With a constant gradient m and v are biased alike, so that bias correction gives steps of lr before and after."""

    def work(group: Group) -> list[float]:
        model = parameters((64,))
        run = start(model, "onebit_adam", group, lr=0.01, betas=(0.9, 0.999), freeze_step=5)
        sizes = []
        for _ in range(40):
            before = model.all[0].detach().clone()
            model.all[0].grad = torch.full((64,), 0.3)
            run.optimizer.step()
            sizes.append(float((model.all[0].detach() - before).abs().mean()))
        return sizes

    for sizes in SimWorld[Any](2).run(work):
        assert sizes == pytest.approx([0.01] * 40, rel=1e-3)
