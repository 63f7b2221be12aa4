"""The hot loops, one function each, chosen by where the tensors live."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch

_CPU = torch.device("cpu")


def of(device: torch.device) -> ModuleType:
    """The module whose kernels work on tensors of this device: numba on the CPU, plain torch elsewhere."""
    if device.type == "cpu":
        from commopt.kernels import cpu

        return cpu
    from commopt.kernels import reference

    return reference


@cache
def warm_up(device: torch.device = _CPU) -> None:
    """Compile every kernel once, so that no step has to wait for it; quick where the cache on disk has them."""
    if device.type != "cpu":
        return
    import numpy as np

    from commopt.bucket import Blocks
    from commopt.kernels import cpu_indices, cpu_quantize, cpu_select, cpu_votes

    one = np.zeros(1, dtype=np.int64)
    blocks = Blocks(one, one, one + 8, one, one)
    kernels = of(device)
    x, residual = torch.ones(8), torch.zeros(8)
    scales, bits = torch.ones(1), torch.zeros(1, dtype=torch.uint8)
    kernels.block_sums(x, residual, blocks, squared=True)
    kernels.compress_signs_(x, residual, blocks, scales, bits, squared=False)
    kernels.pack_signs_(x, residual, blocks, scales, bits)
    kernels.unpack_signs_(bits, scales, blocks, x, alpha=1.0, add=True)
    for module in (cpu_indices, cpu_quantize, cpu_select, cpu_votes):
        module.warm_up()
