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
