"""A GPU sends what a CPU would send, and decodes it to the same values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from block_values import blocks_in, compress, heavy_tailed
from pretend import DEVICES, working_on
from torch import Tensor

from commopt.compress import COMPRESSORS, make_compressor
from commopt.compress.base import Compressor

CPU = torch.device("cpu")
pytestmark = pytest.mark.parametrize("device", DEVICES)
SIZES = (3001, 64, 5)
OPTIONS = {"top_k": {"density": 0.05}, "random_k": {"density": 0.05}, "threshold": {"threshold": 1.5}}


def values(seed: int) -> Tensor:
    return heavy_tailed(sum(SIZES), seed, spread=1.0)


def sent(codec: Compressor, device: torch.device, has_nan: bool) -> tuple[list[Tensor], Tensor, Tensor, list[bool]]:
    """Codes, residual and decoded values, and which blocks are bad."""
    blocks, x, residual = blocks_in(codec, list(SIZES), 2), values(1), values(2)
    counts = np.zeros(len(SIZES), np.int64)
    blocks = blocks.worded(0, "test", 0, counts).having(keys=blocks.drawn(0, "test", 0, counts))
    if has_nan:
        x[7] = float("nan")
    x, residual, decoded = x.to(device), residual.to(device), torch.linspace(-1, 1, sum(SIZES)).to(device)
    codes = compress(codec, x, residual, blocks)
    bad = codec.is_bad(codes, blocks).cpu().tolist()
    codec.decompress_(codes, blocks, decoded, alpha=1 / 3, add=True)
    return [code.cpu() for code in codes], residual.cpu(), decoded.cpu(), bad


@pytest.mark.parametrize("has_nan", [False, True], ids=["finite", "with a NaN"])
@pytest.mark.parametrize("name", COMPRESSORS)
def test_codes_residuals_and_values_are_those_of_the_cpu(name: str, has_nan: bool, device: torch.device) -> None:
    codec = make_compressor({"compressor": name, **OPTIONS.get(name, {})})
    expected = sent(codec, CPU, has_nan)
    with working_on(device):
        found = sent(codec, device, has_nan)
    for one, other in zip(found[0], expected[0], strict=True):
        if one.dtype.is_floating_point:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=0, equal_nan=True)  # scales, values
        else:
            assert torch.equal(one, other)
    assert found[3] == expected[3]
    assert any(found[3]) == has_nan
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-6, atol=1e-5, equal_nan=True)
