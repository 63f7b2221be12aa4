"""PowerSGD's second factors on a GPU: all that a bucket has are made the next step's first ones in one launch."""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from commopt.kernels.cuda.pieces import drawn, key_of, launch, words_of
from commopt.wire.bucket import Blocks, kept

_SIZE = 1024  # elements that a program takes at a time


@triton.jit(do_not_specialize=["word"])
def _normalise(q, out, columns, count, word, words, KEYS: tl.constexpr, SIZE: tl.constexpr):
    p, i = tl.program_id(0), tl.arange(0, SIZE)
    start, home, n = tl.load(columns + p), tl.load(columns + count + p), tl.load(columns + 2 * count + p)
    squares = tl.zeros((SIZE,), tl.float64)
    for begin in range(0, n, SIZE):
        x = tl.load(q + start + begin + i, mask=begin + i < n, other=0.0).to(tl.float64)
        squares += x * x
    length = tl.sqrt(tl.sum(squares, 0))
    row = p + tl.arange(0, 1)
    key = key_of(word, words, columns, count, row, row < count, KEYS)
    within = tl.load(columns + 7 * count + p)
    for begin in range(0, n, SIZE):
        if length > 0:
            x = tl.load(q + start + begin + i, mask=begin + i < n, other=0.0).to(tl.float64)
            y = (x / length).to(tl.float32)
        else:
            top = tl.reshape(drawn(key, (within + begin + i)[None, :]), (SIZE,)) >> 40
            y = top.to(tl.int64).to(tl.float32) * (1 / (1 << 24)) - 0.5
        tl.store(out + home + begin + i, y, mask=begin + i < n)


def normalise_(q: Tensor, out: Tensor, rows: Blocks) -> None:
    """out <- q in rows of length 1; rows of zeros are drawn by their words, element for element as `noise.uniform` - 0.5.

    rows: `groups` counts the elements of a factor that come before the row.
    """

    def find() -> Tensor:
        unused = np.zeros_like(rows.starts)
        found = (rows.starts, rows.homes, rows.lengths, unused, unused, rows.parameters, rows.named, rows.groups)
        return torch.from_numpy(np.stack(found)).to(q.device)

    columns = kept(rows.tables, "rows", (), find)
    word, words, keys = words_of([rows], columns)
    launch(_normalise, (len(rows),), q, out, columns, len(rows), word, words, KEYS=keys, SIZE=_SIZE)
