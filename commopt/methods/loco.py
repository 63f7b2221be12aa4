"""LoCo: four bits each way, and a moving average of what they lost, in eight bits."""

from typing import Literal

from commopt.compress.feedback import Kept
from commopt.compress.options import ResidualBits
from commopt.compress.quantize import BlockInt
from commopt.exchange.two_way import TwoWayMean
from commopt.method import GradientMethod, NoOptions, options
from commopt.options import BlockSize, Count, Fraction, Whole


@options
class LoCoOptions(NoOptions):
    bits: Literal[2, 4, 8] = 4
    block_size: BlockSize = 256
    beta: Fraction = 0.8
    residual_bits: ResidualBits = 8
    reset_every: Count | None = 1024
    seed: Whole = 0


class LoCo(GradientMethod, TwoWayMean):
    """Send gradients as 4-bit integers each way, corrected by a moving average of the rounding errors, which is kept in 8 bits.

    Xie et al. 2024, arXiv:2407.04480, Algorithm 1, in the form of its code in ZeRO++ (DeepSpeed):
        p_i = g_i + e_i;  q_i = C(p_i);  e_i <- beta e_i + (1 - beta) (p_i - q_i)
        a = mean q_i + s;  y = C(a);  s <- beta s + (1 - beta) (a - y);  every reset_every steps e_i = s = 0
    Since e_i <- e_i + (1 - beta) (g_i - q_i), nothing is lost, only sent later: e_i / (1 - beta) is what is still to
    be sent. ZeRO++ rounds to the nearest level, and sends gradients within nodes and then between them. It needs no
    answer, because its parameters are sharded. Here the answer is also sent in 4 bits, with its own residual, and
    rounding is stochastic.
    Sends 2(N-1)/N x (1/2 + 4/block_size) bytes per parameter and step.
    State: (1 + 4/block_size) x (1 + 1/N) bytes per parameter.
    Use it to replace exact averaging with any optimizer, including Adam, if memory for residuals is scarce.
    Not for links so slow that 4 bits are too many: signs (`ef_sign`) are a quarter of it.

    bits: 4, 8 or 2 bits for each element on the wire. block_size: elements per scale, a multiple of 8.
    beta: how much of the old error stays in the average, 0 to below 1; 0 is plain error feedback.
    residual_bits: 8, 16 or 32 bits for each element of the errors.
    reset_every: forget the errors after this many steps; never if None.
    seed: of stochastic rounding.
    """

    name = "loco"
    Options = LoCoOptions
    options: LoCoOptions

    def set_up(self) -> None:
        o = self.options
        kept = Kept(o.residual_bits, average=o.beta, reset_every=o.reset_every)
        TwoWayMean.__init__(self, BlockInt(bits=o.bits, block_size=o.block_size), kept, seed=o.seed)
