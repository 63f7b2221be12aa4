"""What travels: a tuple of tensors in wire dtype, laid out in one uint8 buffer."""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Layout = tuple[tuple[torch.dtype, int], ...]
LAST = 0x7FFFFFFF  # less the first bad parameter is what is noted of one, and 0 of none
DTYPES = {  # of what travels between peers, by the names that torch gives them
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    )
}


@dataclass(eq=False)
class Payload:
    """Tensors that travel together, as views of the one buffer that is sent and counted.

    row: u8, contiguous, the buffer of this payload, and maybe of others; at: at which byte this one begins. It is a multiple of the
    widest element long, so that payloads can stand one behind the other. tensors: 1-D views in `layout`'s order, widest dtype first.
    """

    row: Tensor
    layout: Layout
    at: int = 0

    @classmethod
    def allocate(cls, layout: Layout, device: torch.device | str = "cpu") -> Payload:
        """A payload whose contents are still to be written; the padding at its end is zero."""
        buffer = torch.empty(layout_bytes(layout), dtype=torch.uint8, device=device)
        buffer[-8:] = 0
        return cls(buffer, layout)

    @classmethod
    def of(cls, *tensors: Tensor) -> Payload:
        """Copy tensors into one new buffer."""
        payload = cls.allocate(tuple((x.dtype, x.numel()) for x in tensors), tensors[0].device if tensors else "cpu")
        for view, x in zip(payload.tensors, tensors, strict=True):
            view.copy_(x.reshape(-1))
        return payload

    @cached_property
    def buffer(self) -> Tensor:
        """(nbytes,) u8: this payload's part of the row."""
        return self.row if len(self.row) == self.nbytes else self.row[self.at : self.at + self.nbytes]

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        views, offset = [], 0
        for dtype, length in self.layout:
            end = offset + length * dtype.itemsize
            views.append(self.buffer[offset:end].view(dtype))
            offset = end
        return tuple(views)

    def opened(self, *layout: tuple[torch.dtype, int | None]) -> tuple[Tensor, ...] | None:
        """The tensors, if they have this layout (None: any length) and are sound; else None: such a message counts as missing."""
        pairs = zip(layout, self.layout, strict=False)
        fits = len(layout) == len(self.layout) and all(
            own[0] == dtype and length in (None, own[1]) for (dtype, length), own in pairs
        )
        return self.tensors if fits and all(map(is_sound, self.tensors)) else None

    @property
    def nbytes(self) -> int:
        return layout_bytes(self.layout)


