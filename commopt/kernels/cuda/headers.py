"""The headers of messages on a GPU: the first parameter with a bad block is found and sent without a word to the host.

While kernels look for bad blocks, a header holds LAST less the first bad parameter, or 0, as in a new row of payloads.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from commopt.kernels.cuda.pieces import LAST, launch
from commopt.wire.payload import Payload, row_of


@triton.jit
def _open(received, places, count, words, ends, ends_count, tail, size, first, WIDTH: tl.constexpr, ENDS: tl.constexpr):
    """Note what received messages say, and fill up those to be sent: zeros in their last words, which codes may overwrite, and behind."""
    k, j = tl.arange(0, WIDTH), tl.arange(0, ENDS)
    header = tl.load(received + tl.load(places + k, mask=k < count, other=0), mask=k < count, other=-1)
    tl.store(first, -tl.min(tl.where(header < 0, LAST, header), 0) + LAST)
    is_end = j < ends_count
    tl.store(words + tl.load(ends + j, mask=is_end, other=0), tl.zeros((ENDS,), tl.int32), mask=is_end)
    for begin in range(tail, size, ENDS):
        tl.store(words + begin + j, tl.zeros((ENDS,), tl.int32), mask=begin + j < size)


@triton.jit
def _write(first, words, places, count, WIDTH: tl.constexpr):
    k, noted = tl.arange(0, WIDTH), tl.load(first)
    header = tl.zeros((WIDTH,), tl.int32) + tl.where(noted == 0, -1, -noted + LAST)
    tl.store(words + tl.load(places + k, mask=k < count, other=0), header, mask=k < count)


def noted_in(payloads: Sequence[Payload], received: Sequence[Payload] = (), *, is_new: bool = False) -> Tensor:
    """(1,) i32: the header of payloads to be sent where kernels note bad blocks; what received messages say is noted already.

    is_new: the payloads are not zero yet: their headers, and the bytes that fill them up.
    """
    row, at = row_of(payloads)
    words = row.view(torch.int32)
    first = words[at[0] // 4 : at[0] // 4 + 1]
    if received or is_new:
        own = zip(at, payloads, strict=True) if is_new else ()
        ends = tuple(place + payload.nbytes - 4 for place, payload in own if payload.nbytes > 4)
        there = _words(received) if received else (words, _places(ends, row.device), 0)
        tail = (at[-1] + payloads[-1].nbytes) // 4 if is_new else len(words)
        where = (words, _places(ends, row.device), len(ends), tail, len(words), first)
        launch(_open, (1,), *there, *where, WIDTH=_width(len(received)), ENDS=max(128, _width(len(ends))))
    return first


def write_(first: Tensor, payloads: Sequence[Payload]) -> None:
    """Write the first bad parameter that has been noted, or -1, into the headers of payloads in one buffer."""
    launch(_write, (1,), first, *_words(payloads), WIDTH=_width(len(payloads)))


def _words(payloads: Sequence[Payload]) -> tuple[Tensor, Tensor, int]:
    row, at = row_of(payloads)
    return row.view(torch.int32), _places(at, row.device), len(at)


@lru_cache(maxsize=1024)
def _places(at: tuple[int, ...], device: torch.device) -> Tensor:
    """(N,) i64: where in the words of a buffer its payloads begin."""
    return torch.tensor([byte // 4 for byte in at or (0,)], dtype=torch.int64).to(device)


def _width(count: int) -> int:
    return max(2, int(triton.next_power_of_2(count)))
