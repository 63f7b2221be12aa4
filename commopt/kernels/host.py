"""The CPU's kernels for tensors of a GPU without triton: they go through pinned memory of the host, and the host waits."""

import inspect
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class OnHost:
    """A module of kernels whose functions take tensors of a GPU, and change them as they would those of the CPU."""

    def __init__(self, kernels: ModuleType) -> None:
        self._kernels = kernels

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(_run, getattr(self._kernels, name))


def _run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    given = inspect.signature(function).bind(*args, **kwargs)
    there = {name: x for name, x in given.arguments.items() if isinstance(x, Tensor) and x.device.type != "cpu"}
    here = {name: _host_copy(x) for name, x in there.items()}
    device = next(iter(there.values())).device
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    given.arguments.update(here)
    result = function(*given.args, **given.kwargs)
    for name, x in there.items():
        if name != "x":  # which no kernel changes
            x.copy_(here[name])
    every = result if isinstance(result, tuple) else (result,)
    moved = tuple(one.to(device) if isinstance(one, Tensor) else one for one in every)
    return moved if isinstance(result, tuple) else moved[0]


def _host_copy(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x.detach(), non_blocking=True)
