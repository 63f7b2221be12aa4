"""Buffers on the host for tensors of a GPU, where the library that sends them reads only the host's memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
        if x.is_cuda:
            torch.cuda.current_stream(x.device).synchronize()
        return here

    def to_device_(self, x: Tensor, purpose: str, here: Tensor) -> Tensor:
        """x <- here, which is the buffer of this purpose; x is ready for its stream, and the host goes on."""
        x.copy_(here, non_blocking=True)
        if x.is_cuda:
            self._read[purpose] = torch.cuda.current_stream(x.device).record_event()
        return x
