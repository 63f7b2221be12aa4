"""The hot loops, one function each, chosen by the tensors' device."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from typing import Any

import numpy as np
import torch

from commopt.kernels.host import OnHost
from commopt.wire.bucket import Blocks

_CPU = torch.device("cpu")
_NUMBA = ("signs", "quantize", "votes", "select", "indices")  # the others are plain torch, or for triton only
_log = logging.getLogger(__name__)


@cache
def has_triton(device: torch.device) -> bool:
    """Whether triton's kernels run there, which read and write several messages at once."""
    return device.type != "cpu" and importlib.util.find_spec("triton") is not None


@cache
def of(name: str, device: torch.device) -> Any:
    """The kernels `name` (signs, quantize, select, indices, votes, apply) for this device: numba or plain torch on the CPU, else triton.

    Without triton tensors go to numba through the host's memory.
    """
    if has_triton(device):
        return importlib.import_module(f"commopt.kernels.cuda.{name}")
    kernels = importlib.import_module(f"commopt.kernels.{'cpu' if name in _NUMBA else 'reference'}.{name}")
    if device.type == "cpu" or name not in _NUMBA:
        return kernels
    _log.warning("triton is not installed: tensors on %s are compressed on the CPU; pip install triton", device.type)
    return OnHost(kernels)


@cache
def warm_up(device: torch.device = _CPU) -> None:
    """Compile every kernel once, so that no step waits for it; quick if the cache on disk has them."""
    if has_triton(device):
        return
    from commopt.kernels.cpu import indices, quantize, select, signs, votes

    one = np.zeros(1, dtype=np.int64)
    blocks = Blocks(one, one, one + 8, one, one, one.astype(np.uint64))
    residual, codes = torch.zeros(8, dtype=torch.float32), torch.zeros(8, dtype=torch.uint8)
    x, scales = residual + 1, residual.new_ones(1)
    signs.block_sums(x, residual, blocks, squared=True)
    signs.compress_signs_(x, residual, blocks, scales, codes[:1], squared=False)
    signs.unpack_signs_(codes[:1], scales, blocks, x, alpha=1.0, add=True)
    quantize.compress_(x, residual, blocks, scales, codes, kind="levels")
    quantize.decompress_(codes, scales, blocks, x, kind="levels", alpha=1.0, add=True)
    select.select_(x, residual, blocks, one + 2)
    indices.encode_(torch.zeros(1, dtype=torch.int64), one + 8, one + 1, one, one + 1, codes[:1])
    indices.decode(codes[:1], one + 8, one + 1, one, one + 1)
    votes.pack_votes_(x, blocks, np.zeros(1, dtype=np.uint8), codes[:1])
    votes.unpack_counts_(codes[:1], 1, blocks, residual.new_zeros(2), x)
