"""FedAdagrad, FedAdam and FedYogi against their paper in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from draws import F64, f64

from commopt.optim.outer import FedAdagrad, FedAdam, FedYogi

LR, B1, B2, TAU = 0.03, 0.8, 0.95, 1e-2


def reference(kind: type, x: F64, m: F64, v: F64, replicas: F64) -> tuple[F64, F64, F64]:
    """Reddi et al. 2020, arXiv:2003.00295, Algorithm 2, lines 10 to 15, for parameters (K, ...) after the replicas' local steps."""
    delta = np.mean([x_i - x for x_i in replicas], axis=0)
    m = B1 * m + (1 - B1) * delta
    if kind is FedAdagrad:
        v = v + delta**2
    elif kind is FedYogi:
        v = v - (1 - B2) * delta**2 * np.sign(v - delta**2)
    else:
        v = B2 * v + (1 - B2) * delta**2
    return x + LR * m / (np.sqrt(v) + TAU), m, v


def make(kind: type, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    given: dict[str, Any] = {"lr": LR, "beta1": B1, "tau": TAU} | ({} if kind is FedAdagrad else {"beta2": B2})
    made = kind(params, **given)
    assert isinstance(made, torch.optim.Optimizer)
    return made


@pytest.mark.parametrize("kind", [FedAdagrad, FedAdam, FedYogi])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_every_round_is_the_papers(kind: type, dtype: torch.dtype, tolerance: float) -> None:
    generator = np.random.default_rng(5)
    start = generator.standard_normal((6, 4))
    p = torch.nn.Parameter(torch.tensor(start, dtype=dtype))
    optimizer = make(kind, [p])
    x, m, v = f64(p), np.zeros((6, 4)), np.full((6, 4), TAU**2)
    grew = shrank = False
    for k in range(40):
        # deltas around tau, large and then small, so that Yogi's v goes both ways
        replicas = x + (0.02 if k < 20 else 0.002) * (0.5 + generator.standard_normal((3, 6, 4)))
        p.grad = torch.tensor(x - replicas.mean(axis=0), dtype=dtype)
        before = v
        x, m, v = reference(kind, x, m, v, replicas)
        grew, shrank = grew or bool((v > before).any()), shrank or bool((v < before).any())
        optimizer.step()
        state = optimizer.state[p]
        for own, value in ((p, x), (state["momentum"], m), (state["variance"], v)):
            np.testing.assert_allclose(f64(own), value, rtol=tolerance, atol=tolerance * 1e-2)
    assert grew
    assert shrank == (kind is not FedAdagrad)
    assert np.abs(x - start).max() > 0.1


def test_fed_adagrad_has_no_momentum_unless_asked_for() -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = FedAdagrad([p], lr=1.0, tau=0.5)
    p.grad = torch.tensor([-2.0])
    optimizer.step()
    moved = float(p.detach())
    assert moved == pytest.approx(2 / (4.25**0.5 + 0.5))
    p.grad = torch.zeros(1)
    optimizer.step()
    assert float(p.detach()) == moved
