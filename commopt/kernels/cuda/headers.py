"""The headers of messages on a GPU: the first parameter with a bad block is found and sent without a word to the host."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from commopt.kernels.cuda.pieces import NONE_BAD, launch
from commopt.wire.payload import Payload, row_of


@triton.jit
def _lowest(words, places, count, out, WIDTH: tl.constexpr):
    k = tl.arange(0, WIDTH)
    header = tl.load(words + tl.load(places + k, mask=k < count, other=0), mask=k < count, other=-1)
    tl.store(out, tl.min(tl.where(header < 0, NONE_BAD, header), 0))


@triton.jit
def _write(first, words, places, count, WIDTH: tl.constexpr):
    k, lowest = tl.arange(0, WIDTH), tl.load(first)
    header = tl.zeros((WIDTH,), tl.int32) + tl.where(lowest == NONE_BAD, -1, lowest)
    tl.store(words + tl.load(places + k, mask=k < count, other=0), header, mask=k < count)


def first_in(payloads: Sequence[Payload], device: torch.device) -> Tensor:
    """(1,) i32: the first bad parameter in the headers of messages, or the largest number if none is bad or there are none."""
    if not payloads:
        return torch.full((1,), NONE_BAD.value, dtype=torch.int32, device=device)
    out = torch.empty(1, dtype=torch.int32, device=device)
    launch(_lowest, (1,), *_words(payloads), out, WIDTH=_width(len(payloads)))
    return out


def write_(first: Tensor, payloads: Sequence[Payload]) -> None:
    """Write the first bad parameter, or -1, into the headers of messages in one buffer."""
    launch(_write, (1,), first, *_words(payloads), WIDTH=_width(len(payloads)))


def _words(payloads: Sequence[Payload]) -> tuple[Tensor, Tensor, int]:
    row, at = row_of(payloads)
    return row.view(torch.int32), _places(at, row.device), len(at)


@lru_cache(maxsize=1024)
def _places(at: tuple[int, ...], device: torch.device) -> Tensor:
    """(N,) i64: where in the words of a buffer its payloads begin."""
    return torch.tensor([byte // 4 for byte in at], dtype=torch.int64).to(device)


def _width(count: int) -> int:
    return max(2, int(triton.next_power_of_2(count)))
