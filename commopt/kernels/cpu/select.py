"""Selection of the largest elements on a CPU: a sampled threshold leaves few candidates, the exact cut is made among those."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from commopt.kernels.cpu.compiled import F32, I32, U8, Bool, Places, exact, fast
from commopt.wire.bucket import Blocks, Int64Array, UInt64Array

Room = tuple[F32, I32, U8, UInt64Array]  # for a slice: its values, their bits, which are marked, and eight marks as one
_SLICE = 2048
_STRIDE, _SHORT_STRIDE = 101, 13  # of a sample; prime, so that rows of a matrix are not sampled in the same column
_SHORT = 2**16  # elements of a block of which one in a hundred is too few to know much
_LARGEST = np.float32(np.finfo(np.float32).max)
_ALL_BUT_SIGN, _INFINITE = np.int32(0x7FFFFFFF), np.int32(0x7F800000)


@fast
def _correct(x: F32, e: F32, has_residual: bool, c: F32) -> None:
    for i in range(x.size):
        c[i] = x[i] + e[i] if has_residual else x[i]


@fast
def _is_finite(c_bits: I32, n: int) -> bool:
    largest = np.int32(0)
    for i in range(n):
        largest = max(largest, np.int32(c_bits[i] & _ALL_BUT_SIGN))
    return bool(largest < _INFINITE)


@fast
def _mark(c: F32, n: int, threshold: np.float32, marks: U8) -> None:
    for i in range(n):
        marks[i] = np.uint8(abs(c[i]) >= threshold)


@fast
def _gather(
    c: F32, marks: U8, octets: UInt64Array, n: int, first: int, indices: Int64Array, values: F32, count: int
) -> int:
    """Append what is marked. Few octets have a mark, and of those that do all are written, and the next one overwrites the rest."""
    for j in range((n + 7) // 8):
        if octets[j] != np.uint64(0):
            for i in range(8 * j, 8 * j + 8):
                indices[count], values[count] = first + i, c[i]
                count += int(marks[i])
    return count


@fast
def _reaching(
    x: F32, e: F32, has_residual: bool, threshold: np.float32, indices: Int64Array, values: F32, room: Room
) -> Any:
    """How many elements of x + e reach the threshold, which are written; and whether all are finite."""
    c, c_bits, marks, octets = room
    count, is_good = 0, True
    for a in range(0, x.size, _SLICE):
        n = min(_SLICE, x.size - a)
        _correct(x[a : a + n], e[a : a + n], has_residual, c)
        is_good &= _is_finite(c_bits, n)
        _mark(c, n, threshold, marks)
        marks[n : (n + 7) // 8 * 8] = 0
        count = _gather(c, marks, octets, n, a, indices, values, count)
    return count, is_good


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
def _sampled_threshold(x: F32, e: F32, has_residual: bool, k: int) -> Any:
    """A magnitude that more than k elements very likely reach: that of a sample's top share, with a margin for the draw."""
    stride = _SHORT_STRIDE if x.size < _SHORT else _STRIDE
    sample = np.abs(x[::stride] + e[::stride] if has_residual else x[::stride])
    expected = sample.size * k / x.size
    rank = int(1.25 * expected + 4 * math.sqrt(expected) + 4)
    if rank >= sample.size:
        return np.float32(0.0)
    return _kth(sample, sample.size - rank)


@fast
def _cut(candidates: Int64Array, found: F32, magnitudes: F32, k: int, indices: Int64Array, values: F32) -> None:
    """The k largest candidates by magnitude, in ascending order of index; of equal ones the first."""
    count = found.size
    for j in range(count):
        magnitudes[j] = abs(found[j])
    cut = _kth(magnitudes, count - k)
    ties = k
    for j in range(count):
        ties -= magnitudes[j] > cut
    place = 0
    for j in range(count):
        magnitude = abs(found[j])
        is_tie = magnitude == cut
        if magnitude > cut or (is_tie and ties > 0):
            indices[place], values[place] = candidates[j], found[j]
            place += 1
            ties -= is_tie


@fast
def _select(
    x: F32, e: F32, own: Places, threshold: np.float32, has_residual: bool, indices: Int64Array, values: F32, good: Bool
) -> None:
    starts, homes, lengths, ks = own
    longest = 0
    for b in range(lengths.size):
        longest = max(longest, lengths[b])
    longest = 0 if threshold > 0 else longest + 8
    candidates, found = np.empty(longest, np.int64), np.empty(longest, np.float32)
    magnitudes = np.empty(longest, np.float32)
    c, marks = np.empty(_SLICE, np.float32), np.empty(_SLICE, np.uint8)
    room = (c, c.view(np.int32), marks, marks.view(np.uint64))
    place = 0
    for b in range(lengths.size):
        n, k = lengths[b], ks[b]
        part_x, part_e = x[starts[b] : starts[b] + n], e[homes[b] : homes[b] + n]
        to, to_values = indices[place:], values[place:]
        if threshold > 0:
            k, good[b] = _reaching(part_x, part_e, has_residual, threshold, to, to_values, room)
            ks[b] = k
        else:
            least = np.float32(np.inf) if k == n else _sampled_threshold(part_x, part_e, has_residual, k)
            count, good[b] = _reaching(part_x, part_e, has_residual, least, candidates, found, room)
            if k < n and good[b]:
                if count < k:  # the sample was misleading: take the exact cut among all
                    count, _ = _reaching(part_x, part_e, has_residual, np.float32(0.0), candidates, found, room)
                _cut(candidates[:count], found[:count], magnitudes[:count], k, to, to_values)
            else:
                for j in range(k):
                    to[j] = j
                _correct(part_x[:k], part_e[:k], has_residual, to_values)
        if has_residual and good[b]:
            _correct(part_x, part_e, True, part_e)
        place += k


