"""1-bit LAMB against its equations in float64, against LAMB, and at its freeze."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from codes import SignExchange, tensors_of
from rig import start
from synthetic import F64, check_free_run, check_steps, gradients, parameters, simulate
from torch import nn

from commopt.groups import Group, SimWorld

LR, B1, B2, EPS, DECAY, FREEZE, STEPS = 0.02, 0.9, 0.95, 1e-6, 0.1, 10, 40
BOUNDS, BETA, F_MIN, F_MAX, F_STEP = (0.01, 10.0), 0.8, 0.5, 4.0, 0.1
SHAPES: list[tuple[int, ...]] = [(41, 51), (7,), (1,), (0,), (3, 5, 3)]
NUMELS = [math.prod(shape) for shape in SHAPES]
KEYS = ("x", "momentum", "variance", "fresh_variance", "coeff", "factor")


def reference(scale: str, corrects: bool, step: int, before: list[dict[str, F64]]) -> Any:
    """Li et al. 2021, Algorithm 1, in float64: flat tensors of all parameters, and (P,) what is one number for each with elements.

    coeff: the mean of c, corrected for its start at 0 from the freeze on. Also (n,) where no sign is in doubt.
    """
    g, t = gradients(SHAPES, len(before), step, mean=0.5, dead=2), step + 1
    x, m, v, w, coeff, factor = (before[0][key].copy() for key in KEYS)
    exchange, live = SignExchange.of(before, NUMELS, scale), v > 0
    if t <= FREEZE:
        m, v = B1 * m + (1 - B1) * g.mean(0), B2 * v + (1 - B2) * g.mean(0) ** 2
        w, clear = v if t == FREEZE else w, np.ones_like(live)
    else:
        old, m = m, exchange.mean(B1 * m + (1 - B1) * g) * live
        w = B2 * w + (1 - B2) * ((m - B1 * old) / (1 - B1)) ** 2
        clear = exchange.margin > 1e-4
    bias = (1 - B1**t, 1 - B2 ** min(t, FREEZE), 1 - B2**t) if corrects else (1.0, 1.0, 1.0)
    root, fresh = np.sqrt(v / bias[1]) + EPS, np.sqrt(w / bias[2]) + EPS
    adam = m / bias[0] / root
    direction = adam + DECAY * x
    for k, span in enumerate(tensors_of(NUMELS)):
        whole = np.linalg.norm(direction[span])
        if t <= FREEZE:
            rate = np.clip(np.linalg.norm(x[span]) / whole, *BOUNDS)
            coeff[k] = BETA * coeff[k] + (1 - BETA) * rate
        else:
            f = (root / fresh)[span][live[span]].max()
            share = min(1.0, np.linalg.norm(adam[span]) / whole)
            f = np.clip(f * share + 1 - share, F_MIN, F_MAX)
            factor[k] = np.clip(f, factor[k] * (1 - F_STEP), factor[k] * (1 + F_STEP))
            rate = coeff[k] / (1 - BETA**FREEZE) * factor[k]
        x[span] -= LR * rate * direction[span]
    return dict(zip(KEYS, (x, m, v, w, coeff, factor), strict=True)), clear, exchange


def given(**changes: Any) -> dict[str, Any]:
    options = {"lr": LR, "betas": (B1, B2), "eps": EPS, "weight_decay": DECAY, "freeze_step": FREEZE}
    return {**options, "coeff_beta": BETA, **changes}


def train(ranks: int, steps: int, shapes: list[tuple[int, ...]] = SHAPES, **options: Any) -> list[list[dict[str, Any]]]:
    """Per-tensor state of tensors without elements is left out."""
    runs = simulate(ranks, shapes, steps, "onebit_lamb", parameters, **given(**options))
    live = [math.prod(shape) > 0 for shape in shapes]
    return [[{**state, **{key: state[key][live] for key in ("coeff", "factor")}} for state in run] for run in runs]


@pytest.mark.parametrize(("scale", "corrects"), [("rms", False), ("l2", True)])
def test_every_step_is_the_papers_from_the_state_before_it(scale: str, corrects: bool) -> None:
    runs = train(4, STEPS, scale=scale, bias_correction=corrects)
    near = ((1e-4, 1e-5), (2e-5, 2e-6), (2e-5, 1e-9), (1e-3, 1e-7), (1e-5, 0.0), (1e-4, 0.0))
    tolerances = dict(zip(KEYS, near, strict=True))
    check_steps(runs, partial(reference, scale, corrects), share=0.99, residual_atol=2e-5, tolerances=tolerances)
    assert np.ptp([state["factor"] for state in runs[0]], axis=0).min() > 0.05  # f has moved, in every tensor


def test_a_short_run_stays_with_the_reference() -> None:
    check_free_run(train(4, FREEZE + 10), partial(reference, "rms", False), FREEZE + 10, share=0.5, atol=1e-4)


def factors(group: Group, *, dead: int, masked: int, gain: float) -> list[float]:
    """f of each step after the freeze, where gradients are `gain` times what they were before it."""
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(64))
    mask = torch.ones(64)
    mask[:masked] = 0.0
    options = given(bias_correction=True, weight_decay=0.0, momentum_mask={"w": mask})
    run = start(model, "onebit_lamb", group, **options)
    seen = []
    for step in range(30):
        model.w.grad = torch.full((64,), gain if step >= FREEZE else 1.0)
        model.w.grad[:dead] = 0.0
        run.optimizer.step()
        seen.append(run.method.entry("w")["factor"])
    return seen[FREEZE:]


@pytest.mark.parametrize(("dead", "masked"), [(0, 0), (8, 0), (0, 8)])
def test_coordinates_that_cannot_move_do_not_affect_the_factor(dead: int, masked: int) -> None:
    """Growing gradients lower the factor, shrinking ones raise it; a dead coordinate's ratio would be 1."""
    growing = SimWorld[Any](2).run(lambda group: factors(group, dead=dead, masked=masked, gain=10.0))
    shrinking = SimWorld[Any](2).run(lambda group: factors(group, dead=dead, masked=masked, gain=0.5))
    assert growing[0] == growing[1]
    assert shrinking[0] == shrinking[1]
    assert growing[0][-1] == 0.5  # factor_min
    assert 1.0 < shrinking[0][-1] < 2.5


