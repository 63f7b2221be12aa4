"""Gradient elements above a fixed magnitude."""

from __future__ import annotations

from typing import Any

from commopt.compress.sparse import Threshold
from commopt.exchange.compressed import GatherMean


class ThresholdMean(GatherMean):
    """Send every gradient element whose magnitude, with what earlier steps left of it, reaches a threshold.

    Strom 2015, "Scalable distributed DNN training using commodity GPU cloud computing" (threshold with error feedback);
    Aji and Heafield 2017, arXiv:1704.05021:
        c_i = g_i + e_i;  q_i = c_i where |c_i| >= threshold, else 0;  e_i <- c_i - q_i;  y = mean q_i
    How much travels is the gradient's business, so lengths travel first, and links should not be planned by this method.
    Sends (N-1) x share x (value_bits/8 + places) bytes per parameter and step, share being that of elements that reach it.
    State: 4 bytes per parameter.
    Use it where gradients keep their size, and quiet steps should cost little.
    Not for training from scratch, where gradients shrink by orders of magnitude; `top_k` adapts.

    threshold: above 0, in the gradient's own units.
    value_bits, dense_1d, residual_bits, residual_decay: as in `top_k`.
    """

    name = "threshold"

    def __init__(
        self,
        *,
        threshold: float,
        value_bits: int = 16,
        dense_1d: bool = True,
        residual_bits: int = 32,
        residual_decay: float = 1.0,
        max_norm: float | None = None,
        grad_scaler: Any = None,
    ) -> None:
        super().__init__(
            Threshold(threshold=threshold, value_bits=value_bits),
            dense_1d=dense_1d,
            residual_bits=residual_bits,
            residual_decay=residual_decay,
            max_norm=max_norm,
            grad_scaler=grad_scaler,
        )

    def bytes_per_parameter(self, ranks: int) -> float:
        raise NotImplementedError("what a threshold lets through depends on the gradients")
