"""1-bit Adam against its equations in float64, against Adam, and at the freeze."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from codes import SignExchange
from rig import start
from synthetic import F64, check_steps, gradients, parameters, simulate

from commopt.groups import Group, SimWorld

LR, B1, B2, EPS, DECAY, FREEZE = 0.01, 0.9, 0.99, 1e-6, 0.02, 10


@dataclass
class Reference:
    """Tang et al. 2021, Algorithm 1, in float64: flat tensors of all parameters."""

    exchange: SignExchange
    corrects: bool
    x: F64  # (n,) parameters
    m: F64  # (n,) momentum
    v: F64  # (n,) variance
    t: int

    def step(self, g: F64) -> F64:
        """g: (N, n) local gradients. Returns (n,) the distance of all compressed quantities from a change of sign."""
        self.t += 1
        margin = np.full_like(self.x, np.inf)
        if self.t <= FREEZE:
            mean = g.mean(0)
            self.m = B1 * self.m + (1 - B1) * mean
            self.v = B2 * self.v + (1 - B2) * mean**2
        else:
            self.m = self.exchange.mean(B1 * self.m + (1 - B1) * g) * (self.v > 0)
            margin = self.exchange.margin
        root, m_hat = np.sqrt(self.v), self.m
        if self.corrects:
            root, m_hat = root / np.sqrt(1 - B2 ** min(self.t, FREEZE)), self.m / (1 - B1**self.t)
        self.x = self.x * (1 - LR * DECAY) - LR * m_hat / (root + EPS)
        return margin


def train(
    ranks: int, shapes: list[tuple[int, ...]], steps: int, scale: str, corrects: bool
) -> list[list[dict[str, Any]]]:
    options = {"freeze_step": FREEZE, "scale": scale, "bias_correction": corrects, "lr": LR, "betas": (B1, B2)}
    return simulate(ranks, shapes, steps, "onebit_adam", parameters, eps=EPS, weight_decay=DECAY, **options)


def reference_of(states: list[dict[str, Any]], numels: list[int], scale: str, corrects: bool, t: int) -> Reference:
    x, m, v = (states[0][key].copy() for key in ("x", "momentum", "variance"))
    return Reference(SignExchange.of(states, numels, scale), corrects, x, m, v, t)


@pytest.mark.parametrize("corrects", [True, False])
@pytest.mark.parametrize("scale", ["rms", "l2"])
def test_every_step_is_the_papers_from_the_state_before_it(scale: str, corrects: bool) -> None:
    shapes: list[tuple[int, ...]] = [(50, 90), (7,), (1,), (2049,), (3, 5, 3)]
    numels, ranks = [math.prod(shape) for shape in shapes], 4

    def paper(step: int, before: list[dict[str, F64]]) -> Any:
        reference = reference_of(before, numels, scale, corrects, step)
        margin = reference.step(gradients(shapes, ranks, step, mean=0.5, dead=2))
        expected = {"x": reference.x, "momentum": reference.m, "variance": reference.v}
        return expected, margin > 1e-5, reference.exchange

    check_steps(train(ranks, shapes, 50, scale, corrects), paper, share=0.99, rtol=2e-5)


@pytest.mark.parametrize("corrects", [True, False])
@pytest.mark.parametrize("scale", ["rms", "l2"])
def test_a_short_run_stays_with_the_reference(scale: str, corrects: bool) -> None:
    shapes: list[tuple[int, ...]] = [(5,), (3,)]
    runs = train(4, shapes, 50, scale, corrects)
    reference = reference_of([run[0] for run in runs], [5, 3], scale, corrects, 0)
    for step in range(50):
        reference.step(gradients(shapes, 4, step, mean=0.5, dead=2))
    np.testing.assert_allclose(runs[0][-1]["x"], reference.x, rtol=1e-4, atol=1e-5)
    assert float(np.abs(reference.x - runs[0][0]["x"]).max()) > 0.1


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
