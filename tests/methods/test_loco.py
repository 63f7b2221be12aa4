"""LoCo against its equations in float64: a moving average of errors loses nothing, it only sends later."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from block_values import still_to_send
from synthetic import gradients, sent_for, simulate
from torch import Tensor

from commopt.methods import LoCo

SHAPES: list[tuple[int, ...]] = [(30, 21), (17,), (256,)]
BETA = 0.8


def test_a_workers_error_is_a_moving_average_of_what_rounding_lost() -> None:
    """Codes are random, so q follows from the state: the error moves by (1 - beta) (g - q), and |p - q| is below one level."""
    runs = simulate(4, SHAPES, 25, "loco", residual_bits=32, reset_every=None)
    for step in range(25):
        g = gradients(SHAPES, 4, step)
        for i, run in enumerate(runs):
            e, after = run[step]["worker_residual"], run[step + 1]["worker_residual"]
            q = g[i] - (after - e) / (1 - BETA)  # what this rank sent, by the equation
            p, starts = g[i] + e, [0, 256, 512, 630, 647]
            for a, b in zip(starts, [*starts[1:], 903], strict=True):
                scale = np.abs(p[a:b]).max() / 7
                levels = q[a:b] / scale
                np.testing.assert_allclose(levels, np.round(levels), rtol=0, atol=2e-4)  # it is a 4-bit code
                assert np.abs(p[a:b] - q[a:b]).max() < scale * 1.001  # of a neighbour of p


def run_constant(beta: float, bits: int, steps: int, reset: int | None = None) -> tuple[Tensor, Tensor, list[Any]]:
    """(n,) the sum of all results, (n,) the mean gradient, and every rank's method."""
    g = torch.randn(600, generator=torch.Generator().manual_seed(4))
    sent, _, methods = sent_for(lambda: LoCo(beta=beta, residual_bits=bits, reset_every=reset), g, steps)
    return sent.double().sum(0), 2.0 * g, methods


@pytest.mark.parametrize("beta", [0.0, BETA, 0.95])
def test_what_was_sent_and_what_is_owed_add_up(beta: float) -> None:
    steps = 60
    total, mean, methods = run_constant(beta, 32, steps)
    owed = still_to_send(methods).double()
    torch.testing.assert_close(total + owed / (1 - beta), steps * mean.double(), rtol=1e-4, atol=1e-3)
    assert float(owed.norm()) > 0


def test_errors_in_eight_bits_leave_the_mean_where_it_is() -> None:
    error = []
    for bits in (32, 16, 8):
        total, mean, _ = run_constant(BETA, bits, 100)
        error.append(float((total / 100 - mean).norm() / mean.norm()))
    assert max(error) < 0.02, error


def test_errors_are_forgotten_after_reset_every_steps() -> None:
    """After 2 reset_every steps and one more, the state is that of one step from nothing."""
    _, _, after_reset = run_constant(BETA, 32, 9, reset=8)
    _, _, fresh = run_constant(BETA, 32, 1)
    for one, other in zip(after_reset, fresh, strict=True):
        largest = float((other.worker.residual).abs().max())
        assert float(one.worker.residual.abs().max()) < 1.5 * largest  # one step's error, not an average of nine
        before = run_constant(BETA, 32, 9)[2][one.rank].worker.residual
        assert float(one.worker.residual.norm()) < 0.7 * float(before.norm())
