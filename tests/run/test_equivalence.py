"""One method gives one result, however it is plugged in and whatever carries its messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pool import Pool
from rig import METHODS, attached, flat, make_model, on_gloo, run_ddp, run_plain
from torch import Tensor

from commopt.groups import Group, SimWorld

STEPS = 6
DDP_CASES: dict[str, dict[str, Any]] = {
    "overlap": {},
    "overlap, a bucket per parameter": {"bucket_cap_mb": 0.0001},
    "overlap, gradients as views": {"bucket_cap_mb": 0.001, "gradient_as_bucket_view": True},
    "no overlap": {"overlap": False},
    "no overlap, a bucket per parameter": {"overlap": False, "bucket_cap_mb": 0.0001},
}


def simulated(n: int, case: str, **options: Any) -> list[Tensor]:
    return SimWorld[Tensor](n, timeout_s=60).run(lambda group: run_plain(group, case, STEPS, **options))


@pytest.mark.parametrize("case", METHODS)
def test_two_ranks_agree_bit_for_bit_over_all_integrations(pool: Pool, case: str) -> None:
    expected, replica = simulated(2, case)
    assert torch.equal(expected, replica)
    assert not torch.equal(expected, flat(make_model()))
    others = {"plain, a bucket per parameter": simulated(2, case, bucket_bytes=1)}
    others["plain on gloo"] = pool.run(2, on_gloo, run_plain, case, STEPS)
    for name, options in DDP_CASES.items():
        others[name] = pool.run(2, run_ddp, case, STEPS, options)
    assert [name for name, runs in others.items() if not all(torch.equal(run, expected) for run in runs)] == []


@pytest.mark.parametrize(
    ("case", "tolerance"), [("ef_sign l1", 0.0), ("ef_sign l2", 0.0), ("dense", 1e-6), ("fp16", 1e-3)]
)
def test_five_ranks_agree_bit_for_bit_or_up_to_the_order_of_sums(pool: Pool, case: str, tolerance: float) -> None:
    expected = simulated(5, case)[0]
    for runs in (pool.run(5, on_gloo, run_plain, case, STEPS), pool.run(5, run_ddp, case, STEPS, {})):
        assert all(torch.equal(run, runs[0]) for run in runs)
        torch.testing.assert_close(runs[0], expected, rtol=0, atol=tolerance)


def run_exact_gradients(group: Group, case: str) -> Tensor:
    """Gradients that are multiples of 15/1024, so that means over 5 ranks are exact in any order."""
    with attached(group, case) as (model, optimizer, _):
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(1000 * group.rank + step)
            for p in model.parameters():
                p.grad = torch.randint(-8, 9, p.shape, generator=generator) * (15 / 1024)
            optimizer.step()
        return flat(model)


@pytest.mark.parametrize("case", METHODS)
def test_every_method_agrees_bit_for_bit_where_sums_are_exact(pool: Pool, case: str) -> None:
    expected = SimWorld[Tensor](5).run(lambda group: run_exact_gradients(group, case))
    assert all(torch.equal(run, expected[0]) for run in expected)
    assert all(torch.equal(run, expected[0]) for run in pool.run(5, on_gloo, run_exact_gradients, case))


@pytest.mark.parametrize(("dtype", "case"), [(torch.float64, "dense"), *((torch.bfloat16, case) for case in METHODS)])
def test_parameters_of_any_precision_train_alike_in_ddp_and_plain(pool: Pool, dtype: torch.dtype, case: str) -> None:
    expected = simulated(2, case, dtype=dtype)[0]
    assert expected.dtype == dtype
    assert not torch.equal(expected, flat(make_model(dtype)))
    for run in pool.run(2, run_ddp, case, STEPS, {"dtype": dtype}):
        assert torch.equal(run, expected)
    if dtype == torch.float64:
        assert 1e-9 < float((expected - simulated(2, case)[0]).abs().max()) < 1e-4
