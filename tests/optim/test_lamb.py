"""LAMB and its trust ratio against their equations in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from draws import F64, f64, gradient, parameters

from commopt.optim import LAMB
from commopt.optim.optimizers import trust_ratio

LR, B1, B2, EPS, DECAY = 0.02, 0.9, 0.99, 1e-6, 0.1
SHAPES = [(30, 20), (7,), (1,), (3, 5, 3)]


def reference(x: F64, g: F64, m: F64, v: F64, t: int, *, corrects: bool, bounds: tuple[float, float]) -> list[F64]:
    """You et al. 2019, arXiv:1904.00962, Algorithm 2 for one tensor, with the clamp as phi; returns x, m, v after step t."""
    m = B1 * m + (1 - B1) * g
    v = B2 * v + (1 - B2) * g**2
    m_hat, v_hat = (m / (1 - B1**t), v / (1 - B2**t)) if corrects else (m, v)
    direction = m_hat / (np.sqrt(v_hat) + EPS) + DECAY * x
    weight, step = np.linalg.norm(x), np.linalg.norm(direction)
    ratio = np.clip(weight / step, *bounds) if weight > 0 and step > 0 else 1.0
    return [x - LR * ratio * direction, m, v]


def started() -> list[torch.nn.Parameter]:
    made = parameters(SHAPES, torch.float32)
    with torch.no_grad():
        made[1].zero_()  # a bias before its first step, whose ratio is 1
    return made


@pytest.mark.parametrize("corrects", [False, True])
@pytest.mark.parametrize("bounds", [(0.01, 10.0), (0.3, 0.5)])
def test_every_step_is_the_papers_from_the_state_before_it(bounds: tuple[float, float], corrects: bool) -> None:
    params = started()
    given: dict[str, Any] = {"min_coeff": bounds[0], "max_coeff": bounds[1], "bias_correction": corrects}
    lamb = LAMB(params, lr=LR, betas=(B1, B2), eps=EPS, weight_decay=DECAY, **given)
    free = [[f64(p), np.zeros(p.shape), np.zeros(p.shape)] for p in params]
    for step in range(40):
        before = []
        for k, p in enumerate(params):
            state = lamb.state[p]
            zeros = torch.zeros_like(p)
            before.append([f64(p), f64(state.get("momentum", zeros)), f64(state.get("variance", zeros))])
            p.grad = gradient(k, SHAPES[k], step, torch.float32)
        lamb.step()
        for k, p in enumerate(params):
            g = f64(gradient(k, SHAPES[k], step, torch.float32))
            x, m, v = before[k]
            expected = reference(x, g, m, v, step + 1, corrects=corrects, bounds=bounds)
            for value, own in zip(expected, (p, lamb.state[p]["momentum"], lamb.state[p]["variance"]), strict=True):
                np.testing.assert_allclose(f64(own), value, rtol=1e-5, atol=1e-6)
            free[k] = reference(free[k][0], g, free[k][1], free[k][2], step + 1, corrects=corrects, bounds=bounds)
    for p, (x, _, _), start in zip(params, free, started(), strict=True):
        np.testing.assert_allclose(f64(p), x, rtol=1e-4, atol=1e-5)
        assert float(np.abs(f64(p) - f64(start)).max()) > 0.05


@pytest.mark.parametrize(
    ("x", "direction", "expected"),
    [
        ([3.0, 4.0], [1.0, 0.0], 5.0),
        ([3.0, 4.0], [0.1, 0.0], 10.0),  # 50, beyond max_coeff
        ([3e-3, 4e-3], [1.0, 0.0], 0.01),  # 0.005, below min_coeff
        ([0.0, 0.0], [1.0, 0.0], 1.0),
        ([3.0, 4.0], [0.0, 0.0], 1.0),
        ([], [], 1.0),
    ],
)
def test_the_ratio_is_clamped_and_1_where_a_norm_is_0(x: list[float], direction: list[float], expected: float) -> None:
    assert trust_ratio(torch.tensor(x), torch.tensor(direction), 0.01, 10.0) == pytest.approx(expected)


def test_the_ratio_of_half_precision_is_of_its_values_in_float32() -> None:
    x = torch.full((70_000,), 1.0, dtype=torch.float16)  # a sum of squares beyond float16
    assert trust_ratio(x, torch.ones(70_000), 0.01, 10.0) == pytest.approx(1.0)