def test_the_factor_keeps_its_bounds_and_those_of_its_change() -> None:
    run = train(3, STEPS, factor_min=0.7, factor_max=1.2, factor_threshold=0.05)[0]
    seen = np.stack([state["factor"] for state in run])
    assert (seen >= 0.7).all()
    assert (seen <= 1.2).all()
    assert (np.abs(seen[1:] / seen[:-1] - 1) <= 0.05 + 1e-9).all()
    assert np.ptp(seen) > 0.05


@pytest.mark.parametrize(("scale", "prescale"), [("rms", False), ("l2", False), ("model", True)])
def test_empty_and_zero_tensors_are_safe_and_left_alone(scale: str, prescale: bool) -> None:
    """In the released code an empty tensor made every scale NaN, and one without momentum divided by 0."""

    def work(group: Group) -> Any:
        model = parameters((30, 20), (0,), (9,), (7,))
        with torch.no_grad():
            model.all[3].zero_()  # no weights, but gradients: its ratio is 1 in the first step
        options = given(scale=scale, prescale=prescale, weight_decay=0.0)
        run = start(model, "onebit_lamb", group, **options)
        first = [p.detach().clone() for p in model.all]
        for step in range(25):
            model.set_gradients(group.rank, step)
            model.all[2].grad = torch.zeros(9)
            run.optimizer.step()
        return first, [p.detach().clone() for p in model.all], run.method.entry("all.1")["coeffs"]

    results = SimWorld[Any](3).run(work)
    for first, end, coeffs in results:
        assert all(bool(x.isfinite().all()) for x in end)
        assert torch.equal(first[2], end[2])
        assert coeffs == 0
        assert bool((first[3] != end[3]).all())
        assert all(torch.equal(a, b) for a, b in zip(end, results[0][1], strict=True))


def test_a_tensor_without_any_coefficient_before_the_freeze_goes_on_with_1() -> None:
    """Its rate would be 0 for ever where the mean starts at 0, as in the paper."""

    def work(group: Group) -> tuple[float, int]:
        model = parameters((20,))
        with torch.no_grad():
            model.all[0].zero_()
        run = start(model, "onebit_lamb", group, **given(freeze_step=1, weight_decay=0.0))
        model.all[0].grad = torch.ones(20)
        run.optimizer.step()
        coeffs, before = run.method.entry("all.0")["coeffs"], model.all[0].detach().clone()
        model.all[0].grad = torch.ones(20)
        run.optimizer.step()
        return float((model.all[0].detach() - before).abs().min()), coeffs

    for moved, coeffs in SimWorld[Any](2).run(work):
        assert coeffs == 0
        assert moved > 0


def test_pre_scaling_keeps_small_tensors_from_being_drowned_by_one_scale() -> None:
    """With one scale for gradients of 1 and of 1e-3, the momentum of the small ones is 1,000 times too large."""
    shapes: list[tuple[int, ...]] = [(40, 40), (40,), (40,)]  # gradients of 1, 0.1 and 0.01

    def size(prescale: bool) -> float:
        state = train(3, FREEZE + 1, shapes, scale="model", prescale=prescale)[0][-1]
        return float(np.abs(state["momentum"][-40:]).mean())

    assert size(True) < 0.05
    assert size(False) > 0.1
