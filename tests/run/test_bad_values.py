"""A NaN or an inf on one rank: all ranks leave that bucket out of the step, and nothing else is harmed."""

from __future__ import annotations

import contextlib
import logging
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from rig import FREEZE, METHODS, UPDATE, attached, flat, state_of, train, wrapped
from torch import Tensor, nn

from commopt.groups import Group, SimWorld

RANKS = 3
POISONED = "2.weight"


def poison(model: nn.Sequential, bad: float) -> Any:
    """Put a bad value into the gradient of one parameter in the next backward passes."""

    def hook(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad.view(-1)[17] = bad
        return grad

    parameter: Any = model.get_parameter(POISONED)
    return parameter.register_hook(hook)


NAMES = {"0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"}


def one_bad_step(model: nn.Module, inner: nn.Sequential, run: Any, *, first: int, bad: float, void: set[str]) -> None:
    """Train, take a step that is bad on rank 1 and leaves out `void`, and train on."""
    train(model, run.optimizer, run.rank, first)
    views = {name: run.method.state_views(name) for name in void}
    before = {name: [view.clone() for view in parts] for name, parts in views.items()}
    values = {name: p.detach().clone() for name, p in inner.named_parameters()}
    with poison(inner, bad) if run.rank == 1 else contextlib.nullcontext():
        train(model, run.optimizer, run.rank, 1, first)
    assert {name for name, p in inner.named_parameters() if not torch.equal(p, values[name])} == NAMES - void
    for name in void:
        for view, old in zip(views[name], before[name], strict=True):
            torch.testing.assert_close(view, old, rtol=0, atol=3e-6)
    after_void = flat(inner)
    train(model, run.optimizer, run.rank, 2, first + 1)
    assert not torch.equal(after_void, flat(inner))
    assert all(bool(x.isfinite().all()) for x in (flat(inner), *state_of(run)))
    assert run.voided == [(first, POISONED)]
    assert run.replicas_are_equal()


@pytest.mark.parametrize("first", [0, FREEZE])
@pytest.mark.parametrize("case", METHODS)
def test_plain_ranks_leave_the_bad_bucket_out_together(case: str, first: int) -> None:
    def work(group: Group) -> None:
        with attached(group, case, bucket_bytes=1) as (model, _, run):
            one_bad_step(model, model, run, first=first, bad=-math.inf, void={POISONED})

    SimWorld[None](RANKS, timeout_s=60).run(work)


def bad_step_in_ddp(
    process_group: dist.ProcessGroup, case: str, first: int, bad: float, void: set[str], options: dict[str, Any]
) -> None:
    with wrapped(process_group, case, **options) as (model, _, run):
        one_bad_step(model, model.module, run, first=first, bad=bad, void=void)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("case", METHODS)
def test_ddp_ranks_leave_the_bad_bucket_out_together(pool: Pool, case: str, overlap: bool) -> None:
    first = FREEZE + 2  # DDP has its final buckets by then
    options = {"bucket_cap_mb": 0.0001, "overlap": overlap}
    pool.run(RANKS, bad_step_in_ddp, case, first, math.inf, {POISONED, "2.bias"}, options)


@pytest.mark.parametrize("case", METHODS)
def test_ddp_survives_a_bad_value_in_the_very_first_step(pool: Pool, case: str) -> None:
    pool.run(RANKS, bad_step_in_ddp, case, 0, math.nan, NAMES, {})  # one bucket of all


@pytest.mark.parametrize("case", UPDATE)
def test_a_step_in_which_everything_is_void_is_no_step(case: str) -> None:
    def work(group: Group) -> list[int]:
        with attached(group, case) as (model, optimizer, run):
            train(model, optimizer, group.rank, 2)
            with poison(model, math.nan):
                train(model, optimizer, group.rank, 1, 2)
            counts = [run.method.applied_steps]
            train(model, optimizer, group.rank, 1, 3)
            return [*counts, run.method.applied_steps]

    assert SimWorld[Any](RANKS).run(work) == [[2, 3]] * RANKS


def test_rank_0_says_once_which_parameter_it_was(caplog: pytest.LogCaptureFixture) -> None:
    def work(group: Group) -> None:
        with attached(group, "ef_sign l1") as (model, optimizer, _):
            with poison(model, math.nan) if group.rank == 1 else contextlib.nullcontext():
                train(model, optimizer, group.rank, 1)
            train(model, optimizer, group.rank, 2, 1)

    with caplog.at_level(logging.WARNING):
        SimWorld[None](RANKS).run(work)
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        f"step 0: {POISONED} has a NaN or an inf in its gradient on some rank"
    ]
