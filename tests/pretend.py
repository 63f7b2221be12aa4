"""A pretended device: tensors in the CPU's memory that behave like those of another device.

Operations that mix them with tensors of the CPU fail, as on a GPU, and so does `numpy()`. So the code's paths for GPUs run on machines
without one. Arithmetic is the CPU's; a GPU's streams, timing and rounding are not covered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from commopt.kernels.cuda import pieces

# a name that torch knows, without anything behind it; autograd runs it on the CPU's thread
DEVICE = torch.device("lazy")
GPU = pytest.param(
    torch.device("cuda"),
    marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU that torch can use"),
    id="cuda",
)
# its kernels run in triton's interpreter, which a process that uses a GPU does without
PRETENDED = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU; CUDA_VISIBLE_DEVICES= hides it")
DEVICES = [pytest.param(DEVICE, marks=PRETENDED, id="pretended"), GPU]  # for tests under `working_on(device)`
PLACES = [pytest.param(torch.device("cpu"), id="cpu"), GPU]  # for process groups and streams, which cannot be pretended
_MOVES = ("aten::copy_", "aten::_to_copy", "aten::set_")


class _Pretended(Tensor):
    """A tensor of that device; `inside` holds its values."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor) -> _Pretended:
        made: _Pretended = torch.Tensor._make_wrapper_subclass(
            cls,
            inside.shape,
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            device=DEVICE,
        )
        made.inside = inside
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(function, args, kwargs or {})


class _Fresh(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes tensors there: `torch.zeros(3, device=DEVICE)`."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class _Numbers(TorchFunctionMode):
    """Moves numbers there and back, which torch does outside of operations: `torch.tensor([1, 2], device=DEVICE).tolist()`."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is Tensor.tolist:
            return args[0].cpu().tolist()
        if function is Tensor.norm and kwargs.get("p", "fro") == "fro":  # chooses its operation by the device's name
            return torch.linalg.vector_norm(*args, **{key: value for key, value in kwargs.items() if key != "p"})
        if function in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]).to(args[0].device), *args[2:])
        if function not in (torch.tensor, torch.as_tensor) or kwargs.get("device") is None:
            return function(*args, **kwargs)
        device = kwargs.pop("device")
        return function(*args, **kwargs).to(device)


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    places: set[str] = set()

    def plain(x: Any) -> Any:
        if isinstance(x, _Pretended):
            places.add(DEVICE.type)
            return x.inside
        if isinstance(x, Tensor) and x.dim():  # numbers may come from the CPU
            places.add("cpu")
        return x

    plain_args, plain_kwargs = _each(plain, args), {key: _each(plain, value) for key, value in kwargs.items()}
    name = function.name().partition(".")[0]
    if len(places) > 1 and name not in _MOVES:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {DEVICE} and cpu")
    is_there = DEVICE.type in places
    if kwargs.get("device") is not None:
        is_there = torch.device(kwargs["device"]).type == DEVICE.type
        plain_kwargs["device"] = torch.device("cpu")
    result = function(*plain_args, **plain_kwargs)
    written = [r.alias_info is not None and r.alias_info.is_write for r in function._schema.returns]
    if any(written):
        return args[0] if len(written) == 1 else result
    return _each(lambda x: _Pretended(x) if isinstance(x, Tensor) else x, result) if is_there else result


def _each(change: Any, x: Any) -> Any:
    """Change x, also inside lists and tuples; torch's `tree_map` takes longer than the operations."""
    return type(x)(_each(change, one) for one in x) if type(x) in (tuple, list) else change(x)


def _start(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Run a triton kernel in the interpreter on what is inside."""
    plain = [x.inside if isinstance(x, _Pretended) else x for x in arguments]
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        kernel[grid](*plain, **constants)


def _address(x: Tensor) -> int:
    return x.inside.data_ptr() if isinstance(x, _Pretended) else x.data_ptr()


if not torch.cuda.is_available():
    pieces.start, pieces.address = _start, _address


@contextmanager
def working_on(device: torch.device) -> Iterator[None]:
    """Let this thread make tensors on that device, if it is the pretended one."""
    if device.type != DEVICE.type:
        yield
        return
    with _Numbers(), _Fresh():  # type: ignore[no-untyped-call]
        yield
