"""EF21 and EF21-SGDM against their equations in float64, and what keeps h the mean of all h_i."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from codes import block_signs, server_at_home
from rig import normal
from synthetic import exchange, gradients, simulate
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
    clear_enough = 0
    for step in range(25):
        before, after, g = [r[step] for r in runs], [r[step + 1] for r in runs], gradients(SHAPES, 4, step)
        v = g if eta == 1 or step == 0 else (1 - eta) * np.stack([b["average"] for b in before]) + eta * g
        known, w = np.stack([b["known"] for b in before]), before[0]["estimate"]
        h = server_at_home([b["served"] for b in before], NUMELS, "l1") if server else w
        if step == 0:
            known, h, w, clear = v, v.mean(0), v.mean(0), np.asarray(np.ones(len(w), dtype=bool))
        else:
            c, margin = (np.stack(x) for x in zip(*(block_signs(one, NUMELS) for one in v - known), strict=True))
            known, h, clear = known + c, h + c.mean(0), np.asarray((margin > 1e-4).all(0))
            if server:
                answer, margin = block_signs(h - w, NUMELS)
                clear &= margin > 1e-4
            w = w + answer if server else h
        clear_enough += int(clear.sum())
        for i, one in enumerate(after):
            assert np.array_equal(one["estimate"], after[0]["estimate"])
            np.testing.assert_allclose(one["estimate"][clear], w[clear], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(one["known"][clear], known[i][clear], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(one.get("average", v[i]), v[i], rtol=1e-5, atol=1e-6)
            assert ("average" in one) == (eta < 1)
            np.testing.assert_allclose(one["x"], before[i]["x"] - 0.05 * one["estimate"], rtol=1e-5, atol=1e-6)
        if server:
            found = server_at_home([a["served"] for a in after], NUMELS, "l1")
            np.testing.assert_allclose(found[clear], h[clear], rtol=1e-4, atol=1e-5)
    assert clear_enough > 0.99 * 25 * len(w)


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
@pytest.mark.parametrize("bad_step", [0, 3])
def test_a_void_message_moves_nobody(server: str | None, bad_step: int) -> None:
    def work(group: Group) -> tuple[str | None, bool, bool]:
        method = EF21(server=server)
        method.bind([("a", torch.zeros(70, 9)), ("b", torch.zeros(11))], group)
        for step in range(6):
            a, b = torch.split(normal(641, 10 * step + group.rank), [630, 11])
            before = copy.deepcopy(method.saved())
            if (step, group.rank) == (bad_step, 1):
                b[3] = math.inf
            bucket = Bucket.of([("a", a), ("b", b)])
            exchange(method, bucket, group)
            if step == bad_step:
                void = bucket.void
                same = all(
                    torch.equal(x, method.saved()[part][key])
                    for part, tensors in before.items()
                    for key, x in tensors.items()
                )
        return void, same, bool(bucket.flat.isfinite().all())

    assert SimWorld[Any](3).run(work) == [("b", True, True)] * 3


def test_one_rank_is_sgd_with_momentum() -> None:
    x = simulate(1, SHAPES, 8, "ef21", eta=0.1)[0][-1]["x"]
    v, expected = gradients(SHAPES, 1, 0)[0], simulate(1, SHAPES, 0, "ef21")[0][0]["x"]
    for step in range(8):
        v = v if step == 0 else 0.9 * v + 0.1 * gradients(SHAPES, 1, step)[0]
        expected = expected - 0.05 * v
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)
