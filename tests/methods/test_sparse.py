"""top_k, random_k and threshold against their equations in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from synthetic import F64, gradients, simulate, spans

from commopt.compress import RandomK
from commopt.wire.bucket import Blocks
from commopt.wire.noise import keys

N, STEPS, LR = 4, 20, 0.05
SHAPES = [(30, 21), (17,), (9, 5)]
SPANS = spans(SHAPES)


def top_k(c: F64, step: int) -> tuple[F64, F64]:
    """Stich et al. 2018: the largest tenth of each parameter, and how clear the choice was."""
    q, margin = np.zeros_like(c), np.zeros_like(c)
    for span in SPANS:
        size = np.abs(c[span])
        k = math.ceil(0.1 * len(size))
        cut = np.sort(size)[::-1]
        q[span] = np.where(size >= cut[k - 1], c[span], 0.0)
        margin[span] = (cut[k - 1] - cut[k]) / cut[k - 1]
    return q, margin


def random_k(c: F64, step: int) -> tuple[F64, F64]:
    """Stich et al. 2018: a tenth at places that are drawn anew in every step, the same on all ranks."""
    q = np.zeros_like(c)
    for span in SPANS:
        where, zero = np.asarray([span.start]), np.asarray([0])
        key = keys(3, "worker", 0, np.asarray([step]), where)
        places, _ = RandomK(density=0.1).places(
            Blocks(zero, where, np.asarray([span.stop - span.start]), zero, zero, key)
        )
        q[span][places] = c[span][places]
    return q, np.ones_like(c)


def threshold(c: F64, step: int) -> tuple[F64, F64]:
    """Strom 2015: whatever reaches 0.5."""
    return np.where(np.abs(c) >= 0.5, c, 0.0), np.abs(np.abs(c) - 0.5)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "top_k": (top_k, {"density": 0.1, "value_bits": 32}),
    "random_k": (random_k, {"density": 0.1, "seed": 3}),
    "threshold": (threshold, {"threshold": 0.5, "value_bits": 32}),
}


@pytest.mark.parametrize("name", CASES)
def test_every_step_is_the_papers_from_the_state_before_it(name: str) -> None:
    choose, options = CASES[name]
    worlds = simulate(N, SHAPES, STEPS, name, dense_1d=False, **options)
    compared = 0
    for step in range(STEPS):
        g = gradients(SHAPES, N, step)
        c = np.stack([g[rank] + worlds[rank][step]["worker_residual"] for rank in range(N)])
        sent, margin = (np.stack(x) for x in zip(*(choose(row, step) for row in c), strict=True))
        clear = margin.min(0) > 1e-5
        compared += int(clear.sum())
        x = worlds[0][step]["x"] - LR * sent.mean(0)
        np.testing.assert_allclose(worlds[0][step + 1]["x"][clear], x[clear], rtol=0, atol=2e-6)
        for rank in range(N):
            left = worlds[rank][step + 1]["worker_residual"]
            np.testing.assert_allclose(left[clear], (c[rank] - sent[rank])[clear], rtol=0, atol=2e-6)
    assert compared > 0.9 * STEPS * SPANS[-1].stop


@pytest.mark.parametrize("name", CASES)
def test_a_free_run_is_the_papers(name: str) -> None:
    choose, options = CASES[name]
    x, e = simulate(1, SHAPES, 0, "dense")[0][0]["x"], np.zeros((N, SPANS[-1].stop))
    for step in range(6):
        c = gradients(SHAPES, N, step) + e
        sent = np.stack([choose(row, step)[0] for row in c])
        e, x = c - sent, x - LR * sent.mean(0)
    ours = simulate(N, SHAPES, 6, name, dense_1d=False, **options)[0][-1]["x"]
    np.testing.assert_allclose(ours, x, rtol=0, atol=1e-5)


def test_random_places_without_error_feedback_are_right_on_average() -> None:
    """What 400 steps moved is the sum of the mean gradients, to the noise of choosing a fifth of them."""
    worlds = simulate(2, [(40, 10)], 400, "random_k", density=0.2, error_feedback=False)
    moved = (worlds[0][0]["x"] - worlds[0][-1]["x"]) / LR / 400
    steps = np.stack([gradients([(40, 10)], 2, step).mean(0) for step in range(400)])
    noise = np.sqrt((steps**2).mean() * 4 / 400)
    assert np.abs(moved - steps.mean(0)).max() < 5 * noise
    assert np.abs(moved - steps.mean(0)).std() > 0.1 * noise
