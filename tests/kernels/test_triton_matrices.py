"""The kernels of PowerSGD and DeMo by triton's interpreter: what plain torch and numba make of the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from commopt.wire import noise
from commopt.wire.bucket import Blocks

pytest.importorskip("triton", reason="triton is not installed: pip install triton")
if torch.cuda.is_available():
    pytest.skip("these kernels run on the GPU itself, in tests/gpu", allow_module_level=True)

from commopt.kernels.cuda import factors


@pytest.mark.parametrize("counts", [[3, 3], [3, 5]], ids=["one word", "a word for each parameter"])
def test_rows_get_length_one_and_zeros_are_drawn_as_on_the_host(counts: list[int]) -> None:
    """Two factors: two rows of 2,051, and two of 5, which lie elsewhere in the state."""
    lengths, parameters = np.array([2051, 2051, 5, 5]), np.array([1, 1, 0, 0])
    within, places = np.array([0, 2051, 0, 5]), np.array([7000, 7000, 40, 40])
    starts, homes = np.array([3, 2054, 4105, 4110]), np.array([20, 2071, 10, 15])
    rows = Blocks(starts, homes, lengths, parameters, within, places=places)
    q = torch.randn(4120, generator=torch.Generator().manual_seed(0))
    q[2054:4105], q[4105:4110] = 0.0, torch.tensor([1e-30, -2e-30, 3e30, 1e-45, 0.0])
    found = torch.full((4122,), 7.0)
    factors.normalise_(q, found, rows.worded(5, "powersgd", 0, np.array(counts)))

    expected = torch.full((4122,), 7.0)
    for start, home, n in zip(starts, homes, lengths, strict=True):
        row = q[start : start + n].double()
        expected[home : home + n] = row / torch.linalg.vector_norm(row)
    keys = noise.keys(5, "powersgd", 0, np.array(counts[1:]), places[:1])
    expected[2071:4122] = noise.uniform(keys, np.array([4102]))[2051:] - 0.5
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert torch.equal(found[2071:], expected[2071:])
