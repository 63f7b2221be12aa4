"""Selection of the largest elements on a CPU: a sampled threshold leaves few candidates, the exact cut is made among those."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from commopt.kernels.cpu.compiled import F32, Bool, Places, fast
from commopt.kernels.cpu.signs import residual_arrays
from commopt.wire.bucket import Blocks, Int64Array

_SLICE = 2048
_STRIDE = 101  # one in a hundred is sampled; prime, so that rows of a matrix are not sampled in the same column


@fast
def _correct(x: F32, e: F32, c: F32) -> Any:
    total = np.float32(0.0)
    for i in range(x.size):
        v = x[i] + e[i]
        c[i] = v
        total += abs(v)
    return total


@fast
def _candidates(c: F32, threshold: np.float32, out: Int64Array) -> int:
    count = 0
    for i in range(c.size):
        if abs(c[i]) >= threshold:
            out[count] = i
            count += 1
    return count


@fast
def _kth(values: F32, k: int) -> Any:
    """The element at index k of the sorted values, which are reordered: Hoare's selection. numpy's compiles for ten times as long."""
    low, high = 0, values.size - 1
    while low < high:
        pivot, i, j = values[(low + high) // 2], low, high
        while i <= j:
            while values[i] < pivot:
                i += 1
            while values[j] > pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if k <= j:
            high = j
        elif k >= i:
            low = i
        else:
            break
    return values[k]


@fast
def _sampled_threshold(c: F32, k: int) -> Any:
    """A magnitude that more than k elements very likely reach: that of a sample's top share, with a margin for the draw."""
    sample = np.abs(c[::_STRIDE])
    expected = sample.size * k / c.size
    rank = int(1.25 * expected + 4 * math.sqrt(expected) + 4)
    if rank >= sample.size:
        return np.float32(0.0)
    return _kth(sample, sample.size - rank)


@fast
def _top(c: F32, k: int, candidates: Int64Array, out: Int64Array) -> None:
    """The k largest by magnitude, in ascending order of index; of equal ones the first."""
    count = _candidates(c, _sampled_threshold(c, k), candidates)
    if count < k:  # the sample was misleading: take the exact cut among all
        count = _candidates(c, np.float32(0.0), candidates)
    magnitudes = np.empty(count, np.float32)
    for j in range(count):
        magnitudes[j] = abs(c[candidates[j]])
    cut = _kth(magnitudes, count - k)
    ties = k
    for j in range(count):
        ties -= magnitudes[j] > cut
    place = 0
    for j in range(count):
        magnitude = abs(c[candidates[j]])
        is_tie = magnitude == cut
        if magnitude > cut or (is_tie and ties > 0):
            out[place] = candidates[j]
            place += 1
            ties -= is_tie


@fast
def _select(
    x: F32, e: F32, own: Places, threshold: np.float32, keep: bool, indices: Int64Array, values: F32, good: Bool
) -> None:
    starts, homes, lengths, ks = own
    longest = 0
    for b in range(lengths.size):
        longest = max(longest, lengths[b])
    c_all, candidates = np.empty(longest, np.float32), np.empty(longest, np.int64)
    place = 0
    for b in range(lengths.size):
        n, k = lengths[b], ks[b]
        part_x, part_e, c = x[starts[b] : starts[b] + n], e[homes[b] : homes[b] + n], c_all[:n]
        total = 0.0
        for a in range(0, n, _SLICE):
            total += float(_correct(part_x[a : a + _SLICE], part_e[a : a + _SLICE], c[a : a + _SLICE]))
        good[b] = abs(total) <= 1e300  # false for NaN and inf; isfinite may be folded away under reassoc
        out = indices[place:]
        if threshold > 0:
            k = ks[b] = _candidates(c, threshold, out)
        elif k == n or not good[b]:
            for j in range(k):
                out[j] = j
        else:
            _top(c, k, candidates, out)
        for j in range(k):
            values[place + j] = c[out[j]]
        if keep and good[b]:
            part_e[:] = c
        place += k


def select_(
    x: Tensor, residual: Tensor | None, blocks: Blocks, ks: Int64Array, threshold: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Of c = x + residual, per block, the ks[b] elements of largest magnitude, or all that reach a threshold above 0.

    Returns indices within each block (sum ks,) i64 in ascending order, their values (sum ks,) f32, and (B,) bool, whether a block
    has neither NaN nor inf. residual <- c in good blocks. With a threshold, ks is overwritten by what was found.
    """
    e, homes = residual_arrays(residual, blocks)
    room = blocks.elements if threshold > 0 else int(ks.sum())
    indices, values, good = np.empty(room, np.int64), np.empty(room, np.float32), np.empty(len(blocks), np.bool_)
    own = (blocks.starts, homes, blocks.lengths, ks)
    _select(x.numpy(), e, own, np.float32(threshold), residual is not None, indices, values, good)
    found = int(ks.sum())
    return torch.from_numpy(indices[:found]), torch.from_numpy(values[:found]), torch.from_numpy(good)
