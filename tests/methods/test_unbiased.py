"""TernGrad, QSGD and natural compression against their equations, with the draws that they make; right on average."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from synthetic import F64, check_steps, gradients, simulate, spans

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
    code, options = CASES[name]

    def paper(step: int, before: list[dict[str, F64]]) -> Any:
        y, margin = code(gradients(SHAPES, N, step), step)
        return {"x": before[0]["x"] - LR * y}, margin > 1e-4

    check_steps(simulate(N, SHAPES, STEPS, name, **options), paper, rtol=0.0)


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
