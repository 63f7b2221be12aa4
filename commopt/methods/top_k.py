"""The largest gradient elements."""

from __future__ import annotations

from typing import Any

from commopt.compress.sparse import TopK
from commopt.exchange.compressed import GatherMean


class TopKMean(GatherMean):
    """Send the gradient elements with the largest magnitudes and their places, and what that left out with later steps'.

    Aji and Heafield 2017, arXiv:1704.05021; Stich et al. 2018, arXiv:1809.07599, Algorithm 1:
        c_i = g_i + e_i;  q_i = top_k(c_i);  e_i <- c_i - q_i;  y = mean q_i
    The choice is exact and per parameter, and the learning rate stays outside: see `ef`.
    Sends (N-1) x density x (value_bits/8 + places) bytes per parameter and step, places being log2(e/density) + 0.5 bits at most.
    State: 4 bytes per parameter; a half or a quarter of it with residual_bits 16 or 8.
    Use it for sparse gradients, with SGD of a low momentum; at densities of 1 % and below `dgc` keeps the loss better.
    Not for many ranks: what arrives grows with N, and breaks even with dense at N = 8 / (density x bytes of an entry).

    density: the share of elements that travels, above 0, at most 1.
    value_bits: 32, 16, 8 or 1 for each value; what rounding loses stays in the residual.
    dense_1d: average parameters with fewer than two dimensions (biases, norms) exactly.
    residual_bits, residual_decay: see `two_way`.
    """

    name = "top_k"

    def __init__(
        self,
        *,
        density: float = 0.01,
        value_bits: int = 16,
        dense_1d: bool = True,
        residual_bits: int = 32,
        residual_decay: float = 1.0,
        max_norm: float | None = None,
        grad_scaler: Any = None,
    ) -> None:
        super().__init__(
            TopK(density=density, value_bits=value_bits),
            dense_1d=dense_1d,
            residual_bits=residual_bits,
            residual_decay=residual_decay,
            max_norm=max_norm,
            grad_scaler=grad_scaler,
        )
