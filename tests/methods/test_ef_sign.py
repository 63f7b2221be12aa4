"""EF-sign with every scale against its equations in float64, and the effect of pre-scaling."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from codes import SignExchange
from synthetic import F64, check_free_run, check_steps, gradients, simulate, spans

N, STEPS, LR = 4, 22, 0.05
SHAPES = [(30, 21), (17,), (9, 5)]
SPANS = spans(SHAPES)
NUMELS = [math.prod(shape) for shape in SHAPES]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "l1": ("l1", {"block_size": 64}),
    "l2": ("l2", {"scale": "l2"}),
    "model": ("model", {"scale": "model"}),
    "model, pre-scaled": ("model", {"scale": "model", "prescale": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_the_papers_from_the_state_before_it(case: str) -> None:
    scale, options = CASES[case]
    worlds = simulate(N, SHAPES, STEPS, "ef_sign", **options)

    def paper(step: int, before: list[dict[str, F64]]) -> Any:
        g, x = gradients(SHAPES, N, step), before[0]["x"]
        k, is_clear = np.ones(x.size), np.ones(x.size, dtype=bool)
        if "prescale" in options:
            if step == 0:  # the first step is exact, and gives the factors
                sizes = [np.sqrt((g.mean(0)[span] ** 2).mean()) for span in SPANS]
                return {"x": x - LR * g.mean(0), "factors": np.mean(sizes) / sizes}, is_clear
            k = np.repeat(before[0]["factors"], [span.stop - span.start for span in SPANS])
        exchange = SignExchange.of(before, NUMELS, scale, 64)
        x = x - LR * exchange.mean(g * k) / k
        return {"x": x}, exchange.margin > 1e-4, exchange

    check_steps(worlds, paper, rtol=0.0, residual_atol=5e-6, tolerances={"factors": (1e-5, 0.0)})
    check_free_run(worlds, paper, 4, share=0.97)  # a sign or two may have been a coin's toss


@pytest.mark.parametrize("bits", [16, 8])
def test_residuals_in_few_bits_move_alike(bits: int) -> None:
    few, all_of_it = (simulate(2, SHAPES, 6, "ef_sign", residual_bits=each)[0] for each in (bits, 32))
    moved, wanted = few[-1]["x"] - few[0]["x"], all_of_it[-1]["x"] - all_of_it[0]["x"]
    assert 0 < np.linalg.norm(moved - wanted) < 0.2 * np.linalg.norm(wanted)


def test_one_scale_for_all_drowns_small_parameters_unless_they_are_pre_scaled() -> None:
    """The third parameter's gradients are a hundredth of the first one's."""
    moved = {}
    for name, options in (("plain", {}), ("pre-scaled", {"prescale": True})):
        states = simulate(2, SHAPES, 2, "ef_sign", scale="model", **options)[0]
        moved[name] = float(np.abs(states[2]["x"] - states[1]["x"])[SPANS[2]].mean()) / LR
    true = float(np.abs(gradients(SHAPES, 2, 1).mean(0)[SPANS[2]]).mean())
    assert moved["plain"] > 20 * true
    assert 0.3 * true < moved["pre-scaled"] < 3 * true
