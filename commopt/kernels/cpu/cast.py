"""Half precision on a CPU: numba, a slice of at most 2,048 elements at a time, in whole numbers, which LLVM vectorises."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from commopt.kernels.cpu.compiled import F32, I32, Bool, Places, exact
from commopt.wire.bucket import Blocks, Int64Array

U16 = NDArray[np.uint16]
_SLICE = 2048
_NONE = np.zeros(0, np.float32)
_ALL_BUT_SIGN, _INFINITE, _MOVED = np.int32(0x7FFFFFFF), np.int32(0x7F800000), np.int32(112 << 23)
_SMALL, _LARGE = np.int32(113 << 23), np.int32(143 << 23)  # 2^-14, below which float16 is subnormal, and 2^16
_HALF = np.int32(126 << 23)  # the bits of 0.5, whose last one is as much as that of a subnormal float16


@exact
def _narrow(c: F32, c_bits: I32, small: F32, small_bits: I32, n: int, is_brain: bool, out: U16, at: np.uint64) -> None:
    """The nearest float16, or bfloat16 if `is_brain`, half to even."""
    if is_brain:
        for i in range(n):
            magnitude = np.int32(c_bits[i] & _ALL_BUT_SIGN)
            odd = np.int32(np.int32(c_bits[i] >> np.int32(16)) & np.int32(1))
            rounded = np.int32(np.int32(c_bits[i] + np.int32(np.int32(0x7FFF) + odd)) >> np.int32(16))
            out[at + np.uint64(i)] = np.uint16(rounded if magnitude <= _INFINITE else np.int32(0x7FC0))
        return
    for i in range(n):
        small[i] = abs(c[i]) + np.float32(0.5)
    for i in range(n):
        magnitude = np.int32(c_bits[i] & _ALL_BUT_SIGN)
        odd = np.int32(np.int32(magnitude >> np.int32(13)) & np.int32(1))
        half = np.int32(np.int32(np.int32(magnitude - _MOVED) + np.int32(np.int32(0xFFF) + odd)) >> np.int32(13))
        half = np.int32(small_bits[i] - _HALF) if magnitude < _SMALL else half
        half = np.int32(0x7C00) if magnitude >= _LARGE else half
        half = np.int32(0x7E00) if magnitude > _INFINITE else half
        sign = np.int32(np.int32(c_bits[i] >> np.int32(16)) & np.int32(0x8000))
        out[at + np.uint64(i)] = np.uint16(half | sign)


@exact
def _widen(halves: U16, at: np.uint64, n: int, is_brain: bool, values: F32, bits: I32) -> None:
    if is_brain:
        for i in range(n):
            bits[i] = np.int32(np.uint32(halves[at + np.uint64(i)]) << np.uint32(16))
        return
    for i in range(n):
        half = np.int32(halves[at + np.uint64(i)])
        magnitude = np.int32(np.int32(half & np.int32(0x7FFF)) << np.int32(13))
        moved = np.int32(magnitude + (np.int32(2 * _MOVED) if magnitude >= np.int32(0x0F800000) else _MOVED))
        bits[i] = np.int32(moved | np.int32(np.int32(half & np.int32(0x8000)) << np.int32(16)))
    for i in range(n):
        half = np.int32(halves[at + np.uint64(i)])
        fraction = np.float32(np.int32(half & np.int32(0x3FF))) * np.float32(2.0**-24)
        subnormal = -fraction if half >= np.int32(0x8000) else fraction
        values[i] = subnormal if np.int32(half & np.int32(0x7C00)) == np.int32(0) else values[i]


@exact
def _is_bad(halves: U16, at: np.uint64, n: int, infinite: np.int32) -> bool:
    largest = np.int32(0)
    for i in range(n):
        largest = max(largest, np.int32(np.int32(halves[at + np.uint64(i)]) & np.int32(0x7FFF)))
    return bool(largest >= infinite)


@exact
def _correct(x: F32, start: np.uint64, e: F32, home: np.uint64, has_residual: bool, n: int, c: F32) -> None:
    for i in range(n):
        c[i] = x[start + np.uint64(i)] + e[home + np.uint64(i)] if has_residual else x[start + np.uint64(i)]


@exact
def _leave(c: F32, sent: F32, n: int, e: F32, home: np.uint64) -> None:
    for i in range(n):
        e[home + np.uint64(i)] = c[i] - sent[i]


@exact
def _compress(x: F32, e: F32, has_residual: bool, places: Places, is_brain: bool, out: U16) -> None:
    starts, homes, lengths, firsts = places
    c, other = np.empty(_SLICE, np.float32), np.empty(_SLICE, np.float32)
    c_bits, other_bits = c.view(np.int32), other.view(np.int32)
    infinite = np.int32(0x7F80) if is_brain else np.int32(0x7C00)
    for b in range(lengths.size):
        start, home, length, first = starts[b], homes[b], lengths[b], firsts[b]
        for a in range(0, length, _SLICE):
            n = min(_SLICE, length - a)
            _correct(x, np.uint64(start + a), e, np.uint64(home + a), has_residual, n, c)
            _narrow(c, c_bits, other, other_bits, n, is_brain, out, np.uint64(first + a))
        if not has_residual or _is_bad(out, np.uint64(first), length, infinite):
            continue
        for a in range(0, length, _SLICE):
            n = min(_SLICE, length - a)
            if length > _SLICE:  # else it is still there
                _correct(x, np.uint64(start + a), e, np.uint64(home + a), True, n, c)
            _widen(out, np.uint64(first + a), n, is_brain, other, other_bits)
            _leave(c, other, n, e, np.uint64(home + a))


@exact
def _put(values: F32, n: int, alpha: np.float32, add: bool, out: F32, start: np.uint64) -> None:
    for i in range(n):
        value = values[i] * alpha
        out[start + np.uint64(i)] = out[start + np.uint64(i)] + value if add else value


@exact
def _decompress(halves: U16, places: Places, is_brain: bool, alpha: np.float32, add: bool, out: F32) -> None:
    starts, lengths, firsts = places
    values = np.empty(_SLICE, np.float32)
    bits = values.view(np.int32)
    for b in range(lengths.size):
        for a in range(0, lengths[b], _SLICE):
            n = min(_SLICE, lengths[b] - a)
            _widen(halves, np.uint64(firsts[b] + a), n, is_brain, values, bits)
            _put(values, n, alpha, add, out, np.uint64(starts[b] + a))


@exact
def _bad_blocks(halves: U16, lengths: Int64Array, infinite: np.int32, bad: Bool) -> None:
    first = 0
    for b in range(lengths.size):
        bad[b] = _is_bad(halves, np.uint64(first), lengths[b], infinite)
        first += lengths[b]


@exact
def _divide(x: F32, divisor: np.float32, n: int, is_brain: bool, out: U16) -> None:
    c, other = np.empty(_SLICE, np.float32), np.empty(_SLICE, np.float32)
    c_bits, other_bits = c.view(np.int32), other.view(np.int32)
    for a in range(0, n, _SLICE):
        m = min(_SLICE, n - a)
        for i in range(m):
            c[i] = x[np.uint64(a) + np.uint64(i)] / divisor
        _narrow(c, c_bits, other, other_bits, m, is_brain, out, np.uint64(a))


def compress_(x: Tensor, residual: Tensor | None, blocks: Blocks, codes: Tensor) -> None:
    """codes <- c = x + residual in their dtype, and residual <- c - codes in blocks without a NaN or an inf.

    codes: (elements,) f16 or bf16.
    """
    e, places = _NONE, (blocks.starts, blocks.homes, blocks.lengths, _firsts(blocks))
    if residual is not None:
        e = residual.numpy()
    _compress(x.numpy(), e, residual is not None, places, *_bits(codes))


def decompress_(codes: Tensor, blocks: Blocks, out: Tensor, *, alpha: float, add: bool) -> None:
    """out <- alpha * codes, or out <- out + that, at the blocks' starts."""
    is_brain, halves = _bits(codes)
    _decompress(halves, (blocks.starts, blocks.lengths, _firsts(blocks)), is_brain, np.float32(alpha), add, out.numpy())


def bad_blocks(codes: Tensor, blocks: Blocks) -> Tensor:
    """(B,) bool: which blocks have a NaN or an inf."""
    is_brain, halves = _bits(codes)
    bad = np.empty(len(blocks), np.bool_)
    _bad_blocks(halves, blocks.lengths, np.int32(0x7F80 if is_brain else 0x7C00), bad)
    return torch.from_numpy(bad)


def divide_(x: Tensor, divisor: float, out: Tensor) -> None:
    """out <- x / divisor, divided in float32. x: (n,) f32; out: (n,) f16 or bf16."""
    _divide(x.numpy(), np.float32(divisor), len(x), *_bits(out))


def _bits(halves: Tensor) -> tuple[Any, Any]:
    """Whether it is bfloat16, and the bits."""
    return halves.dtype == torch.bfloat16, halves.view(torch.int16).numpy().view(np.uint16)


def _firsts(blocks: Blocks) -> Int64Array:
    return np.asarray(np.cumsum(blocks.lengths) - blocks.lengths, dtype=np.int64)