class Bundle(list[Payload]):
    """Payloads of one buffer: `row`, and at which byte each begins."""

    def __init__(self, row: Tensor, layouts: Sequence[Layout], at: tuple[int, ...]) -> None:
        super().__init__(map(Payload, itertools.repeat(row), layouts, at))
        self.row, self.at = row, at

    @classmethod
    def of(cls, payloads: Sequence[Payload]) -> Bundle:
        """These payloads; copied into one buffer, unless they are in one already."""
        if isinstance(payloads, Bundle):
            return payloads
        row, layouts = payloads[0].row, [payload.layout for payload in payloads]
        if all(payload.row is row for payload in payloads):
            return cls(row, layouts, tuple([payload.at for payload in payloads]))
        return cls(torch.cat([payload.buffer for payload in payloads]), layouts, plan(tuple(layouts)).at)

    @cached_property
    def octets(self) -> NDArray[np.uint8]:
        """The row, on the CPU."""
        return self.row.numpy()

    @cached_property
    def heads(self) -> NDArray[np.int32]:
        """(payloads,) i32: their headers, on the CPU; a copy."""
        taken: NDArray[np.int32] = self._words[np.asarray(self.at) // 4]
        return taken

    def head_all_(self, word: int) -> None:
        """Overwrite all headers."""
        if self.row.device.type == "cpu":
            self._words[np.asarray(self.at) // 4] = word
            return
        for payload in self:
            payload.tensors[0].fill_(word)

    @property
    def _words(self) -> NDArray[np.int32]:
        return self.octets[: len(self.octets) // 4 * 4].view(np.int32)


@dataclass(frozen=True)
class Plan:
    """Where payloads lie one behind the other: at which byte each begins, and the bytes of all."""

    at: tuple[int, ...]
    nbytes: int


@functools.lru_cache(4096)
def plan(layouts: tuple[Layout, ...]) -> Plan:
    """Made once for these layouts."""
    *at, nbytes = itertools.accumulate(map(layout_bytes, layouts), initial=0)
    return Plan(tuple(at), nbytes)


def noted(parameter: int) -> int:
    """What is noted of the first bad parameter, or of -1: the higher the earlier it is."""
    return LAST - parameter if parameter >= 0 else 0


def parameter(noted: int) -> int:
    """The first bad parameter that has been noted, or -1."""
    return LAST - noted if noted else -1


def is_sound(x: Tensor) -> bool:
    """Whether the square of its norm is a float32: it has no NaN, no inf, and nothing like 1e30, which only damage or divergence make."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return not x.is_floating_point() or float(torch.linalg.vector_norm(x, dtype=wide)) < 1e19


def checksum(x: Tensor, start: int = 0) -> int:
    """CRC-32 of a tensor's bytes, or of those behind what has the checksum `start`."""
    return zlib.crc32(cast(Any, x.detach().contiguous().view(torch.uint8).numpy()), start)


@functools.lru_cache(4096)
def layout_bytes(layout: Layout) -> int:
    """Bytes of a payload with this layout, padding included. Raises ValueError if a view would be misaligned."""
    widths = [dtype.itemsize for dtype, _ in layout]
    if widths != sorted(widths, reverse=True):
        raise ValueError(f"a payload lists its widest dtype first, got {[str(dtype) for dtype, _ in layout]}")
    nbytes = sum(dtype.itemsize * length for dtype, length in layout)
    return -(-nbytes // max(widths, default=1)) * max(widths, default=1)


def gathered_bytes(layouts: Sequence[Layout]) -> int:
    """Bytes that each rank contributes if payloads of these layouts are gathered: those of the largest, in whole words if they differ."""
    sizes = {layout_bytes(layout) for layout in layouts}
    return max(sizes) if len(sizes) == 1 else -(-max(sizes) // 8) * 8


def cut(buffer: Tensor, layouts: Sequence[Layout]) -> Bundle:
    """Cut a buffer of payloads that stand one behind the other."""
    return Bundle(buffer, layouts, plan(tuple(layouts)).at)


def in_a_row(layouts: Sequence[Layout], device: torch.device, *, is_zero: bool = True, room: int = 0) -> Bundle:
    """Payloads one behind the other, whose contents are still to be written; what lies between tensors and payloads is zero.

    is_zero: if False, that is still to be written, too. room: bytes of the row, if it is to be padded.
    """
    places = plan(tuple(layouts))
    nbytes = max(places.nbytes, room)
    if device.type == "cpu":  # numpy's takes a third of the time
        row = torch.from_numpy((np.zeros if is_zero else np.empty)(nbytes, np.uint8))
    else:
        row = (torch.zeros if is_zero else torch.empty)(nbytes, dtype=torch.uint8, device=device)
    return Bundle(row, layouts, places.at)


def padded(payload: Payload, nbytes: int) -> Tensor:
    """(nbytes,) u8: a payload, and zeros that its row may have room for."""
    if len(payload.row) == payload.at + nbytes:
        return payload.row[payload.at :] if payload.at else payload.row
    padding = nbytes - payload.nbytes
    return torch.nn.functional.pad(payload.buffer, (0, padding)) if padding else payload.buffer


def joined(payloads: Sequence[Payload]) -> Tensor:
    """(sum of nbytes,) u8: payloads end to end; a copy, unless they are all of one row."""
    bundle, places = Bundle.of(payloads), plan(tuple([payload.layout for payload in payloads]))
    is_row = bundle.at == places.at and len(bundle.row) == places.nbytes
    return bundle.row if is_row else torch.cat([payload.buffer for payload in bundle])


def row_of(payloads: Sequence[Payload]) -> tuple[Tensor, tuple[int, ...]]:
    """A buffer that has all payloads, and at which byte each begins."""
    bundle = Bundle.of(payloads)
    return bundle.row, bundle.at
