"""Every optimizer against its paper in float64, and against torch's where they are the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import F64, Parameters, check_free_run, check_steps, flat, gradients, spans

from commopt.optim import LAMB, AccumAdam, Lion
from commopt.optim.optimizers import trust_ratio
from commopt.optim.outer import FedAdagrad, FedAdam, FedYogi

SHAPES: list[tuple[int, ...]] = [(30, 20), (7,), (), (2, 3, 2)]
MATRICES = np.repeat([len(shape) >= 2 for shape in SHAPES], [math.prod(shape) for shape in SHAPES])
LR, B1, B2, EPS, DECAY, TAU, STEPS = 0.02, 0.9, 0.97, 1e-6, 0.1, 1e-2, 30
DECAYED: dict[str, Any] = {"lr": LR, "betas": (B1, B2), "weight_decay": DECAY}
State = dict[str, F64]


def lion(g: F64, t: int, x: F64, momentum: F64) -> State:
    """Chen et al. 2023, arXiv:2302.06675, Algorithm 2."""
    c = B1 * momentum + (1 - B1) * g
    return {"x": x - LR * (np.sign(c) + DECAY * x), "momentum": B2 * momentum + (1 - B2) * g}


def accum_adam(s: int, g: F64, t: int, x: F64, momentum: F64, variance: F64, accumulated: F64) -> State:
    """Wang et al. 2024, arXiv:2410.11998; only tensors of two or more dimensions decay."""
    m, v, mean, k = momentum, variance, accumulated + g / s, math.ceil(t / s)
    m_hat, v_hat = (B1 * m + (1 - B1) * g) / (1 - B1**k), (B2 * v + (1 - B2) * g**2) / (1 - B2**k)
    x = x - LR * DECAY * MATRICES * x - LR * m_hat / (np.sqrt(v_hat) + EPS)
    if t % s == 0:
        m, v, mean = B1 * m + (1 - B1) * mean, B2 * v + (1 - B2) * mean**2, np.zeros_like(x)
    return {"x": x, "momentum": m, "variance": v, "accumulated": mean}


def lamb(bounds: tuple[float, float], corrects: bool, g: F64, t: int, x: F64, momentum: F64, variance: F64) -> State:
    """You et al. 2019, arXiv:1904.00962, Algorithm 2, with the clamp as phi."""
    m, v = B1 * momentum + (1 - B1) * g, B2 * variance + (1 - B2) * g**2
    m_hat, v_hat = (m / (1 - B1**t), v / (1 - B2**t)) if corrects else (m, v)
    direction, new = m_hat / (np.sqrt(v_hat) + EPS) + DECAY * x, x.copy()
    for span in spans(SHAPES):
        weight, step = np.linalg.norm(x[span]), np.linalg.norm(direction[span])
        new[span] -= LR * (np.clip(weight / step, *bounds) if weight > 0 else 1.0) * direction[span]
    return {"x": new, "momentum": m, "variance": v}


def fed_opt(kind: type, b1: float, g: F64, t: int, x: F64, momentum: F64, variance: F64) -> State:
    """Reddi et al. 2020, arXiv:2003.00295, Algorithm 2, lines 10 to 15; the replicas' mean change is -g."""
    m, square = b1 * momentum - (1 - b1) * g, g**2
    if kind is FedAdagrad:
        v = variance + square
    elif kind is FedYogi:
        v = variance - (1 - B2) * square * np.sign(variance - square)
    else:
        v = B2 * variance + (1 - B2) * square
    return {"x": x + LR * m / (np.sqrt(v) + TAU), "momentum": m, "variance": v}


CASES: list[tuple[Any, dict[str, Any], Callable[..., State]]] = [
    (Lion, DECAYED, lion),
    *((AccumAdam, {**DECAYED, "eps": EPS, "accum_iter": s}, partial(accum_adam, s)) for s in (2, 4, 7)),
    *(
        (
            LAMB,
            {**DECAYED, "eps": EPS, "min_coeff": low, "max_coeff": high, "bias_correction": corrects},
            partial(lamb, (low, high), corrects),
        )
        for low, high in ((0.01, 10.0), (0.3, 0.5))
        for corrects in (False, True)
    ),
    (FedAdagrad, {"lr": LR, "tau": TAU}, partial(fed_opt, FedAdagrad, 0.0)),
    (FedAdagrad, {"lr": LR, "tau": TAU, "beta1": B1}, partial(fed_opt, FedAdagrad, B1)),
    *(
        (kind, {"lr": LR, "tau": TAU, "beta1": B1, "beta2": B2}, partial(fed_opt, kind, B1))
        for kind in (FedAdam, FedYogi)
    ),
]


