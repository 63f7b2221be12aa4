"""Natural compression: signs and exponents."""

from __future__ import annotations

from typing import Any

from commopt.compress.quantize import Natural
from commopt.exchange.compressed import TwoWayMean


class NaturalMean(TwoWayMean):
    """Send gradients rounded at random to powers of two, right on average, in both directions.

    Horváth et al. 2019, arXiv:1905.10988, Algorithm 1 (bidirectional compression):
        y = C(mean C(g_i)),  C(t) = sign(t) 2^floor(log2 |t|) or twice that, with the chances that make it right on average
    The variance grows by 1/8 in each direction, and no residual is needed. 8 bits instead of the paper's 9: see the codec.
    Sends 2(N-1)/N x (1 + 4/block_size) bytes per parameter and step.
    State: none.
    Use it where no memory can be spared for residuals, for gradients of any size and spread.
    Not for the smallest loss at 8 bits: `two_way(int8)` with error feedback comes closer.

    block_size: elements per common exponent, a multiple of 8.
    dense_1d: average parameters with fewer than two dimensions exactly.
    seed: of the rounding.
    """

    name = "natural"

    def __init__(
        self,
        *,
        block_size: int = 2048,
        dense_1d: bool = False,
        seed: int = 0,
        max_norm: float | None = None,
        grad_scaler: Any = None,
    ) -> None:
        super().__init__(
            Natural(block_size=block_size),
            error_feedback=False,
            dense_1d=dense_1d,
            seed=seed,
            max_norm=max_norm,
            grad_scaler=grad_scaler,
        )
