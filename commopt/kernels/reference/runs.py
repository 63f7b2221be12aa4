"""Runs of elements in plain torch: their places, reading and writing them, and bits to bytes."""

import numpy as np
import torch
from torch import Tensor

from commopt.wire.bucket import Blocks, Int64Array


def element_indices(starts: Int64Array, lengths: Int64Array, device: torch.device) -> Tensor:
    """(sum of lengths,) i64: the indices of all elements of some runs, in order."""
    ends = np.cumsum(lengths)
    moved = torch.from_numpy(starts - ends + lengths).to(device)
    return _each(moved, lengths).add_(torch.arange(int(lengths.sum()), device=device))


def run_of_element(lengths: Int64Array, device: torch.device) -> Tensor:
    """(sum of lengths,) i64: which run each element of some runs is in."""
    return _each(torch.arange(len(lengths), device=device), lengths)


def _each(values: Tensor, lengths: Int64Array) -> Tensor:
    """(sum of lengths,) i64: each run's value for each of its elements; nothing of that length is copied from the host."""
    counts = torch.from_numpy(lengths).to(values.device)
    return values.repeat_interleave(counts, output_size=int(lengths.sum()))


def corrected(x: Tensor, residual: Tensor | None, blocks: Blocks) -> Tensor:
    """(elements,) f32: c = x + residual of all blocks, end to end."""
    c = x[element_indices(blocks.starts, blocks.lengths, x.device)]
    return c if residual is None else c + residual[element_indices(blocks.homes, blocks.lengths, x.device)]


def put_(values: Tensor, blocks: Blocks, out: Tensor, add: bool) -> None:
    """out <- values, or out <- out + values, at the blocks' starts."""
    places = element_indices(blocks.starts, blocks.lengths, out.device)
    out[places] = out[places] + values if add else values


def keep_rest_(residual: Tensor, left: Tensor, good: Tensor, blocks: Blocks) -> None:
    """residual <- left in the good blocks; left: (elements,) f32, good: (B,) bool."""
    is_good = good.repeat_interleave(torch.from_numpy(blocks.lengths).to(good.device))
    homes = element_indices(blocks.homes, blocks.lengths, residual.device)
    residual[homes] = torch.where(is_good, left, residual[homes])


def bad_runs(values: Tensor, lengths: Int64Array) -> Tensor:
    """(B,) bool: which runs of (sum of lengths,) values hold a NaN or an inf."""
    bad = torch.zeros(len(lengths), dtype=torch.int64, device=values.device)
    return bad.index_add_(0, run_of_element(lengths, values.device), (~values.isfinite()).long()).ne(0)


def first_bad(bad: Tensor, blocks: Blocks) -> int:
    """The index of the first parameter, in registration order, with a bad block; -1 if there is none. bad: (B,) bool."""
    return int(blocks.parameters[bad.cpu().numpy()].min()) if bool(bad.any()) else -1


def places_in(starts: Int64Array, ks: Int64Array, indices: Tensor) -> Tensor:
    """(sum of ks,) i64: where elements with these indices in their runs are; ks: (B,) how many of each run."""
    return indices + torch.from_numpy(np.repeat(starts, ks)).to(indices.device)


def bytes_of_bits(bits: Tensor, *, first_is_lowest: bool = False) -> Tensor:
    """(n / 8,) u8 of (n,) bits of 0 or 1; the first of eight is the most significant, as in numpy.packbits."""
    return (bits.view(-1, 8).to(torch.uint8) << _shifts(bits.device, first_is_lowest)).sum(1, dtype=torch.uint8)


def bits_of_bytes(code: Tensor, *, first_is_lowest: bool = False) -> Tensor:
    """(8 n,) u8 of 0 or 1: what `bytes_of_bits` was given."""
    return (code.view(-1, 1) >> _shifts(code.device, first_is_lowest) & 1).view(-1)


def packed(flags: Tensor, lengths: Int64Array, *, lowest: bool = False) -> Tensor:
    """(sum of ceil(lengths / 8),) u8 of (sum of lengths,) bits of 0 or 1: each run is padded to whole bytes with zeros."""
    sizes = (lengths + 7) // 8
    bits = torch.zeros(int(sizes.sum()) * 8, dtype=torch.uint8, device=flags.device)
    bits[element_indices(8 * (np.cumsum(sizes) - sizes), lengths, flags.device)] = flags.to(torch.uint8)
    return bytes_of_bits(bits, first_is_lowest=lowest)


def unpacked(code: Tensor, lengths: Int64Array, *, lowest: bool = False) -> Tensor:
    """(sum of lengths,) u8: the bits that `packed` was given."""
    sizes = (lengths + 7) // 8
    places = element_indices(8 * (np.cumsum(sizes) - sizes), lengths, code.device)
    return bits_of_bytes(code, first_is_lowest=lowest)[places]


def _shifts(device: torch.device, first_is_lowest: bool) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=device)
    return shifts if first_is_lowest else 7 - shifts
