"""Signum against its equations in float64, and with the optimizers that it does not go with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from synthetic import F64, Parameters, gradients, simulate

from commopt import attach, build
from commopt.errors import AttachError
from commopt.groups import Group, LocalGroup, SimWorld
from commopt.optim import LAMB, Lion

LR, DECAY = 0.01, 0.1
SHAPES: list[tuple[int, ...]] = [(50, 90), (7,), (1,), (2049,), (3, 5, 3)]


def reference(x: F64, m: F64, g: F64, b: float) -> tuple[F64, F64, Any]:
    """Bernstein et al. 2019, Algorithm 1, in float64. x: (n,), m, g: (N, n). Returns x, m, and (n,) where nothing hangs by a hair."""
    m = b * m + (1 - b) * g
    total = np.sign(m).sum(0)
    clear = (np.abs(m) > 1e-6).all(0) & (total != 0)  # a tie takes a coin
    return x - LR * (np.sign(total) + DECAY * x), m, clear


def train(ranks: int, shapes: list[tuple[int, ...]], steps: int, b: float) -> list[list[tuple[F64, F64]]]:
    """[rank][step] parameters and this rank's momentum, before each step and after the last."""
    sgd = {"name": "sgd", "lr": LR, "weight_decay": DECAY}
    runs = simulate(ranks, shapes, steps, "signum", optimizer=sgd, momentum=b)
    return [[(one["x"], one.get("momentum", np.zeros_like(one["x"]))) for one in run] for run in runs]


@pytest.mark.parametrize("b", [0.9, 0.0])
def test_every_step_is_the_papers_from_the_state_before_it(b: float) -> None:
    runs = train(4, SHAPES, 20, b)
    compared = 0
    for step in range(20):
        before = np.stack([run[step][1] for run in runs])
        x, m, clear = reference(runs[0][step][0], before, gradients(SHAPES, 4, step), b)
        compared += int(clear.sum())
        for rank, run in enumerate(runs):
            assert np.array_equal(run[step + 1][0], runs[0][step + 1][0])
            np.testing.assert_allclose(run[step + 1][0][clear], x[clear], rtol=0, atol=1e-6)
            if b:
                np.testing.assert_allclose(run[step + 1][1], m[rank], rtol=1e-5, atol=1e-6)
        moved = runs[0][step + 1][0] - runs[0][step][0] * (1 - LR * DECAY)
        np.testing.assert_allclose(np.abs(moved), LR, rtol=0, atol=1e-6)  # ties too
    assert compared > 0.55 * 20 * runs[0][0][0].size


@pytest.mark.parametrize("b", [0.9, 0.0])
def test_a_short_run_of_three_ranks_stays_with_the_reference(b: float) -> None:
    shapes: list[tuple[int, ...]] = [(5,), (3,)]
    runs = train(3, shapes, 40, b)
    x, m = runs[0][0][0], np.zeros((3, 8))
    for step in range(40):
        x, m, _ = reference(x, m, gradients(shapes, 3, step), b)
    np.testing.assert_allclose(runs[0][-1][0], x, rtol=0, atol=1e-5)
    assert float(np.abs(x - runs[0][0][0]).max()) > 0.05


@pytest.mark.parametrize("b", [0.9, 0.0])
def test_one_rank_takes_the_sign_of_its_own_momentum(b: float) -> None:
    model = Parameters((30,), (4,))
    method: Any = build("signum", momentum=b)
    sgd = torch.optim.SGD(model.parameters(), lr=0.25)
    attach(model, method, sgd, group=LocalGroup())
    m = torch.zeros(34)
    for step in range(10):
        model.set_gradients(0, step)
        first = model.all[0].grad
        assert first is not None
        first[2] = 0.0
        m.lerp_(torch.cat([p.grad.view(-1) for p in model.all if p.grad is not None]), 1 - b)
        expected = torch.cat([p.detach() for p in model.all]) - 0.25 * m.sign()
        sgd.step()
        assert torch.equal(torch.cat([p.detach() for p in model.all]), expected)
    assert model.all[0][2] == Parameters((30,), (4,)).all[0][2]


def test_a_coordinate_without_any_gradient_stays_within_one_step() -> None:
    def work(group: Group) -> tuple[float, float]:
        model = Parameters((600,))
        before = model.all[0].detach().clone()
        sgd = torch.optim.SGD(model.parameters(), lr=0.01)
        attach(model, build("signum"), sgd, group=group)
        for _ in range(31):
            model.all[0].grad = torch.cat([torch.zeros(300), -torch.ones(300)])
            sgd.step()
        moved = (model.all[0].detach() - before).abs()
        return float(moved[:300].max()), float(moved[300:].min())

    for ranks in (2, 3, 4):
        for unused, used in SimWorld[Any](ranks).run(work):
            assert unused <= 0.01 + 1e-6
            assert used == pytest.approx(0.31, rel=1e-4)


def test_momentum_zero_has_no_state_and_another_form() -> None:
    def states(b: float) -> Any:
        model, method = Parameters((40,)), build("signum", momentum=b)
        attach(model, method, torch.optim.SGD(model.parameters(), lr=0.01), group=LocalGroup())
        return method.saved()["rank"], len(method.state_views("all.0")), method.state_form

    assert states(0.0) == ({}, 1, "no momentum")
    assert states(0.9)[1:] == (2, "")


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "SGD with momentum 0.9 would smooth signs"),
        (lambda p: torch.optim.RMSprop(p, momentum=0.5), "RMSprop with momentum 0.5 would smooth signs"),
        (torch.optim.RMSprop, "RMSprop scales what it gets"),
        (torch.optim.Adam, "Adam scales what it gets"),
        (torch.optim.AdamW, "AdamW scales what it gets"),
        (torch.optim.Adagrad, "Adagrad scales what it gets"),
        (torch.optim.Rprop, "Rprop scales what it gets"),
        (Lion, "Lion scales what it gets"),
        (LAMB, "LAMB scales what it gets"),
    ],
)
def test_an_optimizer_with_a_mind_of_its_own_is_refused_with_the_fix(make: Any, complaint: str) -> None:
    model = Parameters((4,))
    with pytest.raises(AttachError) as caught:
        attach(model, build("signum"), make(model.parameters()))
    assert complaint in str(caught.value)
    assert "torch.optim.SGD(parameters, lr=1e-4) without momentum" in str(caught.value)


def test_a_later_parameter_groups_momentum_is_seen_too() -> None:
    model = Parameters((4,), (5,))
    groups: list[dict[str, Any]] = [{"params": [model.all[0]]}, {"params": [model.all[1]], "momentum": 0.9}]
    with pytest.raises(AttachError, match=r"SGD with momentum 0\.9"):
        attach(model, build("signum"), torch.optim.SGD(groups, lr=0.1))
