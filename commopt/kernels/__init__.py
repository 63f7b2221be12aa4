"""The hot loops, one function each, chosen by the tensors' device."""

import importlib.util
import logging
from functools import cache
from typing import Any

import torch

from commopt.kernels.host import OnHost

# the others are plain torch, or for triton only
_NUMBA = ("signs", "quantize", "votes", "select", "indices", "cast", "apply")
_ON_ANY_DEVICE = ("apply",)  # in plain torch
_log = logging.getLogger(__name__)


@cache
def has_triton(device: torch.device) -> bool:
    """Whether triton's kernels run there, which read and write several messages at once."""
    return device.type != "cpu" and importlib.util.find_spec("triton") is not None


@cache
def of(name: str, device: torch.device) -> Any:
    """The kernels `name` (signs, quantize, select, indices, votes, cast, apply) for this device: numba or plain torch on the CPU,
    else triton.

    Without triton tensors go to numba through the host's memory.
    """
    if has_triton(device):
        return importlib.import_module(f"commopt.kernels.cuda.{name}")
    is_compiled = name in _NUMBA and (device.type == "cpu" or name not in _ON_ANY_DEVICE)
    kernels = importlib.import_module(f"commopt.kernels.{'cpu' if is_compiled else 'reference'}.{name}")
    if device.type == "cpu" or not is_compiled:
        return kernels
    _log.warning("triton is not installed: tensors on %s are compressed on the CPU; pip install triton", device.type)
    return OnHost(kernels)


def load_cpu() -> None:
    """Import all kernels of the CPU that are compiled."""
    for name in _NUMBA:
        importlib.import_module(f"commopt.kernels.cpu.{name}")
