"""`run.grad_norm` is the norm that max_norm limits: that of the mean, or what stands for it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from rig import loss_of, make_batch, make_model, mean_norm, start
from torch import Tensor, nn

from commopt import attach
from commopt.groups import SimGroup, SimWorld

RANKS, MAX_NORM = 4, 0.05


def own_gradients(rank: int, step: int) -> list[Tensor]:
    model = make_model()
    x, y = make_batch(rank, step)
    loss_of(model(x), y).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def norm_of(gradients: list[Tensor]) -> float:
    """What torch's clip_grad_norm_ returns for them."""
    parameters = [nn.Parameter(torch.zeros_like(grad)) for grad in gradients]
    for p, grad in zip(parameters, gradients, strict=True):
        p.grad = grad.clone()
    return float(nn.utils.clip_grad_norm_(parameters, MAX_NORM))


def mean_of(every: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(grads).mean(0) for grads in zip(*every, strict=True)]


def norms(group: SimGroup, method: Any, per_machine: int = 1, bad_at: int = -1, **options: Any) -> list[float | None]:
    """grad_norm before the first step and after each of three, at a learning rate of zero."""
    model = make_model()
    world: Any = group if per_machine == 1 else group.by_machine(per_machine)
    run = start(model, method, world, **{"max_norm": MAX_NORM, "lr": 0.0, **options})
    run.bucket_bytes = 2000  # several buckets
    seen = [run.grad_norm]
    for step in range(3):
        x, y = make_batch(group.rank, step)
        run.optimizer.zero_grad()
        loss_of(model(x), y).backward()
        if step == bad_at and group.rank == 1:
            torch.nn.init.constant_(run.parameters["0.bias"].grad, math.nan)
        run.optimizer.step()
        seen.append(run.grad_norm)
    return seen


def train(method: Any, ranks: int = RANKS, **options: Any) -> list[list[float | None]]:
    return SimWorld[Any](ranks).run(lambda group: norms(group, method, **options))


@pytest.mark.parametrize("per_machine", [1, 2])
@pytest.mark.parametrize("method", ["dense", "onebit_adam"], ids=["dense", "in a warm-up"])
def test_it_is_what_torch_returns_for_the_mean_gradient(method: str, per_machine: int) -> None:
    for seen in train(method, per_machine=per_machine):
        assert seen == [None, *(pytest.approx(mean_norm(RANKS, step), rel=1e-6) for step in range(3))]


@pytest.mark.parametrize("per_machine", [1, 2])
def test_before_a_compressed_exchange_it_is_the_root_mean_square_of_the_machines(per_machine: int) -> None:
    def norm_at(step: int) -> float:
        every = [own_gradients(rank, step) for rank in range(RANKS)]
        machines = [mean_of(every[rank : rank + per_machine]) for rank in range(0, RANKS, per_machine)]
        return math.sqrt(sum(norm_of(own) ** 2 for own in machines) / len(machines))

    ranks = train("ef_sign", per_machine=per_machine)
    assert ranks[0] == [None, *(pytest.approx(norm_at(step), rel=1e-6) for step in range(3))]
    assert all(seen == ranks[0] for seen in ranks)


def test_a_rank_that_clips_alone_has_its_own() -> None:
    for rank, seen in enumerate(train("dgc")):
        assert seen == [None, *(pytest.approx(norm_of(own_gradients(rank, step)), rel=1e-6) for step in range(3))]


def test_there_is_none_without_max_norm() -> None:
    assert train("ef_sign", 2, max_norm=None) == [[None] * 4] * 2


@pytest.mark.parametrize("method", ["dense", "ef_sign", "dgc"])
def test_it_is_nan_on_all_ranks_in_a_step_that_leaves_a_gradient_out(method: str) -> None:
    for seen in train(method, bad_at=1):
        assert [norm is not None and math.isnan(norm) for norm in seen] == [False, False, True, False]


def test_an_outer_method_has_its_machines_own() -> None:
    def work(group: SimGroup) -> float | None:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        run = attach(model, {"name": "noloco", "every": 2}, optimizer, group=group.by_machine(2), max_norm=MAX_NORM)
        run.join()
        x, y = make_batch(group.rank, 0)
        loss_of(model(x), y).backward()
        run.optimizer.step()
        assert isinstance(run._norm, Tensor)  # nothing has waited for it
        return run.grad_norm

    for rank, norm in enumerate(SimWorld[Any](RANKS).run(work)):
        first = rank - rank % 2
        assert norm == pytest.approx(norm_of(mean_of([own_gradients(first + k, 0) for k in range(2)])), rel=1e-6)
