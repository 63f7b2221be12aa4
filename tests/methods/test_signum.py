"""Signum against its equations in float64."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import F64, Parameters, Shapes, check_free_run, check_steps, gradients, simulate, stacked

from commopt import attach, build
from commopt.groups import LocalGroup

LR, DECAY = 0.01, 0.1
SHAPES: list[tuple[int, ...]] = [(50, 90), (7,), (1,), (2049,), (3, 5, 3)]


def reference(b: float, shapes: Shapes, step: int, before: list[dict[str, F64]], dead: int = 0) -> Any:
    """Bernstein et al. 2019, Algorithm 1, in float64. Returns x and m, and (n,) where no sign is in doubt."""
    g, x = gradients(shapes, len(before), step, dead=dead), before[0]["x"]
    m = b * stacked(before, "momentum") + (1 - b) * g if b else g
    total = np.sign(m).sum(0)
    clear = (np.abs(m) > 1e-6).all(0) & (total != 0)  # a tie takes a coin
    return {"x": x - LR * (np.sign(total) + DECAY * x), **({"momentum": m} if b else {})}, clear


def trained(ranks: int, shapes: Shapes, steps: int, b: float, make: Any = Parameters) -> list[list[dict[str, F64]]]:
    sgd = {"name": "sgd", "lr": LR, "weight_decay": DECAY}
    return simulate(ranks, shapes, steps, "signum", make, optimizer=sgd, momentum=b)


@pytest.mark.parametrize("b", [0.9, 0.0])
def test_every_step_is_the_papers_from_the_state_before_it(b: float) -> None:
    runs = trained(4, SHAPES, 20, b)
    check_steps(runs, partial(reference, b, SHAPES), share=0.55)
    for before, after in itertools.pairwise(runs[0]):  # ties too
        np.testing.assert_allclose(np.abs(after["x"] - before["x"] * (1 - LR * DECAY)), LR, rtol=0, atol=1e-6)


@pytest.mark.parametrize("b", [0.9, 0.0])
@pytest.mark.parametrize(("ranks", "dead"), [(3, 0), (1, 2)])
def test_a_short_run_stays_with_the_reference(ranks: int, dead: int, b: float) -> None:
    """Also that of one rank, whose sign of a zero is zero."""
    runs = trained(ranks, [(5,), (3,)], 40, b, partial(Parameters, dead=dead))
    check_free_run(runs, partial(reference, b, [(5,), (3,)], dead=dead), 40)


def test_momentum_zero_has_no_state_and_another_form() -> None:
    def states(b: float) -> Any:
        model, method = Parameters((40,)), build("signum", momentum=b)
        attach(model, method, torch.optim.SGD(model.parameters(), lr=0.01), group=LocalGroup())
        return method.saved()["rank"], len(method.state_views("all.0")), method.state_form

    assert states(0.0) == ({}, 1, "no momentum")
    assert states(0.9)[1:] == (2, "")
