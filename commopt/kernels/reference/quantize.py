"""The block quantisers in plain torch, one line an equation: the oracle of the fast ones, and what runs on devices without one."""

import math

import numpy as np
import torch
from torch import Tensor

from commopt.kernels.reference import runs
from commopt.wire import noise
from commopt.wire.bucket import Blocks

_SLICE = 2048  # squares are summed in slices of this length, as the fast kernels do
_LARGEST, _SMALLEST = float(np.finfo(np.float32).max), 2.0**-126


def float8_values() -> Tensor:
    """(256,) f32: what each bit pattern of float8 e4m3 stands for."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def natural_values() -> Tensor:
    """(256,) f32: what each code of natural compression stands for; 0, or +-2^(k - 127) for k = 1 .. 127."""
    powers = torch.ldexp(torch.ones(128, dtype=torch.float32), torch.arange(128) - 127)
    powers[0] = 0
    return torch.cat([powers, -powers])


def compress_(
    x: Tensor,
    residual: Tensor | None,
    blocks: Blocks,
    scales: Tensor,
    codes: Tensor,
    *,
    kind: str,
    levels: int = 1,
    bits: int = 8,
    squared: bool = False,
    stochastic: bool = True,
    is_given: bool = False,
) -> None:
    """See `kernels.cpu.quantize.compress_`."""
    c, block = runs.corrected(x, residual, blocks), runs.run_of_element(blocks.lengths, x.device)
    if not is_given:
        norm = _squares(c, blocks).sqrt().float() if squared else _largest(c, blocks)
        scales.copy_(_powers_above(norm) if kind == "natural" else _even_scales(norm, levels))
    u = noise.uniform(blocks.keys, blocks.lengths, c.device) if stochastic and blocks.keys is not None else None
    scale = scales[block]
    is_coded = (scale > 0) & (scale <= _LARGEST)
    a = torch.where(is_coded, c.abs() / scale, 0.0).clamp(max=float(levels))
    if kind == "levels":
        level = a.round() if u is None else a.floor() + (u < a - a.floor())
        level = torch.where(c < 0, -level, level)
        digits = runs.bits_of_bytes(level.to(torch.int8).view(torch.uint8), first_is_lowest=True).view(-1, 8)[:, :bits]
        codes.copy_(runs.packed(digits.reshape(-1), blocks.lengths * bits, lowest=True))
    elif kind == "float8":
        codes.copy_(torch.where(scale > 0, _to_float8(a, u) + 128 * c.signbit().to(torch.uint8), 0))
    else:
        codes.copy_(_to_powers(torch.where(is_coded, c, 0.0).double(), torch.where(scale > 0, scale, 1.0), u))
    if residual is not None:
        sent = level if kind == "levels" else _values_of(codes, blocks, kind, bits)
        runs.keep_rest_(residual, c - scale * sent, scales.isfinite(), blocks)


def fit_(x: Tensor, residual: Tensor | None, blocks: Blocks, scales: Tensor, codes: Tensor, *, bits: int) -> None:
    """See `kernels.cpu.quantize.fit_`."""
    block = runs.run_of_element(blocks.lengths, x.device)
    q = scales.nan_to_num(0.0, 0.0, 0.0)[block] * _values_of(codes, blocks, "levels", bits)
    at_home = blocks.having(starts=blocks.homes)
    left = runs.corrected(x, None, blocks) - q if residual is None else runs.corrected(residual, None, at_home)
    products = torch.stack([left, q]).double() * q
    over, squares = products.new_zeros(2, len(blocks)).index_add_(1, block, products)
    fit = torch.where(squares > 0, 1 + over / squares, 1.0).float()
    if residual is not None:
        runs.keep_rest_(residual, left + (1 - fit)[block] * q, scales.isfinite(), blocks)
    scales.mul_(fit)


def decompress_(
    codes: Tensor, scales: Tensor, blocks: Blocks, out: Tensor, *, kind: str, bits: int = 8, alpha: float, add: bool
) -> None:
    """out <- (alpha * scale) * what a code stands for, or out <- out + that, at the blocks' starts."""
    scale = (scales * alpha)[runs.run_of_element(blocks.lengths, out.device)]
    runs.put_(scale * _values_of(codes, blocks, kind, bits), blocks, out, add)


