"""The block quantisers on a GPU, with the bits of `kernels.cpu.quantize`: norm, draw, code, pack and residual in one pass.

Blocks longer than a piece take a pass for their norms first.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from commopt.kernels.cuda.pieces import (
    ADD,
    ALL_BUT_SIGN,
    LARGEST,
    NAN,
    PUT,
    Messages,
    key_of,
    launch,
    note_bad,
    piece,
    uniform,
    within,
    words_of,
)
from commopt.kernels.cuda.pieces import (
    values as values_of,
)
from commopt.kernels.cuda.residuals import SCALED, Clamped, arguments, corrected, keep
from commopt.kernels.reference.quantize import float8_values, natural_values
from commopt.wire.bucket import Blocks
from commopt.wire.residual import Moved, Residual

SMALLEST = tl.constexpr(2.0**-126)
_LEVELS, _FLOAT8, _NATURAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_KINDS = {"levels": _LEVELS.value, "float8": _FLOAT8.value, "natural": _NATURAL.value}


@triton.jit
def _largest(c):
    """(ROWS,) f32 max|c|; bit patterns are ordered as magnitudes are, with inf and NaN above all others."""
    return tl.max(c.to(tl.int32, bitcast=True) & ALL_BUT_SIGN, 1).to(tl.float32, bitcast=True)


@triton.jit
def _squares(c):
    """(ROWS,) f64: the sum of squares; its order differs from the CPU's by what a float32 root does not show."""
    v = c.to(tl.float64)
    return tl.sum(v * v, 1)


@triton.jit
def _scale_of(norm, levels, KIND: tl.constexpr):
    if KIND == _NATURAL:  # the power of two at or above the largest magnitude, where float32 has one
        bits = norm.to(tl.int32, bitcast=True)
        exponent = tl.minimum((bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32), 254)
        power = (exponent << 23).to(tl.float32, bitcast=True)
        scale = tl.where(norm <= SMALLEST, tl.where(norm == 0, 0.0, SMALLEST), power)
        return tl.where(norm <= LARGEST, scale, NAN)
    scale = tl.div_rn(norm, tl.zeros_like(norm) + levels)
    is_good = (norm <= LARGEST) & (scale * levels <= LARGEST)
    return tl.where(is_good, tl.where(scale >= SMALLEST, scale, 0.0), NAN)


@triton.jit
def _is_up(rest, below, u, STOCHASTIC: tl.constexpr):
    """To the upper level: by the draw, or where it is nearer, and from odd levels at half way."""
    if STOCHASTIC:
        return (u < rest).to(tl.int32)
    return ((rest > 0.5) | ((rest == 0.5) & ((below & 1) != 0))).to(tl.int32)


@triton.jit
def _level_codes(c, u, scale, levels, STOCHASTIC: tl.constexpr):
    a = tl.minimum(tl.div_rn(tl.abs(c), scale), levels)
    below = a.to(tl.int32)
    level = below + _is_up(a - below.to(tl.float32), below, u, STOCHASTIC)
    return tl.where(c < 0, -level, level)


@triton.jit
def _float8_codes(c, u, scale, STOCHASTIC: tl.constexpr):
    ratio = tl.minimum(tl.div_rn(tl.abs(c), scale), 448.0)
    exponent = tl.maximum(ratio.to(tl.int32, bitcast=True) >> 23, 121)
    step = 257 - exponent  # of 1 / step, where step = 2^(exponent - 3), and 2^-9 below the smallest normal number, 2^-6
    a = ratio * (step << 23).to(tl.float32, bitcast=True)
    below = a.to(tl.int32)
    magnitude = ((136 - step) << 3) + below + _is_up(a - below.to(tl.float32), below, u, STOCHASTIC)
    return magnitude | ((c.to(tl.int32, bitcast=True) >> 31) & 128)


@triton.jit
def _natural_codes(c, u, scale):
    bits = c.to(tl.int32, bitcast=True)
    top = scale.to(tl.int32, bitcast=True) >> 23  # exponents as float32 stores them
    lowest = tl.maximum(top - 126, 1)
    exponent = (bits & ALL_BUT_SIGN) >> 23
    smallest = (lowest << 23).to(tl.float32, bitcast=True)
    mantissa = (bits & 0x7FFFFF).to(tl.float32) * 1.1920928955078125e-07
    is_small = exponent < lowest
    rest = tl.where(is_small, tl.div_rn(tl.abs(c), smallest + tl.zeros_like(c)), mantissa)
    level = tl.where(is_small, lowest - 1, exponent) + (u < rest).to(tl.int32)
    code = (tl.minimum(level, top) - (top - 127)) | ((bits >> 31) & 128)
    return tl.where(level >= lowest, code, 0)