def trained(kind: Any, dtype: torch.dtype, options: dict[str, Any]) -> list[State]:
    """The state before each step, and after the last; the second parameter starts at zero, as a bias may."""
    model = Parameters(*SHAPES).to(dtype)
    torch.nn.init.zeros_(model.all[1])
    optimizer = kind(model.parameters(), **options)
    states = [{"x": model.flat()}]
    for step in range(STEPS):
        model.set_gradients(0, step)
        optimizer.step()
        each = [optimizer.state[p] for p in model.all]
        kept = {key: flat(one[key] for one in each) for key, x in each[0].items() if isinstance(x, torch.Tensor)}
        states.append({"x": model.flat(), **kept})
    start = {"variance": options["tau"] ** 2} if "tau" in options else {}
    return [{**{key: np.full_like(x, start.get(key, 0.0)) for key, x in states[-1].items()}, **states[0]}, *states[1:]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("kind", "options", "rule"), CASES)
def test_every_step_is_the_papers(
    kind: Any, options: dict[str, Any], rule: Callable[..., State], dtype: torch.dtype
) -> None:
    def paper(step: int, before: list[State]) -> Any:
        return rule(gradients(SHAPES, 1, step)[0], step + 1, **before[0]), np.ones(MATRICES.size, dtype=bool)

    states = trained(kind, dtype, options)
    near = 1e-5 if dtype == torch.float32 or kind is LAMB else 1e-12  # LAMB's norms are in float32
    check_steps([states], paper, rtol=near, atol=near)
    check_free_run([states], paper, STEPS, rtol=10 * near, atol=10 * near)
    if kind is FedYogi:  # whose variance goes both ways
        grown = np.diff([one["variance"] for one in states], axis=0)
        assert grown.min() < 0 < grown.max()


@pytest.mark.parametrize("given", [{}, {"lr": LR, "betas": (B1, B2), "eps": EPS, "weight_decay": 0.3}])
def test_without_accumulation_it_is_torchs_adam_or_adamw(given: dict[str, Any]) -> None:
    ours, theirs = (Parameters(*SHAPES).double() for _ in range(2))
    own = AccumAdam(ours.parameters(), **given, accum_iter=1, decay_1d=True)
    other = (torch.optim.AdamW if given else torch.optim.Adam)(theirs.parameters(), **given)
    for step in range(50):
        for model, optimizer in ((ours, own), (theirs, other)):
            model.set_gradients(0, step)
            optimizer.step()
        np.testing.assert_allclose(ours.flat(), theirs.flat(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("x", "direction", "expected"),
    [
        ([3.0, 4.0], [1.0, 0.0], 5.0),
        ([3.0, 4.0], [0.1, 0.0], 10.0),  # 50, beyond max_coeff
        ([3e-3, 4e-3], [1.0, 0.0], 0.01),  # 0.005, below min_coeff
        ([0.0, 0.0], [1.0, 0.0], 1.0),
        ([3.0, 4.0], [0.0, 0.0], 1.0),
        ([], [], 1.0),
    ],
)
def test_the_ratio_is_clamped_and_1_where_a_norm_is_0(x: list[float], direction: list[float], expected: float) -> None:
    assert trust_ratio(torch.tensor(x), torch.tensor(direction), 0.01, 10.0) == pytest.approx(expected)


def test_the_ratio_of_half_precision_is_of_its_values_in_float32() -> None:
    x = torch.full((70_000,), 1.0, dtype=torch.float16)  # a sum of squares beyond float16
    assert trust_ratio(x, torch.ones(70_000), 0.01, 10.0) == pytest.approx(1.0)
