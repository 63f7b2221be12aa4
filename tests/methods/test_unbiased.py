"""TernGrad, QSGD and natural compression against their equations, with the draws that they make; right on average."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from synthetic import F64, gradients, simulate, spans

from commopt import attach, build
from commopt.errors import AttachError
from commopt.groups import SimWorld
from commopt.methods import TernGrad
from commopt.wire.noise import keys, uniform

N, STEPS, LR = 4, 20, 0.05
SHAPES = [(30, 21), (17,), (9, 5)]
SPANS = spans(SHAPES)


def draws(rank: int, step: int, homes: list[int], lengths: list[int], purpose: str = "worker") -> F64:
    """(sum of lengths,) in [0, 1), as the codecs draw them for blocks at these homes."""
    counts = np.full(len(homes), step)
    return uniform(keys(0, purpose, rank, counts, np.asarray(homes)), np.asarray(lengths)).double().numpy()


def terngrad(g: F64, step: int) -> tuple[F64, F64]:
    """Wen et al. 2017, Algorithm 1: the mean, and how far from flipping its draws were."""
    y, margin = np.zeros(g.shape[1]), np.zeros(g.shape[1])
    for span in SPANS:
        bound = 2.5 * g[:, span].std(1, keepdims=True)
        c = np.clip(g[:, span], -bound, bound)
        s = np.abs(c).max()
        u = np.stack([draws(rank, step, [span.start], [span.stop - span.start]) for rank in range(len(g))])
        ratio = np.abs(c) / s  # ceil(ratio - u) rounds up with the chance of the rest
        y[span] = s * (np.sign(c) * np.ceil(ratio - u)).mean(0)
        margin[span] = np.abs((ratio - u) - np.round(ratio - u)).min(0)
    return y, margin


def qsgd(g: F64, step: int) -> tuple[F64, F64]:
    """Alistarh et al. 2017: levels of each block's L2 norm, in blocks of 64."""
    y, margin = np.zeros(g.shape[1]), np.full(g.shape[1], np.inf)
    for span in SPANS:
        for a in range(span.start, span.stop, 64):
            block = slice(a, min(a + 64, span.stop))
            scale = np.sqrt((g[:, block] ** 2).sum(1, keepdims=True)) / 7
            u = np.stack([draws(rank, step, [a], [block.stop - a]) for rank in range(len(g))])
            ratio = np.abs(g[:, block]) / scale
            y[block] = (scale * np.sign(g[:, block]) * np.ceil(ratio - u)).mean(0)
            margin[block] = np.abs((ratio - u) - np.round(ratio - u)).min(0)
    return y, margin


def natural(g: F64, step: int) -> tuple[F64, F64]:
    """Horváth et al. 2019: one of the two powers of two around each value; the mean, and its answer by the rank that serves it."""
    y, margin = np.zeros(g.shape[1]), np.zeros(g.shape[1])

    def rounded(c: F64, u: F64) -> tuple[F64, F64]:
        low = 2.0 ** np.floor(np.log2(np.maximum(np.abs(c), 1e-30)))  # a mean may be exactly zero
        chance = np.abs(c) / low - 1
        return np.sign(c) * np.where(u < chance, 2 * low, low), np.abs(u - chance)

    for owner, span in enumerate(SPANS):  # each is one block, and the first one that its owner serves
        n = [span.stop - span.start]
        sent, clear = zip(*(rounded(g[i, span], draws(i, step, [span.start], n)) for i in range(len(g))), strict=True)
        y[span], last = rounded(np.mean(sent, axis=0), draws(owner, step, [0], n, "server"))
        margin[span] = np.min([*clear, last], axis=0)
    return y, margin


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "terngrad": (terngrad, {"dense_1d": False}),
    "qsgd": (qsgd, {"levels": 7, "block_size": 64, "norm": "l2"}),
    "natural": (natural, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_every_step_is_the_papers_with_the_same_draws(name: str) -> None:
    paper, options = CASES[name]
    states = simulate(N, SHAPES, STEPS, name, **options)[0]
    compared = 0
    for step in range(STEPS):
        y, margin = paper(gradients(SHAPES, N, step), step)
        clear = margin > 1e-4
        compared += int(clear.sum())
        expected = states[step]["x"] - LR * y
        np.testing.assert_allclose(states[step + 1]["x"][clear], expected[clear], rtol=0, atol=2e-6)
    assert compared > 0.9 * STEPS * SPANS[-1].stop


@pytest.mark.parametrize(
    ("name", "options", "variance"),
    [
        ("terngrad", {"clip": 0, "dense_1d": False}, 4.0),
        ("qsgd", {"levels": 3, "norm": "max"}, 1.0),
        ("qsgd", {"levels": 3, "norm": "l2"}, 10.0),
        ("natural", {}, 0.3),
    ],
)
def test_what_is_received_is_right_on_average(name: str, options: dict[str, Any], variance: float) -> None:
    """The same gradients again and again: the mean of 600 results is their mean, though no single one is."""
    g = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))

    def work(group: Any) -> tuple[torch.Tensor, torch.Tensor]:
        model = torch.nn.Linear(300, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        attach(model, build(name, **options), sgd, group=group)
        first = torch.zeros(0)
        for step in range(600):
            model.weight.grad = g[group.rank].clone().view(1, -1)
            sgd.step()
            first = model.weight.detach().clone() if step == 0 else first
        return -first.view(-1), -model.weight.detach().view(-1) / 600

    first, mean = SimWorld[Any](2).run(work)[0]
    off = mean - g.mean(0)
    assert float(off.pow(2).mean()) < 2 * variance / 600
    assert float((first - g.mean(0)).pow(2).mean()) > 20 * float(off.pow(2).mean())


def test_terngrad_shares_one_scale_so_that_sums_are_whole_numbers() -> None:
    """With a scale of its own per rank, what is received would not be multiples of scale / N."""
    states = simulate(3, [(40, 10)], 1, "terngrad", clip=0)[0]
    y = (states[0]["x"] - states[1]["x"]) / LR
    scale = np.abs(gradients([(40, 10)], 3, 0)).max()
    multiples = y * 3 / scale
    np.testing.assert_allclose(multiples, np.round(multiples), atol=1e-4)
    assert set(np.round(multiples).astype(int)) <= set(range(-3, 4))
    assert len(set(np.round(multiples).astype(int))) > 3


@pytest.mark.parametrize("name", ["terngrad", "qsgd", "natural"])
def test_a_tensor_of_zeros_stays_zero(name: str) -> None:
    def work(group: Any) -> torch.Tensor:
        model = torch.nn.Linear(20, 20)
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        attach(model, build(name), sgd, group=group)
        before = model.weight.detach().clone()
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        sgd.step()
        return model.weight.detach() - before

    assert not any(moved.any() for moved in SimWorld[Any](3).run(work))


def test_terngrad_refuses_more_ranks_than_its_sums_have_bits_for() -> None:
    model = torch.nn.Linear(2, 2)
    group: Any = type("Many", (), {"rank": 0, "size": 128})()
    with pytest.raises(AttachError, match="up to 127 ranks, not 128"):
        TernGrad().bind(list(model.named_parameters()), group)
    with pytest.raises(AttachError, match="no trainable parameter 'head'"):
        TernGrad(dense=["head"]).bind(list(model.named_parameters()), SimWorld[Any](1).run(lambda g: g)[0])
