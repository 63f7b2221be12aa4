"""Local SGD with adaptive inner steps: when the scale of these steps changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from outer_rig import gradient
from rig import flat, make_model, train_step
from rig import train as train_steps
from torch import Tensor

from commopt import attach, build
from commopt.errors import AttachError
from commopt.groups import SimGroup, SimWorld
from commopt.optim import SAVIC

LR, BETAS, ALPHA, EVERY = 0.01, (0.8, 0.99), 1e-3, 4


def reference(ranks: int, steps: int, weight_decay: float) -> Tensor:
    """(ranks, P) f64 after so many steps of Adam whose scale D is that of the last average (after arXiv:2406.00846).

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  x <- (1 - lr wd) x - lr m^ / max(D, alpha);  at an average D <- sqrt(v^)
    """
    (b1, b2), models = BETAS, [make_model(torch.float64) for _ in range(ranks)]
    x = torch.stack([flat(model) for model in models])
    m, v, scale = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
    for t in range(1, steps + 1):
        g = torch.stack([gradient(models[i], x[i], i, t - 1) for i in range(ranks)])
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        if t <= EVERY:
            scale = (v / (1 - b2**t)).sqrt()
        x = (1 - LR * weight_decay) * x - LR * m / (1 - b1**t) / scale.clamp(min=ALPHA)
        if t % EVERY == 0:
            x, v = x.mean(0).repeat(ranks, 1), v.mean(0).repeat(ranks, 1)
            scale = (v / (1 - b2**t)).sqrt()
    return x


def train(group: SimGroup, steps: int, weight_decay: float = 0.0, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """The parameters at the end, and the scale after each step."""
    model = make_model()
    optimizer = SAVIC(model.parameters(), lr=LR, betas=BETAS, alpha=ALPHA, weight_decay=weight_decay)
    method = build("local_sgd", every=EVERY, average_state=["exp_avg_sq"], **options)
    run: Any = attach(model, method, optimizer, group=group)
    scales = []
    for step in run.range(steps):
        train_step(model, optimizer, group.rank, step)
        scales.append(torch.cat([optimizer.state[p]["scale"].reshape(-1) for p in model.parameters()]))
    run.finish()
    return flat(model), scales


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_savic_steps_by_the_scale_of_the_last_average(weight_decay: float) -> None:
    trained = SimWorld[Any](3).run(lambda group: train(group, 18, weight_decay))
    expected = reference(3, 18, weight_decay)
    torch.testing.assert_close(torch.stack([x for x, _ in trained]).double(), expected, rtol=0, atol=2e-5)


def test_the_scale_is_the_same_on_all_ranks_and_changes_at_averages_only() -> None:
    (_, first), (_, second) = SimWorld[Any](2).run(lambda group: train(group, 13))
    assert all(not torch.equal(a, b) for a, b in zip(first[:EVERY], second[:EVERY], strict=True))  # before the first
    assert all(torch.equal(a, b) for a, b in zip(first[EVERY:], second[EVERY:], strict=True))
    for step in range(EVERY + 1, 13):
        assert torch.equal(first[step], first[step - 1]) == (step % EVERY != 0)


def test_savic_by_itself_is_adam() -> None:
    savic, adam = make_model(), make_model()
    train_steps(savic, SAVIC(savic.parameters(), lr=LR, alpha=1e-12), 0, 8)
    train_steps(adam, torch.optim.Adam(adam.parameters(), lr=LR, eps=1e-12), 0, 8)
    torch.testing.assert_close(flat(savic), flat(adam), rtol=1e-5, atol=1e-6)


def test_a_compressed_average_below_zero_is_no_nan() -> None:
    trained = SimWorld[Any](2).run(lambda group: train(group, 20, message="2bit"))
    assert all(bool(x.isfinite().all()) for x, _ in trained)


@pytest.mark.parametrize("options", [{}, {"average_state": ["exp_avg"]}, {"average_state": ["exp_avg_sq"], "delay": 1}])
def test_savic_without_an_averaged_scale_is_refused(options: dict[str, Any]) -> None:
    model = make_model()
    with pytest.raises(AttachError, match=r"write average_state: \[exp_avg_sq\]"):
        attach(model, build("local_sgd", **options), SAVIC(model.parameters()))
