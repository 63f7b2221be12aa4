"""The block quantisers in plain torch, one line an equation: the oracle of the fast ones, and what runs on devices without one."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from commopt.kernels.reference.signs import _corrected, _per_block, _runs
from commopt.wire import noise
from commopt.wire.bucket import Blocks, Int64Array

_SLICE = 2048  # squares are summed in slices of this length, as the fast kernels do
_LARGEST, _SMALLEST = float(np.finfo(np.float32).max), 2.0**-126


def float8_values() -> Tensor:
    """(256,) f32: what each bit pattern of float8 e4m3 stands for."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def natural_values() -> Tensor:
    """(256,) f32: what each code of natural compression stands for; 0, or +-2^(k - 127) for k = 1 .. 127."""
    powers = torch.ldexp(torch.ones(128), torch.arange(128) - 127)
    powers[0] = 0
    return torch.cat([powers, -powers])


def byte_starts(blocks: Blocks, bits: int) -> Int64Array:
    """(B,) where each block's codes begin."""
    sizes = (blocks.lengths * bits + 7) // 8
    return np.asarray(np.cumsum(sizes) - sizes, dtype=np.int64)


def block_scales(x: Tensor, residual: Tensor | None, blocks: Blocks, *, levels: int, squared: bool) -> Tensor:
    """(B,) f32: norm / levels of c = x + residual, the L2 norm or the largest magnitude; NaN for a block that is not finite."""
    c = _corrected(x, residual, blocks)
    norm = _squares(c, blocks).sqrt().float() if squared else _largest(c, blocks)
    count = torch.full_like(norm, levels)
    scale = norm / count
    scale = torch.where(scale * count <= _LARGEST, scale, math.nan)
    return torch.where(scale < _SMALLEST, 0.0, scale)


def compress_levels_(
    x: Tensor,
    residual: Tensor | None,
    blocks: Blocks,
    scales: Tensor,
    codes: Tensor,
    *,
    levels: int,
    bits: int,
    squared: bool,
    stochastic: bool,
) -> None:
    """Scales (`block_scales`), codes round(c / scale) of `bits` bits each, and residual <- c - scale * code."""
    scales.copy_(block_scales(x, residual, blocks, levels=levels, squared=squared))
    encode_levels_(x, residual, blocks, scales, codes, levels=levels, bits=bits, stochastic=stochastic)


def encode_levels_(
    x: Tensor,
    residual: Tensor | None,
    blocks: Blocks,
    scales: Tensor,
    codes: Tensor,
    *,
    levels: int,
    bits: int,
    stochastic: bool,
) -> None:
    """The second half of `compress_levels_`, for scales that are given."""
    c = _corrected(x, residual, blocks)
    a = _ratio(c, scales, blocks).clamp(max=float(levels))
    u = _draws(blocks, stochastic, c.device)
    level = a.round() if u is None else a.floor() + (u < a - a.floor())
    values = torch.where(c < 0, -level, level).to(torch.int8)
    _write_codes_(values, bits, byte_starts(blocks, bits) * 8, blocks, codes)
    _leave_(c, values.float(), scales, blocks, residual)


def compress_float8_(
    x: Tensor, residual: Tensor | None, blocks: Blocks, scales: Tensor, codes: Tensor, *, stochastic: bool
) -> None:
    """Scales max|c| / 448, c / scale as float8 e4m3, and residual <- c - scale * that."""
    scales.copy_(block_scales(x, residual, blocks, levels=448, squared=False))
    c = _corrected(x, residual, blocks)
    a = _ratio(c, scales, blocks).clamp(max=448.0)
    u = _draws(blocks, stochastic, c.device)
    if u is None:
        magnitude = a.to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        grid = float8_values()[:127].to(c.device)  # ascending, from 0 to 448
        below = (torch.searchsorted(grid, a, right=True) - 1).clamp(max=125)
        rest = (a - grid[below]) / (grid[below + 1] - grid[below])
        magnitude = (below + (u < rest)).to(torch.uint8)
    is_coded = (scales > 0)[_per_block(blocks, c.device)]
    codes.copy_(torch.where(is_coded, magnitude + 128 * c.signbit().to(torch.uint8), 0))
    _leave_(c, float8_values().to(c.device)[codes.int()], scales, blocks, residual)


