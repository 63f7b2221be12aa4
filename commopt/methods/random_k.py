"""Gradient elements at random places that all ranks know."""

from typing import Literal

import numpy as np
import torch

from commopt import kernels
from commopt.compress.feedback import NOTHING_KEPT, Kept, first_of
from commopt.compress.sparse import RandomK
from commopt.exchange.base import is_finite
from commopt.exchange.compressed import Compressed
from commopt.groups.base import Group
from commopt.kernels.reference.runs import first_bad, places_in
from commopt.method import GradientMethod, NoOptions, options
from commopt.options import Flag, Share, Whole
from commopt.wire.bucket import Blocks, Bucket
from commopt.wire.payload import parameter


@options
class RandomKOptions(NoOptions):
    density: Share = 0.01
    value_bits: Literal[32, 16] = 32
    error_feedback: Flag = True
    dense_1d: Flag = True
    seed: Whole = 0


class RandomKMean(GradientMethod, Compressed):
    """Average a random share of the gradient elements by a ring all-reduce; all ranks draw the same places, which are never sent.

    Stich et al. 2018, arXiv:1809.07599, Algorithm 1 with random_k; one place is drawn from each 1/density consecutive
    elements:
        c_i = g_i + e_i;  y = mean c_i at the drawn places, else 0;  e_i <- c_i elsewhere, 0 there
    Without error feedback, y is multiplied by 1/density, which makes it unbiased (Wangni et al. 2017,
    arXiv:1710.09854).
    Sends 2(N-1)/N x density x value_bits/8 bytes per parameter and step, at any number of ranks.
    State: 4 bytes per parameter; none without error feedback.
    Use it as the baseline for methods that choose elements by size, and for very many ranks.
    Not for the best loss at a density: large elements wait as long as small ones, 1/density steps.

    density: the share of elements that is sent, above 0, at most 1.
    value_bits: 32 or 16; the sum is taken in the same precision.
    error_feedback: keep what was not drawn (default). dense_1d: average biases and norms exactly.
    seed: of the places.
    """

    name = "random_k"
    Options = RandomKOptions
    options: RandomKOptions
    may_be_clipped = False  # what has waited for many steps comes out at once

    def set_up(self) -> None:
        o = self.options
        self.choice = RandomK(density=o.density, value_bits=o.value_bits)
        kept = Kept() if o.error_feedback else NOTHING_KEPT
        Compressed.__init__(self, self.choice, kept, dense_1d=o.dense_1d, seed=o.seed)

    def exchange_blocks(self, bucket: Bucket, blocks: Blocks, group: Group) -> None:
        blocks, device = self.keyed(blocks, self.choice), self.device
        if kernels.has_triton(device):
            return self._exchange_there(bucket, blocks, group)
        ends, ks, flat = np.cumsum(blocks.lengths), self.choice.ks(blocks), bucket.flat
        within, drawn_from = self.choice.places(blocks)
        chosen = torch.from_numpy(within + np.repeat(ends - blocks.lengths, ks)).to(device)  # in c
        c, bad = torch.empty(blocks.elements, device=device, dtype=torch.float32), []
        pairs = [
            (slice(s, s + n), slice(h, h + n))
            for s, h, n in zip(*(x.tolist() for x in (blocks.starts, blocks.homes, blocks.lengths)), strict=True)
        ]
        for (start, home), own in zip(pairs, torch.split(c, blocks.lengths.tolist()), strict=True):
            bad.append(not is_finite(flat[start]))
            torch.add(flat[start], self.worker.residual[home], out=own) if self.kept.bits else own.copy_(flat[start])
        scale = 1.0 if self.kept.bits else torch.from_numpy(drawn_from).to(device)
        sent = (c[chosen] * scale / group.size).to(torch.float16 if self.choice.value_bits == 16 else torch.float32)
        # so that ranks learn of a NaN that was not drawn
        summed = torch.cat([sent, torch.tensor(bad, dtype=sent.dtype, device=device)])
        if len(summed):
            group.all_reduce(summed)
        mean, others = summed[: len(sent)], summed[len(sent) :]
        others[torch.from_numpy(np.repeat(np.arange(len(ks)), ks))[~mean.isfinite().cpu()]] = 1  # beyond half precision
        if self.is_void(bucket, first_bad(others.ne(0), blocks), group):
            return None
        for start, _ in pairs:
            flat[start] = 0
        flat[places_in(blocks.starts, ks, torch.from_numpy(within).to(device))] = mean.float()
        if self.kept.bits:
            c[chosen] -= sent.float() * group.size
            for (_, home), own in zip(pairs, torch.split(c, blocks.lengths.tolist()), strict=True):
                self.worker.residual[home] = own
        return None

    def _exchange_there(self, bucket: Bucket, blocks: Blocks, group: Group) -> None:
        """The same by kernels, which draw the places; the host waits for the first bad parameter alone."""
        x, kernel = bucket.flat, kernels.of("sparse", self.device)
        entries, residual = self.choice.entries(kernel, blocks, self.device), None
        if self.kept.bits:
            residual = self.worker.residual
        dtype = torch.float16 if self.choice.value_bits == 16 else torch.float32
        summed = torch.zeros(entries.count + len(blocks), dtype=dtype, device=self.device)
        mean, bad = summed[: entries.count], summed[entries.count :]
        kernel.find_bad_(x, None, blocks, bad)
        how = {"is_unbiased": residual is None, "ranks": group.size}
        indices = kernel.draw_and_take_(x, residual, blocks, entries, mean, **how)
        sent = mean.clone() if residual is not None else mean
        if len(summed):
            group.all_reduce(summed)
        first = torch.zeros(1, dtype=torch.int32, device=self.device)
        kernel.note_sum_(summed, blocks, entries, first)
        noted, averaged = self.told([first])
        if self.is_void(bucket, first_of([parameter(noted), averaged]), group):
            return
        if residual is not None:
            kernel.keep_(x, residual, blocks, bad)
            kernel.take_sent_(residual, sent, indices, blocks, entries, ranks=group.size)
        kernel.add_(indices, mean, blocks, entries, x, alpha=1.0, add=False)

    def bytes_per_parameter(self, ranks: int) -> float:
        return 2 * (ranks - 1) / ranks * (self.choice.density * self.choice.value_bits / 8)
