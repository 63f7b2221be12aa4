"""Signum against its equations in float64."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import F64, Parameters, check_steps, gradients, simulate, stacked

from commopt import attach, build
from commopt.groups import LocalGroup

LR, DECAY = 0.01, 0.1
SHAPES: list[tuple[int, ...]] = [(50, 90), (7,), (1,), (2049,), (3, 5, 3)]


def reference(x: F64, m: F64, g: F64, b: float) -> tuple[F64, F64, Any]:
    """Bernstein et al. 2019, Algorithm 1, in float64. x: (n,), m, g: (N, n). Returns x, m, and (n,) where no sign is in doubt."""
    m = b * m + (1 - b) * g
    total = np.sign(m).sum(0)
    clear = (np.abs(m) > 1e-6).all(0) & (total != 0)  # a tie takes a coin
    return x - LR * (np.sign(total) + DECAY * x), m, clear


def trained(
    ranks: int, shapes: list[tuple[int, ...]], steps: int, b: float, make: Any = Parameters
) -> list[list[dict[str, F64]]]:
    sgd = {"name": "sgd", "lr": LR, "weight_decay": DECAY}
    return simulate(ranks, shapes, steps, "signum", make, optimizer=sgd, momentum=b)


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
@pytest.mark.parametrize(("ranks", "dead"), [(3, 0), (1, 2)])
def test_a_short_run_stays_with_the_reference(ranks: int, dead: int, b: float) -> None:
    """Also that of one rank, whose sign of a zero is zero."""
    shapes: list[tuple[int, ...]] = [(5,), (3,)]
    run = trained(ranks, shapes, 40, b, partial(Parameters, dead=dead))[0]
    x, m = run[0]["x"], np.zeros((ranks, 8))
    for step in range(40):
        x, m, _ = reference(x, m, gradients(shapes, ranks, step, dead=dead), b)
    np.testing.assert_allclose(run[-1]["x"], x, rtol=0, atol=1e-5)
    assert float(np.abs(x - run[0]["x"]).max()) > 0.05


def test_momentum_zero_has_no_state_and_another_form() -> None:
    def states(b: float) -> Any:
        model, method = Parameters((40,)), build("signum", momentum=b)
        attach(model, method, torch.optim.SGD(model.parameters(), lr=0.01), group=LocalGroup())
        return method.saved()["rank"], len(method.state_views("all.0")), method.state_form

    assert states(0.0) == ({}, 1, "no momentum")
    assert states(0.9)[1:] == (2, "")