def _values_of(codes: Tensor, blocks: Blocks, kind: str, bits: int) -> Tensor:
    """(elements,) f32: what the codes stand for, as a multiple of the scale."""
    if kind == "levels":
        digits = runs.unpacked(codes, blocks.lengths * bits, lowest=True).view(-1, bits)
        values = (digits.int() << torch.arange(bits, dtype=torch.uint8, device=codes.device)).sum(1)
        return torch.where(values >= 2 ** (bits - 1), values - 2**bits, values).float()
    return (float8_values() if kind == "float8" else natural_values()).to(codes.device)[codes.int()]


def _even_scales(norm: Tensor, levels: int) -> Tensor:
    count = torch.full_like(norm, levels)
    scale = norm / count
    scale = torch.where(scale * count <= _LARGEST, scale, math.nan)
    return torch.where(scale < _SMALLEST, 0.0, scale)


def _powers_above(largest: Tensor) -> Tensor:
    """The power of two at or above the largest magnitude, if float32 has one."""
    scale = torch.where(largest > 0, torch.exp2(_ceil_log2(largest.double()).clamp(-126, 127)), 0.0)
    return torch.where(largest <= _LARGEST, scale, math.nan)


def _to_float8(a: Tensor, u: Tensor | None) -> Tensor:
    if u is None:
        return a.to(torch.float8_e4m3fn).view(torch.uint8)
    grid = float8_values()[:127].to(a.device)  # ascending, from 0 to 448
    below = (torch.searchsorted(grid, a, right=True) - 1).clamp(max=125)
    rest = (a - grid[below]) / (grid[below + 1] - grid[below])
    return (below + (u < rest)).to(torch.uint8)


def _to_powers(c: Tensor, scale: Tensor, u: Tensor | None) -> Tensor:
    a, top = c.abs(), _ceil_log2(scale.double())
    smallest = (top - 126).clamp(min=-126)
    exponent = torch.frexp(a).exponent.double() - 1
    is_small = a < torch.exp2(smallest)
    low = torch.where(is_small, 0.0, torch.exp2(exponent))
    high = torch.where(is_small, torch.exp2(smallest), torch.exp2(exponent + 1))
    is_up = (a - low) / (high - low) > (0.5 if u is None else u.double())
    rounded = torch.where(is_up, high, low).minimum(torch.exp2(top))
    return torch.where(rounded > 0, _ceil_log2(rounded) - top + 127 + 128 * (c < 0), 0.0).to(torch.uint8)


def _largest(c: Tensor, blocks: Blocks) -> Tensor:
    """(B,) f32 max|c|; as bit patterns, which are ordered as the magnitudes are, with inf and NaN above all others."""
    bits = c.view(torch.int32) & 0x7FFFFFFF
    largest = torch.zeros(len(blocks), dtype=torch.int32, device=c.device)
    return largest.scatter_reduce_(0, runs.run_of_element(blocks.lengths, c.device), bits, "amax").view(torch.float32)


def _squares(c: Tensor, blocks: Blocks) -> Tensor:
    """(B,) f64 sum of squares: each slice by halving, then the slices of a block one after the other."""
    slices = -(-blocks.lengths // _SLICE)
    number = np.arange(int(slices.sum())) - np.repeat(np.cumsum(slices) - slices, slices)
    widths = np.minimum(np.repeat(blocks.lengths, slices) - number * _SLICE, _SLICE)
    full = 2 ** max(1, int(widths.max(initial=1) - 1).bit_length())  # the power of two that holds them all
    table = torch.zeros(len(widths), full, dtype=torch.float64, device=c.device)
    table.view(-1)[runs.element_indices(np.arange(len(widths)) * full, widths, c.device)] = c.double() * c.double()
    while table.shape[1] > 1:
        half = table.shape[1] // 2
        table = table[:, :half] + table[:, half:]
    total = torch.zeros(len(blocks), dtype=torch.float64, device=c.device)
    rows, of_block = table[:, 0], np.repeat(np.arange(len(blocks)), slices)
    for k in range(int(slices.max(initial=0))):
        these = np.flatnonzero(number == k)
        total[torch.from_numpy(of_block[these]).to(c.device)] += rows[torch.from_numpy(these).to(c.device)]
    return total


def _ceil_log2(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x)
    return exponent.double() - (mantissa == 0.5).double()
