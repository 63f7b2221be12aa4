"""EF21 and EF21-SGDM against their equations in float64, and what keeps h the mean of all h_i."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from codes import block_signs, server_at_home
from rig import normal
from synthetic import F64, check_steps, exchange, gradients, simulate, stacked
from torch import Tensor

from commopt.groups import Group, SimWorld
from commopt.methods import EF21
from commopt.wire.bucket import Bucket

SHAPES: list[tuple[int, ...]] = [(30, 21), (17,), (2049,)]
NUMELS = [630, 17, 2049]
TOP_K = {"compressor": "top_k", "density": 0.1, "value_bits": 32}


@pytest.mark.parametrize(("eta", "server"), [(1.0, None), (0.1, None), (0.1, "sign")])
def test_every_step_is_the_papers_from_the_state_before_it(eta: float, server: str | None) -> None:
    runs = simulate(4, SHAPES, 25, "ef21", eta=eta, server=server)
    assert ("average" in runs[0][0]) == (eta < 1)
    for states in zip(*runs, strict=True) if server else ():
        served = server_at_home([one["served"] for one in states], NUMELS, "l1")
        for one in states:
            one["served"] = served

    def paper(step: int, before: list[dict[str, F64]]) -> Any:
        g, known, w = gradients(SHAPES, 4, step), stacked(before, "known"), before[0]["estimate"]
        clear: Any = np.ones(len(w), dtype=bool)
        v = g if eta == 1 or step == 0 else (1 - eta) * stacked(before, "average") + eta * g
        if step == 0:
            known, h, w = v, v.mean(0), v.mean(0)
        else:
            c, margin = (np.stack(x) for x in zip(*(block_signs(one, NUMELS) for one in v - known), strict=True))
            known, h, clear = known + c, before[0].get("served", w) + c.mean(0), (margin > 1e-4).all(0)
            answer, margin = block_signs(h - w, NUMELS) if server else (h - w, margin.min(0))
            w, clear = w + answer, clear & (margin > 1e-4)
        expected = {"x": before[0]["x"] - 0.05 * w, "estimate": w, "known": known}
        return {**expected, **({"average": v} if eta < 1 else {}), **({"served": h} if server else {})}, clear

    check_steps(runs, paper, share=0.99, rtol=1e-4, atol=1e-5, tolerances={"average": (1e-5, 1e-6)})


@pytest.mark.parametrize("compressor", ["sign", TOP_K, "int8", {"compressor": "random_k", "density": 0.3}])
@pytest.mark.parametrize("ranks", [2, 5])
def test_h_stays_the_mean_of_h_i_and_the_same_bits_on_all_ranks(compressor: Any, ranks: int) -> None:
    options = {"compressor": compressor, "dense_1d": True, "refresh_every": 20}
    last = [run[-1] for run in simulate(ranks, SHAPES, 30, "ef21", **options)]
    assert all(np.array_equal(one["estimate"], last[0]["estimate"]) for one in last)
    np.testing.assert_allclose(last[0]["estimate"], np.mean([one["known"] for one in last], 0), rtol=0, atol=2e-6)
    assert all(not np.array_equal(one["known"], last[0]["estimate"]) for one in last)


def distances(gradient: Tensor, first: Tensor, steps: int, **options: Any) -> list[tuple[float, float]]:
    """(||h_i - g_i||^2, |h_i - g_i|_1) before each step with a constant gradient, after a first step with another one."""

    def work(group: Group) -> list[tuple[float, float]]:
        method = EF21(eta=1.0, **options)
        method.bind([("x", gradient)], group)
        exchange(method, Bucket.of([("x", first)]), group)
        found = []
        for _ in range(steps):
            rest = (gradient * (group.rank + 1) - method.state["known"]).double()
            found.append((float(rest.square().sum()), float(rest.abs().sum())))
            exchange(method, Bucket.of([("x", gradient * (group.rank + 1))]), group)
        return found

    return SimWorld[list[tuple[float, float]]](2).run(work)[1]


def test_with_a_constant_gradient_h_i_comes_nearer_by_the_compressors_delta_in_every_step() -> None:
    n = 1000
    g, first = normal(n, 1), normal(n, 2)
    by_sign = distances(g, first, 30)
    for (square, one_norm), (later, _) in itertools.pairwise(by_sign):
        delta = one_norm**2 / n / square
        assert later == pytest.approx((1 - delta) * square, rel=1e-4)
    by_top_k = distances(g, first, 30, compressor=TOP_K)
    for (square, _), (later, _) in itertools.pairwise(by_top_k):
        assert later <= (1 - 0.1) * square + 1e-9
    assert by_top_k[10][0] < 1e-9 * by_top_k[0][0]  # ten steps of a tenth have sent everything
    coarse = distances(g, first, 30, compressor="qsgd")
    assert all(later < square for (square, _), (later, _) in itertools.pairwise(coarse))


@pytest.mark.parametrize("server", [None, "sign"])
def test_a_void_first_message_moves_nobody(server: str | None) -> None:
    def work(group: Group) -> None:
        method = EF21(server=server)
        method.bind([("a", torch.zeros(70, 9)), ("b", torch.zeros(11))], group)
        bucket = Bucket.of([("a", torch.ones(630)), ("b", torch.full((11,), math.inf if group.rank == 1 else 1.0))])
        assert exchange(method, bucket, group).void == "b"
        assert not any(x.any() for tensors in method.saved().values() for x in tensors.values())

    SimWorld[None](3).run(work)


def test_one_rank_is_sgd_with_momentum() -> None:
    x = simulate(1, SHAPES, 8, "ef21", eta=0.1)[0][-1]["x"]
    v, expected = gradients(SHAPES, 1, 0)[0], simulate(1, SHAPES, 0, "ef21")[0][0]["x"]
    for step in range(8):
        v = v if step == 0 else 0.9 * v + 0.1 * gradients(SHAPES, 1, step)[0]
        expected = expected - 0.05 * v
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)
