"""QSGD: a few levels per block, rounded at random."""

from __future__ import annotations

from typing import Any

from commopt.compress.quantize import QSGDLevels
from commopt.exchange.compressed import GatherMean


class QSGD(GatherMean):
    """Send gradients rounded at random to a few levels of each block's norm, right on average.

    Alistarh et al. 2017, arXiv:1610.02132, Theorem 3.2 (stochastic quantisation by blocks):
        q_i = norm_i sign(g_i) level_i / levels,  level_i = levels |g_i| / norm_i rounded at random;  y = mean q_i
    Levels travel as whole bits instead of Elias codes. A block of zeros stays zero. There is no error feedback: rounding is right on
    average; `two_way(qsgd)` has it, and both directions.
    Sends (N-1) x (ceil(log2(2 levels + 1))/8 + 4/block_size) bytes per parameter and step.
    State: none.
    Use it on few ranks, where no memory can be spared for residuals.
    Not for many ranks: what arrives grows with N, and 8 bits cost more than dense from 9 ranks on.

    levels: positive levels, 1 to 127: 7 takes 4 bits, 127 takes 8.
    block_size: elements per norm, a multiple of 8.
    norm: "l2", the paper's, or "max", the largest magnitude, which wastes no level.
    dense_1d: average parameters with fewer than two dimensions exactly.
    seed: of the rounding.
    """

    name = "qsgd"

    def __init__(
        self,
        *,
        levels: int = 127,
        block_size: int = 512,
        norm: str = "max",
        dense_1d: bool = False,
        seed: int = 0,
        max_norm: float | None = None,
        grad_scaler: Any = None,
    ) -> None:
        super().__init__(
            QSGDLevels(levels=levels, block_size=block_size, norm=norm),
            error_feedback=False,
            dense_1d=dense_1d,
            seed=seed,
            max_norm=max_norm,
            grad_scaler=grad_scaler,
        )
