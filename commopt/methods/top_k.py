"""The largest gradient elements."""

from commopt.compress.options import ResidualOptions, ValueBits
from commopt.compress.sparse import TopK
from commopt.exchange.gather import GatherMean
from commopt.method import GradientMethod, options
from commopt.options import Flag, Share


@options
class TopKOptions(ResidualOptions):
    density: Share = 0.01
    value_bits: ValueBits = 16
    dense_1d: Flag = True


class TopKMean(GradientMethod, GatherMean):
    """Send the gradient elements with the largest magnitudes and their places, and add what was left out to later steps' messages.

    Aji and Heafield 2017, arXiv:1704.05021; Stich et al. 2018, arXiv:1809.07599, Algorithm 1:
        c_i = g_i + e_i;  q_i = top_k(c_i);  e_i <- c_i - q_i;  y = mean q_i
    The choice is exact and per parameter. The learning rate is applied outside: see `ef`.
    Sends (N-1) x density x (value_bits/8 + places) bytes per parameter and step, where places are log2(e/density) +
    0.5 bits at most.
    State: 4 bytes per parameter; a half or a quarter of it with residual_bits 16 or 8.
    Use it for sparse gradients, with SGD and low momentum. At densities of 1 % and below, `dgc` reaches a better loss.
    Not for many ranks: what arrives grows with N, and breaks even with dense at N = 8 / (density x bytes of an entry).

    density: the share of elements that is sent, above 0, at most 1.
    value_bits: 32, 16, 8 or 1 for each value; what rounding loses stays in the residual.
    dense_1d: average parameters with fewer than two dimensions (biases, norms) exactly.
    residual_bits, residual_decay: see `two_way`.
    """

    name = "top_k"
    Options = TopKOptions
    options: TopKOptions

    def set_up(self) -> None:
        o = self.options
        codec = TopK(density=o.density, value_bits=o.value_bits)
        GatherMean.__init__(self, codec, o.kept(), dense_1d=o.dense_1d)
