"""Selection in plain torch: the oracle of the fast one, and what runs on devices without it."""

import numpy as np
import torch
from torch import Tensor

from commopt.kernels.reference import runs
from commopt.wire.bucket import Blocks, Int64Array


def select_(
    x: Tensor, residual: Tensor | None, blocks: Blocks, ks: Int64Array, threshold: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.cpu.select.select_`."""
    indices, values, good = [], [], []
    for b, (start, home, n) in enumerate(zip(blocks.starts, blocks.homes, blocks.lengths, strict=True)):
        c = x[start : start + n] if residual is None else x[start : start + n] + residual[home : home + n]
        good.append(bool(c.isfinite().all()))
        k = int(ks[b])
        if threshold > 0:
            chosen = (c.abs() >= threshold).nonzero().view(-1)
            ks[b] = len(chosen)
        elif good[-1]:
            chosen = c.abs().sort(descending=True, stable=True).indices[:k].sort().values  # of equal ones the first
        else:
            chosen = torch.arange(k, device=x.device)
        indices.append(chosen)
        values.append(c[chosen])
        if residual is not None and good[-1]:
            residual[home : home + n] = c
    none = torch.zeros(0, dtype=torch.float32, device=x.device)
    is_good = torch.tensor(good, dtype=torch.bool, device=x.device)
    return torch.cat([none.long(), *indices]), torch.cat([none, *values]), is_good


def take_(x: Tensor, residual: Tensor | None, blocks: Blocks, ks: Int64Array, indices: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.cpu.select.take_`."""
    c = runs.corrected(x, residual, blocks)
    good = ~runs.bad_runs(c, blocks.lengths)
    if residual is not None:
        runs.keep_rest_(residual, c, good, blocks)
    return c[runs.places_in(np.cumsum(blocks.lengths) - blocks.lengths, ks, indices)], good


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
    """See `kernels.cpu.select.add_`."""
    block = runs.run_of_element(ks, out.device)
    sent = values * factors[block] * alpha
    places = runs.places_in(starts, ks, indices)
    chosen = slice(None) if good is None else good[block]
    out[places[chosen]] += sent[chosen]  # no two places are equal


def ratios(values: Tensor, ks: Int64Array) -> tuple[Tensor, Tensor]:
    """See `kernels.cpu.select.ratios`."""
    block, size = runs.run_of_element(ks, values.device), values.abs().nan_to_num(0.0, 0.0, 0.0)
    scales = values.new_zeros(len(ks)).scatter_reduce_(0, block, size, "amax")
    return scales, values / torch.where(scales > 0, scales, 1.0)[block]
