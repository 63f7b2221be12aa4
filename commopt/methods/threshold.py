"""Gradient elements above a fixed magnitude."""

from commopt.compress.options import ResidualOptions, ValueBits
from commopt.compress.sparse import Threshold
from commopt.exchange.gather import GatherMean
from commopt.method import GradientMethod, options
from commopt.options import Flag, Positive


@options
class ThresholdOptions(ResidualOptions):
    threshold: Positive
    value_bits: ValueBits = 16
    dense_1d: Flag = True


class ThresholdMean(GradientMethod, GatherMean):
    """Send every gradient element whose magnitude, together with what earlier steps left of it, reaches a threshold.

    Strom 2015, "Scalable distributed DNN training using commodity GPU cloud computing" (threshold with error
    feedback); Aji and Heafield 2017, arXiv:1704.05021:
        c_i = g_i + e_i;  q_i = c_i where |c_i| >= threshold, else 0;  e_i <- c_i - q_i;  y = mean q_i
    The gradient decides how much is sent, so lengths are sent first. Do not use this method to plan links.
    Sends (N-1) x share x (value_bits/8 + places) bytes per parameter and step, where share is that of elements that
    reach the threshold.
    State: 4 bytes per parameter.
    Use it if gradients keep their size, and steps with small gradients should cost little.
    Not for training from scratch, where gradients shrink by orders of magnitude; `top_k` adapts.

    threshold: above 0, in the gradient's own units.
    value_bits, dense_1d, residual_bits, residual_decay: as in `top_k`.
    """

    name = "threshold"
    Options = ThresholdOptions
    options: ThresholdOptions

    def set_up(self) -> None:
        o = self.options
        codec = Threshold(threshold=o.threshold, value_bits=o.value_bits)
        GatherMean.__init__(self, codec, o.kept(), dense_1d=o.dense_1d)

    def bytes_per_parameter(self, ranks: int) -> float:
        raise NotImplementedError("what a threshold lets through depends on the gradients")
