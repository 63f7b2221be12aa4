"""EF-sign with every scale against its equations in float64, and what pre-scaling is for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from synthetic import F64, gradients, simulate, spans

N, STEPS, LR = 4, 22, 0.05
SHAPES = [(30, 21), (17,), (9, 5)]
SPANS = spans(SHAPES)


def cut(span: slice, size: int) -> list[slice]:
    return [slice(a, min(a + size, span.stop)) for a in range(span.start, span.stop, size)]


def chunks(scale: str) -> list[list[slice]]:
    """The runs of elements that share a server's scale, each a list of blocks: by block, by chunk, or by the rank that serves."""
    if scale == "l1":
        return [[block] for span in SPANS for block in cut(span, 64)]
    of_rank = [cut(span, 8 * math.ceil((span.stop - span.start) / (8 * N))) for span in SPANS]
    if scale == "l2":
        return [[block] for blocks in of_rank for block in blocks]
    return [[blocks[rank] for blocks in of_rank if rank < len(blocks)] for rank in range(N)]


def signs(c: F64, groups: list[list[slice]], scale: str) -> tuple[F64, F64]:
    """C(c) with one scale for each group of blocks, and |c| in units of its scale."""
    q, distance = np.empty_like(c), np.empty_like(c)
    for group in groups:
        whole = np.concatenate([c[block] for block in group])
        size = np.abs(whole).mean() if scale == "l1" else np.sqrt((whole**2).mean())
        for block in group:
            q[block], distance[block] = np.where(c[block] >= 0, size, -size), np.abs(c[block]) / size
    return q, distance


def two_way(g: F64, e: F64, s: F64, scale: str) -> tuple[F64, F64, F64, F64]:
    """Karimireddy et al. 2019 with DoubleSqueeze's server: the result, both residuals, and how clear the signs were."""
    workers = {"l1": chunks("l1"), "l2": [[span] for span in SPANS], "model": [[slice(0, g.shape[1])]]}[scale]
    sent, clear = zip(*(signs(c, workers, scale) for c in g + e), strict=True)
    a = np.mean(sent, axis=0) + s
    y, distance = signs(a, chunks(scale), scale)
    return y, g + e - np.stack(sent), a - y, np.min([*clear, distance], axis=0)


def server_residual(states: list[dict[str, F64]], scale: str) -> F64:
    """(n,) the servers' residuals where their elements lie: block b is rank b mod N's, a parameter's chunk j is rank j's."""
    if scale == "l1":
        owned = [(number % N, block) for number, (block,) in enumerate(chunks("l1"))]
    else:
        size = [8 * math.ceil((span.stop - span.start) / (8 * N)) for span in SPANS]
        owned = [(rank, b) for span, n in zip(SPANS, size, strict=True) for rank, b in enumerate(cut(span, n))]
    whole, place = np.zeros(SPANS[-1].stop), [0] * N
    for rank, block in owned:
        n = block.stop - block.start
        whole[block] = states[rank]["server_residual"][place[rank] : place[rank] + n]
        place[rank] += n
    return whole


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
    compared = 0
    for step in range(STEPS):
        before = [states[step] for states in worlds]
        g = gradients(SHAPES, N, step)
        k = np.ones(g.shape[1])
        if "prescale" in options:
            if step == 0:  # the first step is exact, and gives the factors
                mean = g.mean(0)
                np.testing.assert_allclose(worlds[0][1]["x"], before[0]["x"] - LR * mean, rtol=0, atol=1e-6)
                sizes = [np.sqrt((mean[span] ** 2).mean()) for span in SPANS]
                np.testing.assert_allclose(worlds[0][1]["factors"], np.mean(sizes) / sizes, rtol=1e-5)
                continue
            k = np.repeat(before[0]["factors"], [span.stop - span.start for span in SPANS])
        e = np.stack([state["worker_residual"] for state in before])
        y, left, served, clear = two_way(g * k, e, server_residual(before, scale), scale)
        good = clear > 1e-4
        compared += int(good.sum())
        after = [states[step + 1] for states in worlds]
        np.testing.assert_allclose(after[0]["x"][good], (before[0]["x"] - LR * y / k)[good], rtol=0, atol=2e-6)
        np.testing.assert_allclose(np.stack([s["worker_residual"] for s in after])[:, good], left[:, good], atol=5e-6)
        np.testing.assert_allclose(server_residual(after, scale)[good], served[good], atol=5e-6)
    assert compared > 0.9 * (STEPS - 1) * SPANS[-1].stop


@pytest.mark.parametrize("case", CASES)
def test_a_free_run_is_the_papers(case: str) -> None:
    scale, options = CASES[case]
    x = simulate(1, SHAPES, 0, "dense")[0][0]["x"]
    e, s, k = np.zeros((N, x.size)), np.zeros(x.size), np.ones(x.size)
    for step in range(4):
        g = gradients(SHAPES, N, step)
        if step == 0 and "prescale" in options:
            sizes = [np.sqrt((g.mean(0)[span] ** 2).mean()) for span in SPANS]
            k = np.repeat(np.mean(sizes) / sizes, [span.stop - span.start for span in SPANS])
            x = x - LR * g.mean(0)
            continue
        y, e, s, _ = two_way(g * k, e, s, scale)
        x = x - LR * y / k
    ours = simulate(N, SHAPES, 4, "ef_sign", **options)[0][-1]["x"]
    assert np.median(np.abs(ours - x)) < 1e-6
    assert (np.abs(ours - x) < 1e-5).mean() > 0.97  # a sign or two may have been a coin's toss


def test_one_scale_for_all_drowns_small_parameters_unless_they_are_pre_scaled() -> None:
    """The third parameter's gradients are a hundredth of the first one's."""
    moved = {}
    for name, options in (("plain", {}), ("pre-scaled", {"prescale": True})):
        states = simulate(2, SHAPES, 2, "ef_sign", scale="model", **options)[0]
        moved[name] = float(np.abs(states[2]["x"] - states[1]["x"])[SPANS[2]].mean()) / LR
    true = float(np.abs(gradients(SHAPES, 2, 1).mean(0)[SPANS[2]]).mean())
    assert moved["plain"] > 20 * true
    assert 0.3 * true < moved["pre-scaled"] < 3 * true
