"""Natural compression: signs and exponents."""

from commopt.compress.feedback import NOTHING_KEPT
from commopt.compress.quantize import Natural
from commopt.exchange.two_way import TwoWayMean
from commopt.method import GradientMethod, NoOptions, options
from commopt.options import BlockSize, Flag, Whole


@options
class NaturalOptions(NoOptions):
    block_size: BlockSize = 2048
    dense_1d: Flag = False
    seed: Whole = 0


class NaturalMean(GradientMethod, TwoWayMean):
    """Send gradients rounded at random to powers of two, without bias, in both directions.

    Horváth et al. 2019, arXiv:1905.10988, Algorithm 1 (bidirectional compression):
        y = C(mean C(g_i)),  C(t) = sign(t) 2^floor(log2 |t|) or twice that, with the chances that make it right on average
    The variance grows by 1/8 in each direction, and no residual is needed. It takes 8 bits instead of the paper's 9:
    see the codec.
    Sends 2(N-1)/N x (1 + 4/block_size) bytes per parameter and step.
    State: none.
    Use it if there is no memory for residuals, for gradients of any size and spread.
    Not for the smallest loss at 8 bits: `two_way(int8)` with error feedback comes closer.

    block_size: elements per common exponent, a multiple of 8.
    dense_1d: average parameters with fewer than two dimensions exactly.
    seed: of the rounding.
    """

    name = "natural"
    Options = NaturalOptions
    options: NaturalOptions

    def set_up(self) -> None:
        o = self.options
        TwoWayMean.__init__(self, Natural(block_size=o.block_size), NOTHING_KEPT, dense_1d=o.dense_1d, seed=o.seed)
