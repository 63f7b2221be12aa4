"""A NaN or an inf on one rank: all ranks leave that bucket out of the step, and nothing else is harmed."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from rig import COMPRESSED, FREEZE, METHODS, UPDATE, attached, flat, loss_of, make_batch, state_of, train, wrapped
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


def one_bad_step(
    model: nn.Module, inner: nn.Sequential, optimizer: Any, run: Any, rank: int, *, first: int, bad: float
) -> dict[str, Any]:
    """Train, take a step that is bad on rank 1, and train on; what changed, by parameter."""
    train(model, optimizer, rank, first)
    views = {name: run.method.state_views(name) for name in run.parameters}
    before = {name: [view.clone() for view in parts] for name, parts in views.items()}
    values = {name: p.detach().clone() for name, p in inner.named_parameters()}
    handle = poison(inner, bad) if rank == 1 else None
    train(model, optimizer, rank, 1, first)
    moved = {name for name, p in inner.named_parameters() if not torch.equal(p, values[name])}
    drift = {
        name: max(
            (float((a - b).abs().max()) for a, b in zip(views[name], before[name], strict=True) if len(a)), default=0
        )
        for name in views
    }
    if handle is not None:
        handle.remove()
    voided = list(run.voided)
    after_void = flat(inner)
    train(model, optimizer, rank, 2, first + 1)
    return {
        "voided": voided,
        "moved": moved,
        "drift": drift,
        "goes on": not torch.equal(after_void, flat(inner)) and bool(flat(inner).isfinite().all()),
        "finite": all(bool(x.isfinite().all()) for x in state_of(run)),
        "equal": run.replicas_are_equal(),
        "void after": run.voided[len(voided) :],
    }


def check(results: list[dict[str, Any]], step: int, bucket_of_the_bad: set[str], names: set[str]) -> None:
    for result in results:
        assert result["voided"] == [(step, POISONED)]
        assert result["moved"] == names - bucket_of_the_bad
        assert all(result["drift"][name] <= 3e-6 for name in bucket_of_the_bad)
        assert result["goes on"]
        assert result["finite"]
        assert result["equal"]
        assert result["void after"] == []


NAMES = {"0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"}


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("first", [0, FREEZE, FREEZE + 3])
@pytest.mark.parametrize("case", METHODS)
def test_plain_ranks_leave_the_bad_bucket_out_together(case: str, first: int, bad: float) -> None:
    def work(group: Group) -> dict[str, Any]:
        with attached(group, case, bucket_bytes=1) as (model, optimizer, run):
            return one_bad_step(model, model, optimizer, run, group.rank, first=first, bad=bad)

    check(SimWorld[Any](RANKS, timeout_s=60).run(work), first, {POISONED}, NAMES)


def bad_step_in_ddp(
    process_group: dist.ProcessGroup, case: str, first: int, bad: float, options: dict[str, Any]
) -> dict[str, Any]:
    rank = dist.get_rank(process_group)
    with wrapped(process_group, case, **options) as (model, optimizer, run):
        return one_bad_step(model, model.module, optimizer, run, rank, first=first, bad=bad)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("case", METHODS)
def test_ddp_ranks_leave_the_bad_bucket_out_together(pool: Pool, case: str, overlap: bool) -> None:
    first = FREEZE + 2  # DDP has its final buckets by then
    options = {"bucket_cap_mb": 0.0001, "overlap": overlap}
    results = pool.run(RANKS, bad_step_in_ddp, case, first, math.inf, options)
    check(results, first, {POISONED, "2.bias"}, NAMES)


@pytest.mark.parametrize("case", METHODS)
def test_ddp_survives_a_bad_value_in_the_very_first_step(pool: Pool, case: str) -> None:
    results = pool.run(RANKS, bad_step_in_ddp, case, 0, math.nan, {})
    check(results, 0, NAMES, NAMES)  # one bucket of all


@pytest.mark.parametrize("case", COMPRESSED)
def test_a_void_step_leaves_the_run_where_it_would_be_without_it(case: str) -> None:
    """The same three steps with and without a void one among them."""

    def work(group: Group, with_void: bool) -> Tensor:
        with attached(group, case) as (model, optimizer, _):
            for step in range(FREEZE + 3):
                if with_void and step == FREEZE + 2:
                    x, y = make_batch(group.rank, 99)
                    optimizer.zero_grad()
                    loss_of(model(x * (math.nan if group.rank == 2 else 1.0)), y).backward()
                    optimizer.step()
                train(model, optimizer, group.rank, 1, step)
            return flat(model)

    with_void = SimWorld[Tensor](RANKS).run(lambda group: work(group, True))
    without = SimWorld[Tensor](RANKS).run(lambda group: work(group, False))
    torch.testing.assert_close(with_void[0], without[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", UPDATE)
def test_a_step_in_which_everything_is_void_is_no_step(case: str) -> None:
    def work(group: Group) -> list[int]:
        with attached(group, case) as (model, optimizer, run):
            train(model, optimizer, group.rank, 2)
            handle = poison(model, math.nan)
            train(model, optimizer, group.rank, 1, 2)
            handle.remove()
            counts = [run.method.applied_steps]
            train(model, optimizer, group.rank, 1, 3)
            return [*counts, run.method.applied_steps]

    assert SimWorld[Any](RANKS).run(work) == [[2, 3]] * RANKS


def test_rank_0_says_once_which_parameter_it_was(caplog: pytest.LogCaptureFixture) -> None:
    def work(group: Group) -> None:
        with attached(group, "ef_sign l1") as (model, optimizer, _):
            handle = poison(model, math.nan) if group.rank == 1 else None
            train(model, optimizer, group.rank, 1)
            if handle is not None:
                handle.remove()
            train(model, optimizer, group.rank, 2, 1)

    with caplog.at_level(logging.WARNING):
        SimWorld[None](RANKS).run(work)
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        f"step 0: {POISONED} has a NaN or an inf in its gradient on some rank"
    ]
