"""AccumAdam against its equations in float64, and against torch's Adam where it is the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from draws import F64, f64, gradient, parameters, step

from commopt.optim import AccumAdam

SHAPES = [(6, 5), (7,), (), (2, 3, 2)]
LR, B1, B2, EPS, DECAY = 0.02, 0.9, 0.97, 1e-6, 0.1


def accum_adam(x: F64, gradients: list[F64], s: int, decay: float) -> Iterator[F64]:
    """Wang et al. 2024, arXiv:2410.11998, x after each step; as in the released code, the stored m and v hold their b1 and b2."""
    m, v, mean = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    for t, g in enumerate(gradients, 1):
        x = x - LR * decay * x
        mean = mean + g / s
        m_hat, v_hat = m + (1 - B1) * g, v + (1 - B2) * g**2
        k = math.ceil(t / s)
        x = x - LR / (1 - B1**k) * m_hat / (np.sqrt(v_hat) / np.sqrt(1 - B2**k) + EPS)
        if t % s == 0:
            m, v, mean = B1 * (m + (1 - B1) * mean), B2 * (v + (1 - B2) * mean**2), np.zeros_like(x)
        yield x


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("s", [2, 4, 7])
def test_every_step_is_the_papers(s: int, dtype: torch.dtype, tolerance: float) -> None:
    params = parameters(SHAPES, dtype)
    optimizer = AccumAdam(params, LR, (B1, B2), EPS, DECAY, s)
    # of the shapes, only those of two or more dimensions decay
    expected = [
        accum_adam(f64(p), [f64(gradient(k, SHAPES[k], t)) for t in range(30)], s, DECAY if p.ndim >= 2 else 0.0)
        for k, p in enumerate(params)
    ]
    for number in range(30):
        step(params, optimizer, number)
        for p, xs in zip(params, expected, strict=True):
            np.testing.assert_allclose(f64(p), next(xs), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("given", [{}, {"lr": LR, "betas": (B1, B2), "eps": EPS, "weight_decay": 0.3}])
def test_without_accumulation_it_is_torchs_adam_or_adamw(given: dict[str, Any]) -> None:
    ours, theirs = parameters(SHAPES), parameters(SHAPES)
    own = AccumAdam(ours, **given, accum_iter=1, decay_1d=True)
    other = (torch.optim.AdamW if given else torch.optim.Adam)(theirs, **given)
    for number in range(50):
        step(ours, own, number)
        step(theirs, other, number)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_weights_decay_and_biases_do_not_unless_asked_for() -> None:
    for decay_1d in (False, True):
        weight, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
        optimizer = AccumAdam([weight, bias], lr=0.5, weight_decay=0.1, decay_1d=decay_1d)
        for p in (weight, bias):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.full((2, 2), 0.95))
        torch.testing.assert_close(bias.detach(), torch.full((2,), 0.95 if decay_1d else 1.0))


def test_moments_move_at_the_last_step_of_each_window_only() -> None:
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = AccumAdam([p], accum_iter=3)
    seen = []
    for number, g in enumerate([1.0, 2.0, 6.0, 5.0]):
        p.grad = torch.full((3,), g, dtype=torch.float64)
        optimizer.step()
        state = optimizer.state[p]
        seen.append([float(state[name][0]) for name in ("momentum", "variance", "accumulated")])
        assert state["step"] == number + 1
    expected = [[0.0, 0.0, 1 / 3], [0.0, 0.0, 1.0], [0.1 * 3, 0.001 * 9, 0.0], [0.1 * 3, 0.001 * 9, 5 / 3]]
    np.testing.assert_allclose(np.asarray(seen), np.asarray(expected), rtol=1e-12)


def test_opposite_gradients_in_a_window_leave_no_trace_in_the_moments() -> None:
    """What Adam takes for variance, and what averaging gradients over ranks would have cancelled."""
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = AccumAdam([p], accum_iter=2)
    for g in (1.0, -1.0):
        p.grad = torch.full((2,), g)
        optimizer.step()
    assert optimizer.state[p]["variance"].tolist() == [0.0, 0.0]
    assert optimizer.state[p]["momentum"].tolist() == [0.0, 0.0]
