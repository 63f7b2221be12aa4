"""Error feedback around every code against its equations in float64, and residuals under a falling learning rate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from codes import block_signs, largest
from synthetic import F64, check_free_run, check_steps, gradients, sent_for, simulate, spans, stacked

from commopt.compress.sparse import RandomK
from commopt.methods import EF
from commopt.wire.bucket import Blocks
from commopt.wire.noise import keys

N = 4
SHAPES: list[tuple[int, ...]] = [(30, 21), (17,), (2049,)]
NUMELS = [630, 17, 2049]
TOP_K = {"compressor": "top_k", "density": 0.1, "value_bits": 32}


def random_places(c: F64, step: int) -> tuple[F64, F64]:
    """Stich et al. 2018: a tenth at places that are drawn anew in every step, the same on all ranks."""
    q = np.zeros_like(c)
    for span in spans(SHAPES):
        where, zero = np.asarray([span.start]), np.asarray([0])
        key = keys(3, "worker", 0, np.asarray([step]), where)
        blocks = Blocks(zero, where, np.asarray([span.stop - span.start]), zero, zero, key)
        places, _ = RandomK(density=0.1).places(blocks)
        q[span][places] = c[span][places]
    return q, np.ones_like(c)


def reaching(c: F64, step: int) -> tuple[F64, F64]:
    """Strom 2015: whatever reaches 0.5."""
    return np.where(np.abs(c) >= 0.5, c, 0.0), np.abs(np.abs(c) - 0.5)


CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "signs": (lambda c, _: block_signs(c, NUMELS), "ef", {}),
    "signs, decayed": (lambda c, _: block_signs(c, NUMELS), "ef", {"residual_decay": 0.7}),
    "top_k": (lambda c, _: largest(c, 0.1, NUMELS), "ef", {"compressor": TOP_K}),
    "top_k, decayed": (lambda c, _: largest(c, 0.1, NUMELS), "ef", {"compressor": TOP_K, "residual_decay": 0.7}),
    "top_k by its own name": (lambda c, _: largest(c, 0.1, NUMELS), "top_k", {"density": 0.1, "value_bits": 32}),
    "random_k": (random_places, "random_k", {"density": 0.1, "seed": 3}),
    "threshold": (reaching, "threshold", {"threshold": 0.5, "value_bits": 32}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_the_papers_from_the_state_before_it(case: str) -> None:
    code, name, options = CASES[case]

    def paper(step: int, before: list[dict[str, F64]]) -> Any:
        p = gradients(SHAPES, N, step) + options.get("residual_decay", 1.0) * stacked(before, "worker_residual")
        q, margin = (np.stack(x) for x in zip(*(code(row, step) for row in p), strict=True))
        return {"x": before[0]["x"] - 0.05 * q.mean(0), "worker_residual": p - q}, margin.min(0) > 1e-5

    runs = simulate(N, SHAPES, 25, name, dense_1d=False, **options)
    check_steps(runs, paper, atol=1e-5)
    check_free_run(runs, paper, 6)


def test_random_places_without_error_feedback_are_right_on_average() -> None:
    """What 200 steps moved is the sum of the mean gradients, to the noise of choosing a fifth of them."""
    worlds = simulate(2, [(40, 10)], 200, "random_k", density=0.2, error_feedback=False)
    moved = (worlds[0][0]["x"] - worlds[0][-1]["x"]) / 0.05 / 200
    steps = np.stack([gradients([(40, 10)], 2, step).mean(0) for step in range(200)])
    noise = np.sqrt((steps**2).mean() * 4 / 200)
    assert np.abs(moved - steps.mean(0)).max() < 5 * noise
    assert np.abs(moved - steps.mean(0)).std() > 0.1 * noise


@pytest.mark.parametrize("compressor", ["sign", TOP_K])
def test_the_mean_of_what_is_sent_goes_to_a_constant_gradient_as_one_over_steps(compressor: Any) -> None:
    g = torch.randn(500, generator=torch.Generator().manual_seed(1))
    sent, residual, _ = sent_for(lambda: EF(compressor=compressor), g, 200)
    error = [(sent[:t].mean(0) - 2 * g).norm() / g.norm() for t in (1, 50, 200)]
    assert error[0] > 0.5
    assert error[2] < 0.6 * error[1] < 0.24
    torch.testing.assert_close(sent.sum(0) + residual[-1], 200 * 2 * g, rtol=1e-4, atol=1e-3)


def test_without_error_feedback_a_sign_never_gets_there() -> None:
    g = torch.randn(500, generator=torch.Generator().manual_seed(1))
    sent, *_ = sent_for(lambda: EF(compressor="sign", error_feedback=False), g, 100)
    assert (sent.mean(0) - 2 * g).norm() / g.norm() > 0.5


def test_a_residual_of_a_high_rate_is_replayed_at_the_current_one() -> None:
    """Rates a, then b: x moves by sum lr_t g - b e_T - (a - b) e_drop. With the rate inside it would be sum lr_t g - e_T."""
    g, a, b, drop, steps = torch.randn(500, generator=torch.Generator().manual_seed(2)), 1.0, 0.1, 40, 80
    sent, residual, _ = sent_for(lambda: EF(compressor=TOP_K), g, steps)
    rates = torch.tensor([a] * drop + [b] * (steps - drop))
    moved = (rates[:, None] * sent).sum(0)
    wanted = rates.sum() * 2 * g
    missed = (a - b) * residual[drop]
    torch.testing.assert_close(wanted - b * residual[steps] - moved, missed, rtol=1e-3, atol=2e-3)
    assert missed.norm() > 0.5 * a * g.norm()  # and it is no small thing where the rate drops at once

    gently = torch.cat([torch.full((drop,), a), torch.linspace(a, b, steps - drop)])
    lost = gently.sum() * 2 * g - gently[-1] * residual[steps] - (gently[:, None] * sent).sum(0)
    expected = ((gently[:-1] - gently[1:])[:, None] * residual[1:-1]).sum(0)
    torch.testing.assert_close(lost, expected, rtol=1e-3, atol=2e-3)
