"""Deep Gradient Compression against its equations in float64, against SGD with momentum, and its pitfalls."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from codes import largest
from rig import start
from synthetic import F64, Parameters, check_free_run, check_steps, gradients, simulate, spans
from torch import nn

from commopt import attach, build
from commopt.groups import Group, SimWorld

N, SHAPES, LR, MOMENTUM = 4, [(30, 21), (17,), (9, 5)], 0.05, 0.8
ADAM = {"name": "adam", "lr": LR}


def reference(u: F64, v: F64, g: F64, nesterov: bool, masking: bool) -> tuple[F64, F64, F64, F64]:
    """Lin et al. 2018, Algorithm 2 on one rank: what is sent, u and v after it, and how clear the choice was."""
    u = MOMENTUM * (u + g) if nesterov else MOMENTUM * u + g
    v = v + u + g if nesterov else v + u
    sent, margin = largest(v, 0.1, NUMELS)
    return sent, np.where(sent != 0, 0.0, u) if masking else u, v - sent, margin


def trained(ranks: int, steps: int, **options: Any) -> list[list[dict[str, F64]]]:
    return simulate(ranks, SHAPES, steps, "dgc", momentum=MOMENTUM, **options)


def local_gradient(rank: int, step: int) -> F64:
    return np.asarray(gradients(SHAPES, rank + 1, step)[rank])


SPANS = spans(SHAPES)
NUMELS = [math.prod(shape) for shape in SHAPES]


@pytest.mark.parametrize(("nesterov", "masking"), [(False, True), (True, True), (False, False)])
def test_every_step_is_the_papers_from_the_state_before_it(nesterov: bool, masking: bool) -> None:
    def paper(step: int, before: list[dict[str, F64]]) -> Any:
        rows = [
            reference(one["velocity"], one["worker_residual"], local_gradient(rank, step), nesterov, masking)
            for rank, one in enumerate(before)
        ]
        sent, u, v, margin = (np.stack(x) for x in zip(*rows, strict=True))
        return {"x": before[0]["x"] - LR * sent.mean(0), "velocity": u, "worker_residual": v}, margin.min(0) > 1e-5

    runs = trained(N, 24, density=0.1, value_bits=32, dense_1d=False, nesterov=nesterov, masking=masking)
    check_steps(runs, paper, rtol=0.0)
    check_free_run(runs, paper, 6)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("ranks", [1, 3])
def test_density_1_and_one_rank_are_sgd_with_momentum(ranks: int, nesterov: bool) -> None:
    """Through the masked path the momentum would be gone at density 1."""
    options: dict[str, Any] = {"density": 1} if ranks > 1 else {"density": 0.01}
    ours = trained(ranks, 12, nesterov=nesterov, **options)[0][-1]["x"]
    model = Parameters(*SHAPES)
    sgd = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, nesterov=nesterov)
    for step in range(12):
        mean = torch.from_numpy(gradients(SHAPES, ranks, step).mean(0)).float()
        for p, g in zip(model.all, torch.split(mean, NUMELS), strict=True):
            p.grad = g.view(p.shape)
        sgd.step()
    np.testing.assert_allclose(ours, model.flat(), rtol=0, atol=2e-6)


def test_biases_are_averaged_exactly_and_take_their_momentum_afterwards() -> None:
    world = trained(3, 5, density=0.01)
    u = np.zeros(17)
    x = Parameters(*SHAPES).flat()[SPANS[1]]
    for step in range(5):
        u = MOMENTUM * u + np.mean([local_gradient(rank, step)[SPANS[1]] for rank in range(3)], axis=0)
        x = x - LR * u
    np.testing.assert_allclose(world[0][-1]["x"][SPANS[1]], x, rtol=0, atol=1e-6)


def test_weight_decay_may_have_momentum_as_in_the_released_code() -> None:
    optimizer = {"name": "sgd", "lr": LR, "weight_decay": 0.1}
    without, ours = (
        trained(2, 8, density=0.1)[0],
        trained(2, 8, optimizer=optimizer, density=0.1, decay_momentum=True)[0],
    )
    x, d = without[0]["x"], np.zeros(SPANS[-1].stop)
    for before, after in itertools.pairwise(without):
        d = MOMENTUM * d + 0.1 * x
        x = x - LR * d + after["x"] - before["x"]
    np.testing.assert_allclose(ours[-1]["x"], x, rtol=0, atol=1e-5)


def test_all_zero_tensors_send_nothing_that_counts_and_keep_their_momentum() -> None:
    """The released code sends every element of a tensor of zeros: its threshold is 0."""

    def work(group: Group) -> tuple[float, int]:
        model = Parameters(*SHAPES)
        run = start(model, "dgc", group, density=0.1, dense_1d=False)
        method = run.method
        before = model.flat()
        for p in model.all:
            p.grad = torch.zeros_like(p)
        method.state["velocity"].fill_(1.0)
        method.worker.residual.fill_(-0.9)  # so that v becomes exactly 0: momentum 0.9 times 1
        run.optimizer.step()
        return float(np.abs(model.flat() - before).max()), int((method.state["velocity"] == 0).sum())

    for moved, masked in SimWorld[Any](2).run(work):
        assert moved < 1e-6
        assert masked <= math.ceil(0.1 * SPANS[-1].stop) + 3


@pytest.mark.parametrize(
    "given", [{"warmup_steps": 8}, {"warmup_epochs": 2, "steps_per_epoch": 4}], ids=["steps", "epochs"]
)
def test_the_density_falls_in_the_papers_steps(given: dict[str, Any]) -> None:
    method: Any = build("dgc", density=0.001, **given)
    densities = [method.density(step) for step in range(10)]
    assert densities == [0.25] * 2 + [0.0625] * 2 + [0.015625] * 2 + [0.004] * 2 + [0.001] * 2
    assert method.warmup_steps == 8


def test_a_density_above_those_of_the_warmup_leaves_them_out() -> None:
    method: Any = build("dgc", density=0.05, warmup_steps=10)
    assert [method.density(step) for step in (0, 4, 5, 9, 10)] == [0.25, 0.25, 0.0625, 0.0625, 0.05]


def test_each_rank_clips_by_its_own_norm_without_communication() -> None:
    def work(group: Group) -> float:
        model = Parameters(*SHAPES)
        run = start(model, "dgc", group, max_norm=0.1, density=0.5, masking=False, dense_1d=False)
        model.set_gradients(group.rank, 0)
        run.optimizer.step()
        assert {operation for _, operation, bucket in group.traffic.nbytes if bucket == "bucket 0"} == {"all_gather"}
        return float(run.method.state["velocity"].norm())

    assert SimWorld[Any](4).run(work) == [pytest.approx(0.1 * math.sqrt(4), rel=1e-3)] * 4


def test_weight_decay_stays_out_of_the_accumulators() -> None:
    def work(group: Group) -> tuple[F64, F64]:
        model = Parameters(*SHAPES)
        method: Any = build("dgc", density=0.1, dense_1d=False)
        sgd = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=0.5)
        attach(model, method, sgd, group=group)
        before = model.flat()
        for p in model.all:
            p.grad = torch.zeros_like(p)
        sgd.step()
        assert not method.state["velocity"].any()
        assert not method.worker.residual.any()
        return before, model.flat()

    for before, after in SimWorld[Any](2).run(work):
        np.testing.assert_allclose(after, before * (1 - LR * 0.5), rtol=1e-6)


def test_a_method_that_was_checked_with_adam_has_its_momentum_with_sgd() -> None:
    method: Any = build("dgc")
    parameters = list(nn.Linear(2, 2).parameters())
    for optimizer, momentum in ((torch.optim.AdamW(parameters), 0.0), (torch.optim.SGD(parameters, lr=0.1), 0.9)):
        method.check_optimizer(optimizer)
        assert method.momentum == momentum


def test_under_adam_there_is_no_momentum_before_the_choice() -> None:
    """At density 1 Adam gets the mean of the gradients; below, what waits in v is what has not been sent of their sum."""
    for dense, all_of_it in zip(
        simulate(2, SHAPES, 4, "dense", optimizer=ADAM),
        simulate(2, SHAPES, 4, "dgc", optimizer=ADAM, density=1.0),
        strict=True,
    ):
        np.testing.assert_array_equal(all_of_it[-1]["x"], dense[-1]["x"])
    few = {"density": 1e-6, "value_bits": 32, "dense_1d": False}  # one element of each parameter and step
    for rank, states in enumerate(simulate(2, SHAPES, 3, "dgc", optimizer=ADAM, **few)):
        waiting, total = states[-1]["worker_residual"], sum(local_gradient(rank, step) for step in range(3))
        is_kept = np.isclose(waiting, total, rtol=1e-5)
        assert is_kept.sum() >= SPANS[-1].stop - 3 * len(SHAPES)
