"""Buffers on the host for tensors of a GPU, where what sends them reads only the host's memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, cuda


def has_streams(device: torch.device) -> bool:
    """Whether the host goes on while the device copies."""
    return device.type == "cuda"


class Staging:
    """One buffer for each purpose, pinned for a GPU, and used again in every call."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._read: dict[str, Any] = {}  # by purpose: the event after which a GPU has read its buffer

    def empty(self, purpose: str, like: Tensor, numel: int | None = None) -> Tensor:
        """(numel,) in a tensor's dtype, on the host: where the next call with this purpose will write, too."""
        shape = like.shape if numel is None else (numel,)
        nbytes = like.dtype.itemsize * (like.numel() if numel is None else numel)
        if purpose in self._read:
            self._read.pop(purpose).synchronize()
        buffer = self._buffers.get(purpose)
        if buffer is None or buffer.numel() < nbytes:
            buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=like.is_cuda)
            self._buffers[purpose] = buffer
        return buffer[:nbytes].view(like.dtype).view(shape)

    def to_host(self, x: Tensor, purpose: str) -> Tensor:
        """A copy on the host, complete when this returns."""
        here = self.empty(purpose, x)
        here.copy_(x.detach(), non_blocking=True)
        if has_streams(x.device):
            cuda.current_stream(x.device).synchronize()
        return here

    def to_device_(self, x: Tensor, purpose: str, here: Tensor) -> Tensor:
        """x <- here, which is the buffer of this purpose; x is ready for its stream, and the host goes on."""
        x.copy_(here, non_blocking=True)
        if has_streams(x.device):
            self._read[purpose] = cuda.current_stream(x.device).record_event()
        return x


class SideStaging:
    """Copies between one device and pinned buffers on a side stream, while training and the host go on; on the CPU there are none.

    is_async: whether a copy to the host may still be under way when `to_host` returns.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.is_async, self._staging = device, has_streams(device), Staging()
        self._stream: Any = cuda.Stream(device) if self.is_async else None  # type: ignore[no-untyped-call]

    def to_host(self, x: Tensor, purpose: str) -> tuple[Tensor, Callable[[], object]]:
        """A copy of x, which is there until the next call with this purpose, and a function that waits for it, on any thread."""
        if self.device.type == "cpu":
            return x, _done
        if not self.is_async:
            return self._staging.to_host(x, purpose), _done
        here = self._staging.empty(purpose, x)
        self._stream.wait_event(cuda.current_stream(self.device).record_event())
        with cuda.stream(self._stream):
            here.copy_(x, non_blocking=True)
        x.record_stream(self._stream)
        copied = cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # else the thread that waits keeps a core busy
        self._stream.record_event(copied)

        def wait() -> None:
            with cuda.device(self.device):  # a new thread is on the first GPU, whichever this rank has
                copied.synchronize()

        return here, wait

    def to_device(self, x: Tensor) -> Tensor:
        """A copy of x on the device, which the current stream waits for, and the host does not."""
        if self.device.type == "cpu":
            return x
        with cuda.stream(self._stream):
            there = torch.empty(x.shape, dtype=x.dtype, device=self.device)
            here = self._staging.empty("back", there).copy_(x)
            self._staging.to_device_(there, "back", here)
        if self.is_async:
            training = cuda.current_stream(self.device)
            training.wait_event(self._stream.record_event())
            there.record_stream(training)
        return there


def _done() -> None:
    """Wait for nothing."""
