"""Signum against its equations in float64, and the optimizers that it refuses."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import F64, Parameters, check_steps, gradients, simulate, stacked

from commopt import attach, build
from commopt.errors import AttachError
from commopt.groups import LocalGroup
from commopt.optim import LAMB, Lion

LR, DECAY = 0.01, 0.1
SHAPES: list[tuple[int, ...]] = [(50, 90), (7,), (1,), (2049,), (3, 5, 3)]


def reference(x: F64, m: F64, g: F64, b: float) -> tuple[F64, F64, Any]:
    """Bernstein et al. 2019, Algorithm 1, in float64. x: (n,), m, g: (N, n). Returns x, m, and (n,) where no sign is in doubt."""
    m = b * m + (1 - b) * g
    total = np.sign(m).sum(0)
    clear = (np.abs(m) > 1e-6).all(0) & (total != 0)  # a tie takes a coin
    return x - LR * (np.sign(total) + DECAY * x), m, clear


def trained(ranks: int, shapes: list[tuple[int, ...]], steps: int, b: float) -> list[list[dict[str, F64]]]:
    sgd = {"name": "sgd", "lr": LR, "weight_decay": DECAY}
    return simulate(ranks, shapes, steps, "signum", optimizer=sgd, momentum=b)


@pytest.mark.parametrize("b", [0.9, 0.0])
def test_every_step_is_the_papers_from_the_state_before_it(b: float) -> None:
    def paper(step: int, before: list[dict[str, F64]]) -> Any:
        old = stacked(before, "momentum") if b else np.zeros((4, before[0]["x"].size))
        x, m, clear = reference(before[0]["x"], old, gradients(SHAPES, 4, step), b)
        return {"x": x, **({"momentum": m} if b else {})}, clear

    runs = trained(4, SHAPES, 20, b)
    check_steps(runs, paper, share=0.55)
    for before, after in itertools.pairwise(runs[0]):  # ties too
        np.testing.assert_allclose(np.abs(after["x"] - before["x"] * (1 - LR * DECAY)), LR, rtol=0, atol=1e-6)


@pytest.mark.parametrize("b", [0.9, 0.0])
def test_a_short_run_of_three_ranks_stays_with_the_reference(b: float) -> None:
    shapes: list[tuple[int, ...]] = [(5,), (3,)]
    run = trained(3, shapes, 40, b)[0]
    x, m = run[0]["x"], np.zeros((3, 8))
    for step in range(40):
        x, m, _ = reference(x, m, gradients(shapes, 3, step), b)
    np.testing.assert_allclose(run[-1]["x"], x, rtol=0, atol=1e-5)
    assert float(np.abs(x - run[0]["x"]).max()) > 0.05


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
def test_an_optimizer_that_rescales_or_smooths_signs_is_refused_with_the_fix(make: Any, complaint: str) -> None:
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
