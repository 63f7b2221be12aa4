"""Means: nothing is lost, all ranks get the same bits, and a NaN on one rank changes no state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from allocations import Allocations
from block_values import still_to_send
from torch import Tensor

from commopt.compress.cast import Cast
from commopt.compress.sign import BlockSign, TensorSign
from commopt.exchange.base import Exchange
from commopt.exchange.clip import clip_joint_norm_
from commopt.exchange.gather import GatherMean
from commopt.exchange.mean import Mean
from commopt.exchange.two_way import TwoWayMean
from commopt.groups import Group, LocalGroup, SimGroup, SimWorld
from commopt.groups.echo import Echo
from commopt.methods import FP16
from commopt.wire.bucket import Bucket

NUMELS = [1, 7, 2049, 130]
TOTAL = sum(NUMELS)

MAKERS: dict[str, Callable[[], Exchange]] = {
    "mean": Mean,
    "fp16": FP16,
    "gather l1": lambda: GatherMean(BlockSign()),
    "gather l2": lambda: GatherMean(TensorSign()),
    "gather cast": lambda: GatherMean(Cast()),
    "two-way l1": lambda: TwoWayMean(BlockSign()),
    "two-way l1 small": lambda: TwoWayMean(BlockSign(16)),
    "two-way l2": lambda: TwoWayMean(TensorSign()),
    "two-way cast answers": lambda: TwoWayMean(BlockSign(16), server=Cast(torch.bfloat16)),
}
TWO_WAY = ["two-way l1", "two-way l1 small", "two-way l2", "two-way cast answers"]
COMPRESSED = ["gather l1", "gather l2", "gather cast", *TWO_WAY]


def gradient(rank: int, step: int) -> Tensor:
    return torch.randn(TOTAL, generator=torch.Generator().manual_seed(1000 * rank + step))


def bucket_of(flat: Tensor) -> Bucket:
    return Bucket.of([(f"p{k}", part) for k, part in enumerate(torch.split(flat, NUMELS))])


def bound(name: str, group: Group) -> Any:
    exchange: Any = MAKERS[name]()
    exchange.bind([(f"p{k}", torch.zeros(n)) for k, n in enumerate(NUMELS)], group)
    return exchange


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("n", [2, 3, 5])
def test_nothing_is_lost_over_30_steps(name: str, n: int) -> None:
    def train(group: SimGroup) -> tuple[Any, Tensor]:
        exchange, sent = bound(name, group), torch.zeros(TOTAL, dtype=torch.float64)
        for step in range(30):
            bucket = bucket_of(gradient(group.rank, step))
            exchange.exchange(bucket, group)
            sent += bucket.flat
        return exchange, sent

    results = SimWorld[Any](n).run(train)
    put_in = sum(gradient(rank, step).double() for step in range(30) for rank in range(n)) / n
    assert all(torch.equal(results[0][1], sent) for _, sent in results)
    rest = still_to_send([exchange for exchange, _ in results]) if name in COMPRESSED else torch.zeros(TOTAL)
    tolerance = 5e-2 if name == "fp16" else 1e-5
    torch.testing.assert_close(results[0][1] + rest, put_in, rtol=0, atol=tolerance)
    if name in COMPRESSED:
        assert float(rest.abs().max()) > 1e-5  # something could have been lost


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_value_on_one_rank_voids_the_bucket_on_all_and_changes_nothing(name: str, bad: float) -> None:
    def train(group: SimGroup) -> tuple[str | None, float, str | None]:
        exchange = bound(name, group)
        for step in range(3):
            exchange.exchange(bucket_of(gradient(group.rank, step)), group)
        views = [view for k in range(len(NUMELS)) for view in exchange.state_views(f"p{k}")]
        before = [view.clone() for view in views]
        flat = gradient(group.rank, 3)
        if group.rank == 1:
            flat[10] = flat[2000] = bad  # both in p2; p0 and p1 are whole
        bucket = bucket_of(flat)
        exchange.exchange(bucket, group)
        changed = max((float((a - b).abs().max()) for a, b in zip(views, before, strict=True) if len(a)), default=0.0)
        after = bucket_of(gradient(group.rank, 4))
        exchange.exchange(after, group)
        assert after.flat.isfinite().all()
        return bucket.void, changed, after.void

    for void, changed, after in SimWorld[Any](3).run(train):
        assert void == "p2"
        assert changed <= 2e-6
        assert after is None


def test_the_exact_mean_takes_no_memory_beside_the_bucket() -> None:
    group, bucket = Echo(2), bucket_of(gradient(0, 0))
    mean = bound("mean", group)
    with Allocations() as made:
        mean.exchange(bucket, group)
    assert max(made.nbytes) < bucket.flat.nbytes


@pytest.mark.parametrize("name", TWO_WAY)
def test_a_servers_overflow_voids_the_bucket_on_all_ranks_and_restores_both_residuals(name: str) -> None:
    def train(group: SimGroup) -> tuple[str | None, bool, bool]:
        exchange = bound(name, group)
        if group.rank == 1:
            exchange.server.residual.fill_(3.4e38)  # more than bfloat16 holds, and the sum of two more than float32
        worker, server = exchange.worker.residual.clone(), exchange.server.residual.clone()
        bucket = bucket_of(torch.full((TOTAL,), 1e35))
        exchange.exchange(bucket, group)
        ulp = 2e-7 * 1e35
        return (
            bucket.void,
            bool((exchange.worker.residual - worker).abs().max() <= ulp),
            bool((exchange.server.residual - server).abs().max() <= 2e-7 * 3.4e38 if group.rank == 1 else ulp),
        )

    results = SimWorld[Any](3).run(train)
    assert len({void for void, _, _ in results}) == 1
    assert all(void is not None and worker and server for void, worker, server in results)


@pytest.mark.parametrize("name", ["two-way l1", "two-way l2"])
def test_gradients_near_the_end_of_float32_void_their_bucket(name: str) -> None:
    def train(group: SimGroup) -> str | None:
        exchange = bound(name, group)
        flat = gradient(group.rank, 0)
        if group.rank == 2:
            flat[100] = flat[101] = 3e38
        bucket = bucket_of(flat)
        exchange.exchange(bucket, group)
        assert exchange.worker.residual.isfinite().all()
        assert exchange.server.residual.isfinite().all()
        return bucket.void

    assert SimWorld[Any](3).run(train) == ["p2"] * 3


@pytest.mark.parametrize("name", MAKERS)
def test_one_rank_is_its_own_mean(name: str) -> None:
    exchange, group = bound(name, LocalGroup()), LocalGroup()
    bucket = bucket_of(gradient(0, 0))
    exchange.exchange(bucket, group)
    expected = gradient(0, 0).half().float() if name == "fp16" else gradient(0, 0)
    assert torch.equal(bucket.flat, expected)
    bad = bucket_of(gradient(0, 0))
    bad.flat[3] = math.nan
    exchange.exchange(bad, group)
    assert bad.void == "p1"


def test_clipping_one_joint_norm_is_torchs() -> None:
    flats = [torch.randn(10), torch.randn(20)]
    parameters = [torch.nn.Parameter(torch.zeros_like(flat)) for flat in flats]
    for p, flat in zip(parameters, flats, strict=True):
        p.grad = flat.clone()
    torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    buckets = [Bucket(flat, ("p",), (0,)) for flat in flats]
    clip_joint_norm_(buckets, 0.5)
    for bucket, p in zip(buckets, parameters, strict=True):
        torch.testing.assert_close(bucket.flat, p.grad)


def test_huge_gradients_are_clipped_and_not_passed_over() -> None:
    bucket = Bucket(torch.full((4,), 1e30), ("p",), (0,))
    clip_joint_norm_([bucket], 1.0)
    assert float(bucket.flat.norm()) == pytest.approx(1.0)
