"""Selection in plain torch: the oracle of the fast one, and what runs on devices without it."""

from __future__ import annotations

import torch
from torch import Tensor

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
