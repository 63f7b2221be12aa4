"""Counts what work on the pretended device costs a GPU: launches, bytes of memory, synchronisations, and bytes copied from the host."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pretend
import torch
from torch import Tensor

from commopt.kernels.cuda import pieces

_COPIES = ("copy_", "_to_copy")
_OVERWRITES: tuple[str, ...] = (
    "copy_",
    "fill_",
    "zero_",
    "normal_",
    "uniform_",
    "random_",
    "bernoulli_",
)  # write without reading
_OVERWRITES += ("_foreach_copy_", "_foreach_zero_")
_GATHERS = ("index", "index_select", "gather", "take")  # read as much of the first tensor as they return
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2", "unique_consecutive")
_WAITS_OF_ALGEBRA = ("_linalg_check_errors", "_linalg_eigh", "_linalg_svd")
_COUNT = ("_count_chosen", "_sizes")  # kernels whose results are sizes of what follows
# what names begin with
_NO_KERNEL = ("empty", "new_empty", "set_", "resize_", "_unsafe_view", "scalar_tensor")  # a number is an argument
_SCATTERS = ("index_put", "_index_put", "index_add", "index_copy", "index_fill", "scatter", "put_")


class Costs(NamedTuple):
    """passes: bytes read and written over those of the bucket in float32; copied: bytes from the host for each of its elements."""

    launches: int
    passes: float
    syncs: int
    copied: float


class Tally:
    """What has been counted so far.

    launches: of torch's operations, but for views, and of Triton's kernels. moved: bytes that they read and wrote: a kernel's are those of
    its tensors, once each. syncs: how often the host waited. copied: bytes from the host. by_name: launches of each.
    """

    def __init__(self) -> None:
        self.is_paused = False
        self.clear()

    def clear(self) -> None:
        self.launches = self.moved = self.syncs = self.copied = 0
        self.by_name = Counter[str]()

    def costs(self, n: int) -> Costs:
        """For a bucket of n elements."""
        return Costs(self.launches, self.moved / (4 * n), self.syncs, self.copied / n)

    @contextmanager
    def paused(self) -> Iterator[None]:
        was, self.is_paused = self.is_paused, True
        yield
        self.is_paused = was

    def launch(self, name: str, moved: int) -> None:
        self.launches += 1
        self.moved += moved
        self.by_name[name] += 1

    def operation(self, function: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """Count an operation of torch, if it runs on the device and is more than a view."""
        if self.is_paused:
            return
        name, is_view, arguments = _read(function)
        made = _there(result)
        if is_view or name.startswith(_NO_KERNEL) or not (made or _there(args) or _there(kwargs)):
            return
        if name in _COPIES:
            is_arrival = not _there(args[name == "copy_"])
            self.copied += _nbytes(made[0]) if is_arrival else 0
            self.syncs += (is_arrival or not made) and not _is_asynchronous(args, kwargs)
        self.syncs += _is_waited_for(name, args, kwargs)
        self.launch(name, _moved(name, arguments, args, kwargs, made))


@functools.cache
def _read(function: Any) -> tuple[str, bool, tuple[Any, ...]]:
    """An operation's name, whether it returns views, and its arguments' schemas."""
    schema = function._schema
    aliases = [one.alias_info for one in schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return function.name().removeprefix("aten::").partition(".")[0], is_view, tuple(schema.arguments)


def _there(x: Any) -> list[Tensor]:
    """The device's tensors among arguments or results."""
    if isinstance(x, (tuple, list)):
        return [found for one in x for found in _there(one)]
    if isinstance(x, dict):
        return _there(list(x.values()))
    return [x] if isinstance(x, pretend._Pretended) else []


def _nbytes(x: Tensor) -> int:
    """Bytes of memory behind a tensor: what is expanded counts once."""
    return math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride) * x.element_size()


def _is_asynchronous(args: Any, kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("non_blocking") or (len(args) > 2 and args[2]))


def _is_waited_for(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the host has to know values, or how many there are."""
    if name in ("index", "index_put_", "index_put", "_index_put_impl_"):
        has_mask = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        return has_mask and (name == "index" or args[2].numel() != 1)  # one number is filled in
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return name in _WAITS + _WAITS_OF_ALGEBRA


def _moved(name: str, arguments: tuple[Any, ...], args: Any, kwargs: dict[str, Any], made: list[Tensor]) -> int:
    """Bytes of all inputs and outputs."""
    if name in _GATHERS:
        return sum(map(_nbytes, (*_there(args[1:]), *made, *made)))
    if name.startswith(_SCATTERS):
        others = _there(args[1:])
        written = args[0].element_size() * max(x.numel() for x in others)
        return sum(map(_nbytes, others)) + 2 * int(written)  # as many are read
    inputs, outputs = [], []
    for k, one in enumerate(arguments):
        found = _there(args[k] if k < len(args) else kwargs.get(one.name))
        is_written = one.alias_info is not None and one.alias_info.is_write
        outputs += found if is_written else []
        inputs += [] if is_written and (one.kwarg_only or name in _OVERWRITES) else found
    return sum(map(_nbytes, (*inputs, *(outputs or made))))


@contextmanager
def counting(*, runs_kernels: bool = False) -> Iterator[Tally]:
    """Count what is done on the pretended device.

    Triton's kernels are counted and not run, since the interpreter takes long: new memory holds zeros. Those run that the sizes and the
    number of other launches follow from: of headers, so that nothing is bad, and those that count. Residuals stay zero. runs_kernels: all
    run.
    """
    tally, run, start, address = Tally(), pretend._run, pieces.start, pieces.address
    addressed, is_started = list[Tensor](), [True]  # tensors that the next kernel gets by their places in memory

    def counted(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        result = run(function, args, kwargs)
        tally.operation(function, args, kwargs, result)
        if not runs_kernels and "empty" in _read(function)[0]:
            for x in _there(result):
                x.inside.zero_()  # type: ignore[attr-defined]
        return result

    def noted(x: Tensor) -> int:
        if is_started[0]:
            addressed.clear()
        addressed.append(x)
        is_started[0] = False
        return address(x)

    def counted_start(kernel: Any, grid: Any, arguments: Any, constants: dict[str, Any]) -> None:
        is_started[0] = True
        if not tally.is_paused:
            tensors = {id(x): x for x in _there([arguments, constants])}
            if any(id(x) in tensors for x in addressed):  # it finds the others from there
                tensors |= {id(x): x for x in addressed}
            tally.launch(kernel.fn.__name__, sum(map(_nbytes, tensors.values())))
        if runs_kernels or kernel.fn.__module__.endswith(".headers") or kernel.fn.__name__ in _COUNT:
            start(kernel, grid, arguments, constants)

    pretend._run, pieces.start, pieces.address = counted, counted_start, noted
    try:
        yield tally
    finally:
        pretend._run, pieces.start, pieces.address = run, start, address