@fast
def _take(x: F32, e: F32, own: Places, has_residual: bool, indices: Int64Array, values: F32, good: Bool) -> None:
    starts, homes, lengths, ks = own
    c = np.empty(_SLICE, np.float32)
    c_bits = c.view(np.int32)
    place = 0
    for b in range(lengths.size):
        n = lengths[b]
        part_x, part_e = x[starts[b] : starts[b] + n], e[homes[b] : homes[b] + n]
        is_good = True
        for a in range(0, n, _SLICE):
            m = min(_SLICE, n - a)
            _correct(part_x[a : a + m], part_e[a : a + m], has_residual, c)
            is_good &= _is_finite(c_bits, m)
        for j in range(place, place + ks[b]):
            values[j] = part_x[indices[j]] + part_e[indices[j]] if has_residual else part_x[indices[j]]
        if has_residual and is_good:
            _correct(part_x, part_e, True, part_e)
        good[b] = is_good
        place += ks[b]


@exact
def _add(indices: Int64Array, values: F32, own: Places, factors: F32, alpha: np.float32, good: Bool, out: F32) -> None:
    starts, ks = own
    place = 0
    for b in range(starts.size):
        for j in range(place, place + ks[b] if good[b] else place):
            out[starts[b] + indices[j]] += values[j] * factors[b] * alpha
        place += ks[b]


@exact
def _ratios(values: F32, ks: Int64Array, scales: F32, out: F32) -> None:
    first = np.uint64(0)
    for b in range(ks.size):
        n, largest = ks[b], np.float32(0.0)
        for j in range(n):
            size = abs(values[first + np.uint64(j)])
            largest = max(largest, size if size <= _LARGEST else np.float32(0.0))
        divisor = largest if largest > np.float32(0.0) else np.float32(1.0)
        for j in range(n):
            out[first + np.uint64(j)] = values[first + np.uint64(j)] / divisor
        scales[b] = largest
        first += np.uint64(n)


def select_(
    x: Tensor, residual: Tensor | None, blocks: Blocks, ks: Int64Array, threshold: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Of c = x + residual, per block, the ks[b] elements of largest magnitude, or all that reach a threshold above 0.

    Returns indices within each block (sum ks,) i64 in ascending order, their values (sum ks,) f32, and (B,) bool, whether a block
    has neither NaN nor inf. residual <- c in good blocks. With a threshold, ks is overwritten by what was found.
    """
    e = np.zeros(0, np.float32) if residual is None else residual.numpy()
    room = blocks.elements + 8 if threshold > 0 else int(ks.sum())
    indices, values, good = np.empty(room, np.int64), np.empty(room, np.float32), np.empty(len(blocks), np.bool_)
    own = (blocks.starts, blocks.homes, blocks.lengths, ks)
    _select(x.numpy(), e, own, np.float32(threshold), residual is not None, indices, values, good)
    found = int(ks.sum())
    return torch.from_numpy(indices[:found]), torch.from_numpy(values[:found]), torch.from_numpy(good)


def take_(x: Tensor, residual: Tensor | None, blocks: Blocks, ks: Int64Array, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(sum ks,) f32 the elements of c = x + residual at these indices, ks[b] of each block, and (B,) bool good, as `select_`.

    residual <- c in good blocks.
    """
    e = np.zeros(0, np.float32) if residual is None else residual.numpy()
    values, good = np.empty(len(indices), np.float32), np.empty(len(blocks), np.bool_)
    own = (blocks.starts, blocks.homes, blocks.lengths, ks)
    _take(x.numpy(), e, own, residual is not None, indices.numpy(), values, good)
    return torch.from_numpy(values), torch.from_numpy(good)


def add_(
    indices: Tensor,
    values: Tensor,
    factors: Tensor,
    starts: Int64Array,
    ks: Int64Array,
    out: Tensor,
    *,
    alpha: float,
    good: Tensor | None = None,
) -> None:
    """out <- out + alpha (factor value) at these indices behind each block's start, ks[b] of each block, or only of the `good` ones."""
    chosen = np.ones(len(ks), np.bool_) if good is None else good.numpy()
    own = (starts, ks)
    _add(indices.numpy(), values.numpy(), own, factors.numpy(), np.float32(alpha), chosen, out.numpy())


def ratios(values: Tensor, ks: Int64Array) -> tuple[Tensor, Tensor]:
    """(B,) f32 the largest finite magnitude of each block's ks[b] values, and (sum ks,) f32 values / that, or the values if it is 0."""
    scales, out = np.empty(len(ks), np.float32), np.empty(len(values), np.float32)
    _ratios(values.numpy(), ks, scales, out)
    return torch.from_numpy(scales), torch.from_numpy(out)