def compress_natural_(x: Tensor, residual: Tensor | None, blocks: Blocks, scales: Tensor, codes: Tensor) -> None:
    """Powers of two as scales, signs and exponents below the scale's as codes, and residual <- c - what they stand for."""
    c = _corrected(x, residual, blocks)
    largest = _largest(c, blocks)
    top = _ceil_log2(largest.double()).clamp(-126, 127)
    scale = torch.where(largest > 0, torch.exp2(top), 0.0)
    scales.copy_(torch.where(largest <= _LARGEST, scale, math.nan))
    is_coded = (scales > 0)[_per_block(blocks, c.device)]
    a = torch.where(is_coded, c.abs(), 0.0).double()
    top = torch.where(scales > 0, top, 0.0)[_per_block(blocks, c.device)]
    smallest = (top - 126).clamp(min=-126)
    exponent = torch.frexp(a).exponent.double() - 1
    is_small = a < torch.exp2(smallest)
    low = torch.where(is_small, 0.0, torch.exp2(exponent))
    high = torch.where(is_small, torch.exp2(smallest), torch.exp2(exponent + 1))
    u = _draws(blocks, True, c.device)
    is_up = (a - low) / (high - low) > (0.5 if u is None else u.double())
    rounded = torch.where(is_up, high, low).minimum(torch.exp2(top))
    code = torch.where(rounded > 0, _ceil_log2(rounded) - top + 127 + 128 * (c < 0), 0.0)
    codes.copy_(code.to(torch.uint8))
    _leave_(c, natural_values().to(c.device)[codes.int()], scales, blocks, residual)


def decompress_levels_(
    codes: Tensor, scales: Tensor, blocks: Blocks, out: Tensor, *, bits: int, alpha: float, add: bool
) -> None:
    """out <- (alpha * scale) * code, or out <- out + that, at the blocks' starts."""
    _put_(_read_codes(codes, bits, byte_starts(blocks, bits) * 8, blocks).float(), scales, blocks, out, alpha, add)


def decompress_float8_(codes: Tensor, scales: Tensor, blocks: Blocks, out: Tensor, *, alpha: float, add: bool) -> None:
    """out <- (alpha * scale) * float8, or out <- out + that, at the blocks' starts."""
    _put_(float8_values().to(out.device)[codes.int()], scales, blocks, out, alpha, add)


def decompress_natural_(codes: Tensor, scales: Tensor, blocks: Blocks, out: Tensor, *, alpha: float, add: bool) -> None:
    """out <- (alpha * scale) * power of two, or out <- out + that, at the blocks' starts."""
    _put_(natural_values().to(out.device)[codes.int()], scales, blocks, out, alpha, add)


def pack_codes_(values: Tensor, bits: int, out: Tensor) -> None:
    """(n,) i8 in -2^(bits-1) .. 2^(bits-1) - 1 to (ceil(n bits/8),) u8: two's complement, the first one in the lowest bits."""
    _write_codes_(values, bits, np.zeros(1, np.int64), _one_block(len(values)), out)


def unpack_codes(code: Tensor, bits: int, n: int) -> Tensor:
    """(n,) i8: what `pack_codes_` was given."""
    return _read_codes(code, bits, np.zeros(1, np.int64), _one_block(n))


def _one_block(n: int) -> Blocks:
    zero = np.zeros(1, np.int64)
    return Blocks(zero, zero, zero + n, zero, zero)


def _write_codes_(values: Tensor, bits: int, bit_starts: Int64Array, blocks: Blocks, out: Tensor) -> None:
    stream = torch.zeros(out.numel() * 8, dtype=torch.uint8, device=out.device)
    places = _runs(bit_starts, blocks.lengths * bits, out.device)
    stream[places] = (values.view(torch.uint8)[:, None] >> _ascending(bits, out.device) & 1).view(-1)
    out.copy_((stream.view(-1, 8) << _ascending(8, out.device)).sum(1, dtype=torch.uint8))


