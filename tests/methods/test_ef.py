"""Error feedback by all-gather against its equations in float64, and what a falling learning rate does to residuals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from synthetic import exchange, gradients, simulate, spans
from torch import Tensor

from commopt import build
from commopt.groups import Group, SimWorld
from commopt.methods import EF
from commopt.wire.bucket import Bucket

F64 = NDArray[np.float64]
SHAPES: list[tuple[int, ...]] = [(30, 21), (17,), (2049,)]
TOP_K = {"compressor": "top_k", "density": 0.1, "value_bits": 32}


def signs(c: F64) -> tuple[F64, F64]:
    """|c|_1 / n sign(c) in blocks of 2048, and how clear each sign is in units of its scale."""
    q, margin = np.empty_like(c), np.empty_like(c)
    for a in range(0, len(c), 2048):
        block = c[a : a + 2048]
        scale = np.abs(block).mean()
        q[a : a + 2048], margin[a : a + 2048] = np.where(block >= 0, scale, -scale), np.abs(block) / scale
    return q, margin


def largest(c: F64) -> tuple[F64, F64]:
    """The tenth of the elements with the largest magnitudes, and how clear the choice is."""
    k = math.ceil(0.1 * len(c) - 1e-9)
    order = np.argsort(-np.abs(c), kind="stable")
    q = np.zeros_like(c)
    q[order[:k]] = c[order[:k]]
    gap = (np.abs(c[order[k - 1]]) - np.abs(c[order[k]])) / np.abs(c[order[0]])
    return q, np.full_like(c, gap)


@pytest.mark.parametrize(("compressor", "code"), [("sign", signs), (TOP_K, largest)])
@pytest.mark.parametrize("decay", [1.0, 0.7])
def test_every_step_is_the_papers_from_the_state_before_it(compressor: Any, code: Any, decay: float) -> None:
    runs = simulate(4, SHAPES, 25, "ef", compressor=compressor, residual_decay=decay)
    compared = 0
    for step in range(25):
        g = gradients(SHAPES, 4, step)
        q, e, clear = np.empty_like(g), np.empty_like(g), np.ones(g.shape[1], dtype=bool)
        for i, run in enumerate(runs):
            p = g[i] + decay * run[step]["worker_residual"]
            for span in spans(SHAPES):
                q[i][span], margin = code(p[span])
                clear[span] &= margin > 1e-5
            e[i] = p - q[i]
        compared += int(clear.sum())
        x = runs[0][step]["x"] - 0.05 * q.mean(0)
        for i, run in enumerate(runs):
            assert np.array_equal(run[step + 1]["x"], runs[0][step + 1]["x"])
            np.testing.assert_allclose(run[step + 1]["x"][clear], x[clear], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(run[step + 1]["worker_residual"][clear], e[i][clear], rtol=1e-5, atol=1e-5)
    assert compared > 0.9 * 25 * g.shape[1]


def sent_for(method_options: dict[str, Any], gradient: Tensor, steps: int, ranks: int = 3) -> tuple[Tensor, Tensor]:
    """(steps, n) what every step hands to the optimizer, and (steps + 1, n) the mean residual before each; rank i has (i + 1) g."""

    def work(group: Group) -> tuple[Tensor, Tensor]:
        method = EF(**method_options)
        method.bind([("x", gradient)], group)
        out, residuals = [], [method.worker.residual.clone()]
        for _ in range(steps):
            bucket = Bucket.of([("x", gradient * (group.rank + 1))])
            exchange(method, bucket, group)
            out.append(bucket.flat)
            residuals.append(method.worker.residual.clone())
        return torch.stack(out), torch.stack(residuals)

    every = SimWorld[Any](ranks).run(work)
    assert all(torch.equal(one[0], every[0][0]) for one in every)
    return every[0][0], torch.stack([one[1] for one in every]).mean(0)


@pytest.mark.parametrize("compressor", ["sign", TOP_K])
def test_the_mean_of_what_is_sent_goes_to_a_constant_gradient_as_one_over_steps(compressor: Any) -> None:
    g = torch.randn(500, generator=torch.Generator().manual_seed(1))
    sent, residual = sent_for({"compressor": compressor}, g, 400)
    error = [(sent[:t].mean(0) - 2 * g).norm() / g.norm() for t in (1, 100, 400)]
    assert error[0] > 0.5
    assert error[2] < 0.6 * error[1] < 0.12
    torch.testing.assert_close(sent.sum(0) + residual[-1], 400 * 2 * g, rtol=1e-4, atol=1e-3)


def test_without_error_feedback_a_sign_never_gets_there() -> None:
    g = torch.randn(500, generator=torch.Generator().manual_seed(1))
    sent, _ = sent_for({"compressor": "sign", "error_feedback": False}, g, 100)
    assert (sent.mean(0) - 2 * g).norm() / g.norm() > 0.5


def test_a_residual_of_a_high_rate_is_replayed_at_the_current_one() -> None:
    """Rates a, then b: x moves by sum lr_t g - b e_T - (a - b) e_drop. With the rate inside it would be sum lr_t g - e_T."""
    g, a, b, drop, steps = torch.randn(500, generator=torch.Generator().manual_seed(2)), 1.0, 0.1, 40, 80
    sent, residual = sent_for({"compressor": TOP_K}, g, steps)
    rates = torch.tensor([a] * drop + [b] * (steps - drop))
    moved = (rates[:, None] * sent).sum(0)
    wanted = rates.sum() * 2 * g
    missed = (a - b) * residual[drop]
    torch.testing.assert_close(wanted - b * residual[steps] - moved, missed, rtol=1e-3, atol=2e-3)
    assert missed.norm() > 0.5 * a * g.norm()  # and it is no small thing where the rate drops at once

    gently = torch.cat([torch.full((drop,), a), torch.linspace(a, b, steps - drop)])
    lost = gently.sum() * 2 * g - gently[-1] * residual[steps] - (gently[:, None] * sent).sum(0)
    torch.testing.assert_close(
        lost, ((gently[:-1] - gently[1:])[:, None] * residual[1:-1]).sum(0), rtol=1e-3, atol=2e-3
    )


def test_one_rank_is_uncompressed_sgd() -> None:
    alone, dense = (simulate(1, SHAPES, 5, name)[0][-1]["x"] for name in ("ef", "dense"))
    assert np.array_equal(alone, dense)


def test_a_compressor_is_named_in_brackets() -> None:
    assert str(build("ef(int8)").compressor) == str(build("ef", compressor="int8").compressor)  # type: ignore[attr-defined]
