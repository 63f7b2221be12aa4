"""EF-signSGD with compression in both directions."""

from __future__ import annotations

from typing import Any

from commopt.aggregate import TwoWayMean
from commopt.compress.sign import scaled_sign


class EFSign(TwoWayMean):
    """Send one bit per gradient element each way, and what that left out with the next step's.

    Karimireddy et al. 2019, arXiv:1901.09847 (error feedback for signs), with the server side of DoubleSqueeze, arXiv:1905.05957:
        q_i = C(g_i + e_i);  e_i <- g_i + e_i - q_i;  y = C(mean q_i + s);  s <- mean q_i + s - y
    The learning rate stays outside: the residual of a high rate is replayed at the current one. Made for SGD with momentum.
    Sends 2(N-1)/N x (1/8 + 4/block_size) bytes per parameter and step. State: 4 + 4/N bytes per parameter.

    scale: "l1", the mean magnitude of each block (default), or "l2", one scale per tensor as DeepSpeed has it.
    block_size: elements per scale, a multiple of 8; of no effect with scale="l2".
    """

    name = "ef_sign"

    def __init__(
        self, *, scale: str = "l1", block_size: int = 2048, max_norm: float | None = None, grad_scaler: Any = None
    ) -> None:
        super().__init__(scaled_sign(scale, block_size), max_norm=max_norm, grad_scaler=grad_scaler)
