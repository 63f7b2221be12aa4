"""Pretended streams: each operation on the pretended device is a kernel launch on its thread's current stream, for torch's sanitizer.

What happens before what follows from events alone; that the host waits for something helps only what it reads and writes in buffers
that tensors of the device are copied to or from. Memory whose last tensor has gone is written by its next owner, once the stream that
allocated it, and those it was recorded for, have come so far: as the caching allocator gives it away.
"""

from __future__ import annotations

import itertools
import threading
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pretend
import pytest
import torch
from torch import Tensor
from torch.cuda._sanitizer import EventHandler

from commopt.groups import staging
from commopt.kernels.cuda import pieces
from commopt.optim import update

_HOST = -1  # what the host reads and writes is on a stream of its own, which sees what it has waited for
_ASKED = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::is_nonzero")


class Streams:
    """One pretended GPU's streams, and the unordered accesses found."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self._handler, self._lock, self._local = EventHandler(), threading.RLock(), threading.local()
        self._numbers = itertools.count(1)
        self._owner: dict[int, int] = {}  # by storage: the stream that allocated it
        self._alive: dict[int, int] = {}  # by storage: how many tensors it has
        self._recorded: dict[int, set[int]] = {}
        self._kept: list[Any] = []  # storages, so that no address comes twice
        self._buffers: set[int] = set()  # storages of the host that were copied to or from
        self._handler._handle_stream_creation(0)
        self._handler._handle_stream_creation(_HOST)

    @property
    def current(self) -> int:
        return getattr(self._local, "stream", 0)

    @property
    def noted(self) -> Counter[str]:
        """How often this thread's host has copied elements and waited, as "copies" and "waits"."""
        if not hasattr(self._local, "noted"):
            self._local.noted = Counter()
        noted: Counter[str] = self._local.noted
        return noted

    def new_stream(self) -> int:
        with self._lock:
            number = next(self._numbers)
            self._handler._handle_stream_creation(number)
            return number

    def record(self, stream: int) -> int:
        with self._lock:
            event = next(self._numbers)
            self._handler._handle_event_creation(event)
            self._handler._handle_event_record(event, stream)
            return event

    def wait(self, stream: int, event: int) -> None:
        with self._lock:
            self._handler._handle_event_wait(event, stream)

    def wait_event(self, stream: int, event: int) -> None:
        """What a program asks for."""
        self.wait(stream, event)

    def synchronize(self, event: int) -> None:
        """The same, for the host."""
        self.noted["waits"] += 1
        self.wait(_HOST, event)

    @contextmanager
    def on(self, stream: int) -> Iterator[None]:
        before, self._local.stream = self.current, stream
        yield
        self._local.stream = before

    def launch(self, name: str, stream: int, reads: set[int], writes: set[int]) -> None:
        with self._lock:
            aliases = {storage: [name] for storage in reads | writes}
            found: list[Any] = self._handler._handle_kernel_launch(stream, reads - writes, writes, set(), name, aliases)
            self.errors += [
                f"{name} on stream {stream} after {one.previous_access.operator} on stream {one.previous_access.stream}"
                for one in found
            ]

    def record_stream(self, x: Any, stream: Any) -> None:
        self._recorded.setdefault(_storage(x), set()).add(stream.number)

    def run(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation, and note what it reads and writes."""
        result = _RUN(function, args, kwargs)
        inputs, outputs = _tensors((*args, *kwargs.values())), _tensors(result)
        there = [x for x in (*inputs, *outputs) if isinstance(x, pretend._Pretended)]
        for x in there:
            self._own(x)
        name, returns = function.name().partition(".")[0], [one.alias_info for one in function._schema.returns]
        if any(one is not None and not one.is_write for one in returns):  # it makes a view
            return result
        here = [x for x in (*inputs, *outputs) if not isinstance(x, pretend._Pretended) and x.dim()]
        is_copy = name in pretend._MOVES and bool(there) and bool(here)
        if is_copy:
            self._keep(here)
        pairs = zip(function._schema.arguments, args, strict=False)
        written = [x for one, x in pairs if one.alias_info is not None and one.alias_info.is_write]
        known = [_storage(x) for x in inputs if isinstance(x, pretend._Pretended) or _storage(x) in self._buffers]
        writes = {_storage(x) for x in (*written, *outputs) if isinstance(x, Tensor)} & {*known, *map(_storage, there)}
        stream = self.current if there else _HOST
        if is_copy:
            self.wait(stream, self.record(_HOST))  # what the host did before it has launched this
        if known or there:
            self.launch(function.name(), stream, set(known), writes)
        if is_copy or (there and name in _ASKED):
            self.noted["copies"] += is_copy
            if not (is_copy and (kwargs.get("non_blocking") or True in args[2:])):
                self.noted["waits"] += 1
                self.wait(_HOST, self.record(stream))
        return result

    def start(self, kernel: Any, grid: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        """Run a kernel, which may write whatever it is given."""
        _START(kernel, grid, arguments, constants)
        given = {_storage(x) for x in arguments if isinstance(x, pretend._Pretended)}
        self.launch(kernel.fn.__name__, self.current, set(), given)

    def _keep(self, buffers: list[Tensor]) -> None:
        with self._lock:
            self._kept += buffers
            self._buffers.update(map(_storage, buffers))

    def _own(self, x: Any) -> None:
        if getattr(x, "is_known", False):
            return
        x.is_known, storage = True, _storage(x)
        with self._lock:
            self._kept.append(x.inside)
            self._owner.setdefault(storage, self.current)
            self._alive[storage] = self._alive.get(storage, 0) + 1
        weakref.finalize(x, self._gone, storage)

    def _gone(self, storage: int) -> None:
        with self._lock:
            self._alive[storage] -= 1
            if self._alive[storage] == 0:
                next_owner = self.new_stream()
                for stream in {self._owner[storage]} | self._recorded.get(storage, set()):
                    self.wait(next_owner, self.record(stream))
                self.launch("the memory's next owner", next_owner, set(), {storage})


_RUN: Callable[..., Any] = pretend._run
_START: Callable[..., Any] = pieces.start


def _tensors(x: Any) -> list[Tensor]:
    """Those in x, also inside lists and tuples."""
    if isinstance(x, list | tuple):
        return [one for each in x for one in _tensors(each)]
    return [x] if isinstance(x, Tensor) else []


def _storage(x: Any) -> int:
    return int(getattr(x, "inside", x).untyped_storage()._cdata)


@contextmanager
def pretended(lane: Any) -> Iterator[Streams]:
    """Let the module of lanes, and copies to and from the host, work on pretended streams."""
    streams = Streams()

    class Event:
        def __init__(self, **_: Any) -> None:
            self.number = 0

        def synchronize(self) -> None:
            streams.synchronize(self.number)

    class Stream:
        def __init__(self, *_: Any, number: int | None = None, **__: Any) -> None:
            self.number = streams.new_stream() if number is None else number

        def record_event(self, event: Event | None = None) -> Event:
            event = Event() if event is None else event
            event.number = streams.record(self.number)
            return event

        def wait_event(self, event: Event) -> None:
            streams.wait_event(self.number, event.number)

        def synchronize(self) -> None:
            self.record_event().synchronize()

    class Cuda:
        set_device = staticmethod(lambda _: None)
        current_stream = staticmethod(lambda _: Stream(number=streams.current))
        stream = staticmethod(lambda stream: streams.on(stream.number))
        device = staticmethod(nullcontext)

    Cuda.Stream, Cuda.Event = Stream, Event  # type: ignore[attr-defined]

    class Future:
        """As torch's: whoever waits lets its stream wait for the one that has set the result."""

        def __init__(self, devices: Any) -> None:
            self.done = threading.Event()
            self._result: Any = None

        def set_result(self, x: Any) -> None:
            self._event, self._result = streams.record(streams.current), x
            self.done.set()

        def set_exception(self, error: Exception) -> None:
            self._event, self._result = -1, error
            self.done.set()

        def wait(self) -> Any:
            self.done.wait()
            if isinstance(self._result, Exception):
                raise self._result
            streams.wait(streams.current, self._event)
            return self._result

        def drop(self) -> None:
            self._result = None

    class Torch:
        cuda, device = Cuda, staticmethod(torch.device)

    with pytest.MonkeyPatch.context() as patch:
        no_stacks = SimpleNamespace(StackSummary=traceback.StackSummary, walk_stack=lambda _: ())
        patch.setattr("torch.cuda._sanitizer.traceback", no_stacks)  # of each access; no test reads them
        patch.setattr(lane, "torch", Torch)
        patch.setattr(lane, "Future", Future)
        patch.setattr(staging, "cuda", Cuda)
        patch.setattr(staging, "has_streams", lambda device: device.type == pretend.DEVICE.type)
        patch.setattr(update, "keep_until_used", lambda x: streams.record_stream(x, Cuda.current_stream(x)))
        patch.setattr(pretend, "_run", streams.run)
        patch.setattr(pieces, "start", streams.start)
        patch.setattr(pretend._Pretended, "record_stream", lambda x, stream: streams.record_stream(x, stream))
        yield streams