@triton.jit
def _pack(codes, at, n, out, BITS: tl.constexpr, ROWS: tl.constexpr, LENGTH: tl.constexpr):
    """b bits for each code, the first one in the lowest bits of the first byte."""
    n_bytes = ((n * BITS + 7) // 8)[:, None]
    if BITS == 8:
        j = tl.arange(0, LENGTH)[None, :]
        tl.store(out + at[:, None] + j, codes.to(tl.uint8), mask=j < n_bytes)
    else:
        octets = tl.reshape(codes & ((1 << BITS) - 1), (ROWS, LENGTH // 8, 8)).to(tl.int64)
        words = tl.sum(octets << (BITS * tl.arange(0, 8)).to(tl.int64)[None, None, :], 2)
        j = tl.arange(0, LENGTH // 8)[None, :] * BITS
        for k in tl.static_range(BITS):
            byte = (words >> (8 * k)) & 255
            tl.store(out + at[:, None] + j + k, byte.to(tl.uint8), mask=j + k < n_bytes)


@triton.jit
def _unpack(codes, at, i, inside, n, BITS: tl.constexpr):
    """(ROWS, LENGTH) i32: the codes as unsigned numbers."""
    place = (i * BITS // 8)[None, :]
    code = tl.load(codes + at[:, None] + place, mask=inside, other=0).to(tl.int32)
    if BITS == 8:
        return code
    shift = ((i * BITS) % 8)[None, :]
    if 8 % BITS != 0:
        is_there = inside & (place + 1 < ((n * BITS + 7) // 8)[:, None])
        code |= tl.load(codes + at[:, None] + place + 1, mask=is_there, other=0).to(tl.int32) << 8
    return (code >> shift) & ((1 << BITS) - 1)


@triton.jit
def _norms(
    x,
    e,
    steps,
    slots,
    decay,
    weight,
    columns,
    count,
    out,
    SQUARED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    p, live, start, home, n, scale_at, at = piece(columns, count, ROWS, ALIGN)
    c = corrected(x, e, steps, slots, decay, weight, start, home, n, p, live, tl.arange(0, LENGTH), RESIDUAL)
    norm = _squares(c) if SQUARED else _largest(c).to(tl.float64)
    tl.store(out + p, norm, mask=live)


@triton.jit
def _scales(norms, ends, places, count, levels, scales, SQUARED: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr):
    """Scales of blocks from the norms of their pieces, one piece after the other."""
    b = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = b < count
    first = tl.load(ends + b - 1, mask=live & (b > 0), other=0)
    end = tl.load(ends + b, mask=live, other=0)
    total = tl.zeros((ROWS,), tl.float64)
    for k in range(tl.max(end - first, 0)):
        norm = tl.load(norms + first + k, mask=first + k < end, other=0.0)
        if SQUARED:
            total += norm
        else:  # NaN is above all others
            total = tl.where((norm > total) | (norm != norm), norm, total)
    norm = (tl.sqrt(total) if SQUARED else total).to(tl.float32)
    tl.store(scales + tl.load(places + b, mask=live, other=0), _scale_of(norm, levels, KIND), mask=live)


@triton.jit(do_not_specialize=["word"])
def _compress(
    x,
    e,
    steps,
    slots,
    decay,
    weight,
    share,
    copy,
    steps_copy,
    base,
    columns,
    count,
    word,
    words,
    levels,
    values,
    scales,
    out,
    first,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    SQUARED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    KEYS: tl.constexpr,
    IS_GIVEN: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    p, live, start, home, n, scale_at, at = piece(columns, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)
    c = corrected(x, e, steps, slots, decay, weight, start, home, n, p, live, i, RESIDUAL)
    if IS_GIVEN:
        scale = tl.load(scales + scale_at, mask=live, other=0.0)
    else:
        norm = tl.sqrt(_squares(c)).to(tl.float32) if SQUARED else _largest(c)
        scale = _scale_of(norm, levels, KIND)
        tl.store(scales + scale_at, scale, mask=live)
    is_good = tl.abs(scale) <= LARGEST
    note_bad(first, live & (is_good == 0), columns, count, p)
    is_coded = ((scale > 0) & is_good)[:, None]
    u, key, place = tl.zeros_like(c) + 0.5, p.to(tl.uint64), i[None, :]
    if KEYS > 0:
        key, place = key_of(word, words, columns, count, p, live, KEYS), within(columns, count, p, live, i)
    if STOCHASTIC:
        u = uniform(key, place)
    # where nothing is coded any number will do, but NaN cannot become an integer
    value, unit = tl.where(is_coded, c, 0.0), tl.where(is_coded, scale[:, None], 1.0) + tl.zeros_like(c)
    if KIND == _LEVELS:
        codes = _level_codes(value, u, unit, levels, STOCHASTIC)
    elif KIND == _FLOAT8:
        codes = _float8_codes(value, u, unit, STOCHASTIC)
    else:
        codes = _natural_codes(value, u, unit)
    inside = i[None, :] < n[:, None]
    codes = tl.where(is_coded & inside, codes, 0)
    if RESIDUAL > 0:
        sent = codes.to(tl.float32) if KIND == _LEVELS else tl.load(values + codes)
        which = (key, place, home, n, p, live, live & is_good, i)
        keep(c - scale[:, None] * sent, share, e, steps, slots, copy, steps_copy, base, *which, RESIDUAL, KEYS)
    _pack(codes, at, n, out, BITS, ROWS, LENGTH)


@triton.jit
def _fit(
    x,
    e,
    columns,
    count,
    codes,
    scales,
    sums,
    fits,
    BITS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_GIVEN: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Sums of each piece, <c - q, q> and <q, q>; and from those of a whole block, or with fits that are given, what follows from them."""
    p, live, start, home, n, scale_at, at = piece(columns, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)
    inside = i[None, :] < n[:, None]
    code = _unpack(codes, at, i, inside, n, BITS)
    code = tl.where(code >= (1 << (BITS - 1)), code - (1 << BITS), code).to(tl.float32)
    scale = tl.load(scales + scale_at, mask=live, other=0.0)
    is_good = live & (tl.abs(scale) <= LARGEST)
    q = tl.where(is_good, scale, 0.0)[:, None] * code
    left = values_of(e, home, n, i) if HAS_RESIDUAL else values_of(x, start, n, i) - q
    left = tl.where(inside & is_good[:, None], left, 0.0)
    if IS_GIVEN:
        fit = tl.load(fits + p, mask=live, other=1.0)
    else:
        over, squares = tl.sum(left.to(tl.float64) * q, 1), tl.sum(q.to(tl.float64) * q, 1)
        fit = tl.where(squares > 0, 1 + over / tl.where(squares > 0, squares, 1.0), 1.0).to(tl.float32)
        if IS_WHOLE:
            tl.store(scales + scale_at, scale * fit, mask=live)
        else:
            tl.store(sums + p, over, mask=live)
            tl.store(sums + count + p, squares, mask=live)
    if HAS_RESIDUAL and (IS_GIVEN or IS_WHOLE):
        tl.store(e + home[:, None] + i[None, :], left + (1 - fit)[:, None] * q, mask=inside & is_good[:, None])


@triton.jit
def _decompress(
    codes,
    scales,
    columns,
    count,
    ranks,
    scale_stride,
    stride,
    alpha,
    values,
    out,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    p, live, start, home, n, scale_at, at = piece(columns, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)
    inside = i[None, :] < n[:, None]
    total = tl.zeros((ROWS, LENGTH), tl.float32)
    if MODE == ADD:
        total = tl.load(out + start[:, None] + i[None, :], mask=inside, other=0.0)
    for rank in range(ranks):
        code = _unpack(codes, at + rank * stride, i, inside, n, BITS)
        if KIND == _LEVELS:
            value = tl.where(code >= (1 << (BITS - 1)), code - (1 << BITS), code).to(tl.float32)
        else:
            value = tl.load(values + code)
        scale = tl.load(scales + scale_at + rank * scale_stride, mask=live, other=0.0) * alpha
        value = scale[:, None] * value
        total = value if MODE == PUT else total + value
    tl.store(out + start[:, None] + i[None, :], total, mask=inside)


@cache
def _values(kind: str, device: torch.device) -> Tensor:
    """(256,) f32: what each code stands for, if it is not itself."""
    return {"float8": float8_values, "natural": natural_values}.get(kind, float8_values)().to(device)


def compress_(x: Tensor, residual: Tensor | None, blocks: Blocks, scales: Tensor, codes: Tensor, **how: Any) -> None:
    """See `kernels.cpu.quantize.compress_`."""
    compress_all_(x, residual, Messages([blocks], scales, codes), x.new_zeros(1, dtype=torch.int32), **how)


def compress_all_(
    x: Tensor,
    residual: Tensor | Residual | Moved | Clamped | None,
    messages: Messages,
    first: Tensor,
    *,
    kind: str,
    levels: int = 1,
    bits: int = 8,
    squared: bool = False,
    stochastic: bool = True,
    is_given: bool = False,
) -> None:
    """`compress_` of several messages; first: (1,) i32, where bad blocks are noted (`note_bad`)."""
    pieces, scales = messages.pieces(bits), messages.scales
    (e, *stored), left, residual_kind = arguments(residual, x, pieces)
    what = {"SQUARED": squared, "RESIDUAL": residual_kind, **pieces.shape}
    if not is_given and pieces.is_cut:
        norms = torch.empty(len(pieces), dtype=torch.float64, device=x.device)
        launch(_norms, pieces.grid, x, e, *stored, pieces.columns, len(pieces), norms, **what)
        count, how = len(pieces.scales), {"SQUARED": squared, "KIND": _KINDS[kind], "ROWS": 32}
        grid = (triton.cdiv(count, 32),)
        launch(_scales, grid, norms, pieces.ends, pieces.scales, count, float(levels), scales, **how)
        is_given = True
    is_drawn = stochastic or residual_kind == SCALED.value
    word, words, keys = words_of(messages.parts, pieces.columns) if is_drawn else (0, pieces.columns, 0)
    what |= {
        "KIND": _KINDS[kind],
        "BITS": bits,
        "STOCHASTIC": stochastic and keys > 0,
        "KEYS": keys,
        "IS_GIVEN": is_given,
    }
    where = (pieces.columns, len(pieces), word, words, float(levels), _values(kind, x.device))
    rows = max(1, pieces.rows // 2) if residual_kind == SCALED.value else pieces.rows  # it takes more registers
    grid = (triton.cdiv(len(pieces), rows),)
    launch(_compress, grid, x, e, *stored, *left, *where, scales, messages.codes, first, **what | {"ROWS": rows})


def fit_all_(x: Tensor, residual: Tensor | None, messages: Messages, *, bits: int) -> None:
    """`EvenLevels.fit_` of several messages."""
    pieces, scales, e = messages.pieces(bits), messages.scales, x if residual is None else residual
    sums = torch.empty(2, len(pieces), dtype=torch.float64, device=x.device) if pieces.is_cut else scales
    what = {"BITS": bits, "HAS_RESIDUAL": residual is not None, **pieces.shape}
    where = (x, e, pieces.columns, len(pieces), messages.codes, scales, sums)
    launch(_fit, pieces.grid, *where, scales, IS_GIVEN=False, IS_WHOLE=not pieces.is_cut, **what)
    if pieces.is_cut:
        over, squares = (torch.segment_reduce(one, "sum", lengths=pieces.counts) for one in sums)
        fit = torch.where(squares > 0, 1 + over / squares, 1.0).float()
        fits = fit.repeat_interleave(pieces.counts, output_size=len(pieces))
        if residual is not None:
            launch(_fit, pieces.grid, *where, fits, IS_GIVEN=True, IS_WHOLE=False, **what)
        scales[pieces.scales] *= fit


def decompress_(
    codes: Tensor, scales: Tensor, blocks: Blocks, out: Tensor, *, kind: str, bits: int = 8, alpha: float, add: bool
) -> None:
    """See `kernels.cpu.quantize.decompress_`."""
    decompress_all_(Messages([blocks], scales, codes), out, kind=kind, bits=bits, alpha=alpha, add=add)


def decompress_all_(messages: Messages, out: Tensor, *, kind: str, bits: int = 8, alpha: float, add: bool) -> None:
    """`decompress_` of several messages, of which those with the same blocks are added up in their order, from zero unless `add`."""
    first, ranks, scale_stride, stride, mode = messages.apart(add)
    pieces = first.pieces(bits)
    what = {"KIND": _KINDS[kind], "BITS": bits, "MODE": mode, **pieces.shape}
    where = (pieces.columns, len(pieces), ranks, scale_stride, stride, alpha, _values(kind, out.device), out)
    launch(_decompress, pieces.grid, messages.codes, messages.scales, *where, **what)
