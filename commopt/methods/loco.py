"""LoCo: four bits each way, and a moving average of what they lost, in eight bits."""

from __future__ import annotations

from typing import Any

from commopt.compress.base import Compressor
from commopt.compress.feedback import ErrorFeedback
from commopt.compress.quantize import BlockInt
from commopt.errors import check_option
from commopt.exchange.compressed import TwoWayMean
from commopt.wire.bucket import Blocks


class LoCo(TwoWayMean):
    """Send gradients as 4-bit integers each way, corrected by a moving average of what the rounding lost, which is kept in 8 bits.

    Xie et al. 2024, arXiv:2407.04480, Algorithm 1, in the form of its code in ZeRO++ (DeepSpeed):
        p_i = g_i + e_i;  q_i = C(p_i);  e_i <- beta e_i + (1 - beta) (p_i - q_i)
        a = mean q_i + s;  y = C(a);  s <- beta s + (1 - beta) (a - y);  every reset_every steps e_i = s = 0
    As e_i <- e_i + (1 - beta) (g_i - q_i), nothing is lost, only later sent: e_i / (1 - beta) is what is still owed.
    ZeRO++ rounds to the nearest level, sends gradients within nodes and then between them, and needs no answer, because its
    parameters are sharded; here the answer travels in 4 bits too, with a residual of its own, and rounding is stochastic.
    Sends 2(N-1)/N x (1/2 + 4/block_size) bytes per parameter and step.
    State: (1 + 4/block_size) x (1 + 1/N) bytes per parameter.
    Use it as a drop-in for exact averaging with any optimizer, Adam included, where memory for residuals is scarce.
    Not for links so slow that 4 bits are too many: signs (`ef_sign`) are a quarter of it.

    bits: 4, 8 or 2 bits for each element on the wire. block_size: elements per scale, a multiple of 8.
    beta: how much of the old error stays in the average, 0 to below 1; 0 is plain error feedback.
    residual_bits: 8, 16 or 32 bits for each element of the errors.
    reset_every: forget the errors after so many steps; never if None.
    seed: of stochastic rounding.
    """

    name = "loco"

    def __init__(
        self,
        *,
        bits: int = 4,
        block_size: int = 256,
        beta: float = 0.8,
        residual_bits: int = 8,
        reset_every: int | None = 1024,
        seed: int = 0,
        max_norm: float | None = None,
        grad_scaler: Any = None,
    ) -> None:
        check_option("beta", beta, lambda x: 0 <= x < 1, "a number from 0, below 1")
        self.beta = beta
        super().__init__(
            BlockInt(bits=bits, block_size=block_size),
            residual_bits=residual_bits,
            reset_every=reset_every,
            seed=seed,
            max_norm=max_norm,
            grad_scaler=grad_scaler,
        )

    def feedback(self, compressor: Compressor, elements: int, blocks: Blocks) -> ErrorFeedback:
        bits = self.residual_bits
        return ErrorFeedback(compressor, elements, self.device, bits=bits, average=self.beta, blocks=blocks)