def _read_codes(code: Tensor, bits: int, bit_starts: Int64Array, blocks: Blocks) -> Tensor:
    stream = (code[:, None] >> _ascending(8, code.device) & 1).view(-1)
    digits = stream[_runs(bit_starts, blocks.lengths * bits, code.device)].view(-1, bits)
    values = (digits.int() << _ascending(bits, code.device)).sum(1)
    return torch.where(values >= 2 ** (bits - 1), values - 2**bits, values).to(torch.int8)


def _ascending(bits: int, device: torch.device) -> Tensor:
    return torch.arange(bits, dtype=torch.uint8, device=device)


def _largest(c: Tensor, blocks: Blocks) -> Tensor:
    """(B,) f32 max|c|; as bit patterns, which are ordered as the magnitudes are, with inf and NaN above all others."""
    bits = c.view(torch.int32) & 0x7FFFFFFF
    largest = torch.zeros(len(blocks), dtype=torch.int32, device=c.device)
    return largest.scatter_reduce_(0, _per_block(blocks, c.device), bits, "amax").view(torch.float32)


def _squares(c: Tensor, blocks: Blocks) -> Tensor:
    """(B,) f64 sum of squares: each slice by halving, then the slices of a block one after the other."""
    slices = -(-blocks.lengths // _SLICE)
    number = np.arange(int(slices.sum())) - np.repeat(np.cumsum(slices) - slices, slices)
    widths = np.minimum(np.repeat(blocks.lengths, slices) - number * _SLICE, _SLICE)
    half = 1
    while 2 * half < widths.max(initial=1):
        half *= 2
    table = torch.zeros(len(widths), 2 * half, dtype=torch.float64, device=c.device)
    table.view(-1)[_runs(np.arange(len(widths)) * 2 * half, widths, c.device)] = c.double() * c.double()
    while table.shape[1] > 1:
        half = table.shape[1] // 2
        table = table[:, :half] + table[:, half:]
    total = torch.zeros(len(blocks), dtype=torch.float64, device=c.device)
    rows, of_block = table[:, 0], np.repeat(np.arange(len(blocks)), slices)
    for k in range(int(slices.max(initial=0))):
        these = np.flatnonzero(number == k)
        total[torch.from_numpy(of_block[these]).to(c.device)] += rows[torch.from_numpy(these).to(c.device)]
    return total


def _ratio(c: Tensor, scales: Tensor, blocks: Blocks) -> Tensor:
    """(n,) |c| / scale, and 0 in blocks of zeros and in bad ones."""
    scale = scales[_per_block(blocks, c.device)]
    return torch.where((scale > 0) & (scale <= _LARGEST), c.abs() / scale, 0.0)


def _draws(blocks: Blocks, stochastic: bool, device: torch.device) -> Tensor | None:
    """(n,) f32 in [0, 1), or None where each value goes to its nearest level."""
    if not stochastic or blocks.keys is None:
        return None
    return noise.uniform(blocks.keys, blocks.lengths, device)


def _ceil_log2(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x)
    return exponent.double() - (mantissa == 0.5).double()


def _leave_(c: Tensor, values: Tensor, scales: Tensor, blocks: Blocks, residual: Tensor | None) -> None:
    """residual <- c - scale * value where the scale is finite."""
    if residual is None:
        return
    scale = scales[_per_block(blocks, c.device)]
    homes = _runs(blocks.homes, blocks.lengths, c.device)
    residual[homes] = torch.where(scale.isfinite(), c - scale * values, residual[homes])


def _put_(values: Tensor, scales: Tensor, blocks: Blocks, out: Tensor, alpha: float, add: bool) -> None:
    values = (scales * alpha)[_per_block(blocks, out.device)] * values
    places = _runs(blocks.starts, blocks.lengths, out.device)
    out[places] = out[places] + values if add else values
