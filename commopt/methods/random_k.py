"""Gradient elements at random places that all ranks know."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from commopt.compress.base import element_indices
from commopt.compress.sparse import RandomK
from commopt.errors import check_option
from commopt.exchange.compressed import Compressed
from commopt.exchange.mean import check_alone
from commopt.groups.base import Group
from commopt.wire.bucket import Bucket


class RandomKMean(Compressed):
    """Average a random share of the gradient elements by a ring all-reduce; all ranks draw the same places, which never travel.

    Stich et al. 2018, arXiv:1809.07599, Algorithm 1 with random_k; one place is drawn from each 1/density consecutive elements:
        c_i = g_i + e_i;  y = mean c_i at the drawn places, else 0;  e_i <- c_i elsewhere, 0 there
    Without error feedback y is multiplied by 1/density, so that it is right on average (Wangni et al. 2017, arXiv:1710.09854).
    Sends 2(N-1)/N x density x value_bits/8 bytes per parameter and step, as many ranks as there may be.
    State: 4 bytes per parameter; none without error feedback.
    Use it as the baseline that every cleverer choice has to beat, and for very many ranks.
    Not for the best loss at a density: large elements wait as long as small ones, 1/density steps.

    density: the share of elements that travels, above 0, at most 1.
    value_bits: 32 or 16, in which the sum is taken too.
    error_feedback: keep what was not drawn (default). dense_1d: average biases and norms exactly.
    seed: of the places.
    """

    name = "random_k"

    def __init__(
        self,
        *,
        density: float = 0.01,
        value_bits: int = 32,
        error_feedback: bool = True,
        dense_1d: bool = True,
        seed: int = 0,
        max_norm: float | None = None,
        grad_scaler: Any = None,
    ) -> None:
        check_option("value_bits", value_bits, lambda x: x in (16, 32), "32 or 16")
        self.choice = RandomK(density=density, value_bits=value_bits)
        super().__init__(
            self.choice,
            error_feedback=error_feedback,
            dense_1d=dense_1d,
            seed=seed,
            max_norm=max_norm,
            grad_scaler=grad_scaler,
        )

    def aggregate(self, bucket: Bucket, group: Group) -> None:
        if group.size == 1:
            return check_alone(self, bucket)
        blocks = self.keyed(self.blocks(bucket), self.choice)
        if not self.average_dense(bucket, group) or not len(blocks):
            return None
        device, ks = self.device, self.choice.ks(blocks)
        elements = element_indices(blocks.starts, blocks.lengths, device)
        homes = element_indices(blocks.homes, blocks.lengths, device)
        c = bucket.flat[elements]
        block = torch.arange(len(blocks), device=device).repeat_interleave(torch.from_numpy(blocks.lengths).to(device))
        bad = torch.zeros(len(blocks), device=device).index_add_(0, block, (~c.isfinite()).float())
        if self.residual_bits:
            c += self.worker.residual[homes]
        within, drawn_from = self.choice.places(blocks)
        chosen = torch.from_numpy(within + np.repeat(np.cumsum(blocks.lengths) - blocks.lengths, ks)).to(device)
        scale = 1.0 if self.residual_bits else torch.from_numpy(drawn_from).to(device)
        sent = (c[chosen] * scale / group.size).to(torch.float16 if self.choice.value_bits == 16 else torch.float32)
        summed = torch.cat([sent, bad.clamp(max=1).to(sent.dtype)])  # a NaN that was not drawn is told of
        group.all_reduce(summed)
        mean, bad = summed[: len(sent)], summed[len(sent) :]
        bad[block[chosen[~mean.isfinite()]]] = 1  # beyond what half precision holds
        if bool(bad.any()):
            return self._void(bucket, int(blocks.parameters[np.flatnonzero(bad.cpu().numpy())].min()))
        bucket.flat[elements] = 0
        bucket.flat[elements[chosen]] = mean.float()
        if self.residual_bits:
            c[chosen] -= sent.float() * group.size
            self.worker.residual[homes] = c
        return None

    def bytes_per_parameter(self, ranks: int) -> float:
        values: float = self.choice.density * self.choice.value_bits / 8
        return 2 * (ranks - 1) / ranks * values
