"""The hot loops, one function each, chosen by where the tensors live."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch

_CPU = torch.device("cpu")
_NAMES = ("signs", "quantize", "select", "indices", "votes")


def of(name: str, device: torch.device) -> ModuleType:
    """The kernels `name` (signs, quantize, select, indices or votes) for this device: numba on the CPU, plain torch elsewhere."""
    return _module(name, "cpu" if device.type == "cpu" else "reference")


@cache
def _module(name: str, backend: str) -> ModuleType:
    return importlib.import_module(f"commopt.kernels.{backend}.{name}")


@cache
def warm_up(device: torch.device = _CPU) -> None:
    """Compile every kernel once, so that no step has to wait for it; quick where the cache on disk has them."""
    if device.type == "cpu":
        for name in _NAMES:
            of(name, device).warm_up()
