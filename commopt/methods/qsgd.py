"""QSGD: a few levels per block, rounded at random."""

from typing import Annotated, Literal

from pydantic import Field

from commopt.compress.feedback import NOTHING_KEPT
from commopt.compress.quantize import QSGDLevels
from commopt.exchange.gather import GatherMean
from commopt.method import GradientMethod, NoOptions, options
from commopt.options import BlockSize, Flag, Whole


@options
class QSGDOptions(NoOptions):
    levels: Annotated[Whole, Field(ge=1, le=127)] = 127
    block_size: BlockSize = 512
    norm: Literal["max", "l2"] = "max"
    dense_1d: Flag = False
    seed: Whole = 0


class QSGD(GradientMethod, GatherMean):
    """Send gradients rounded at random to a few levels of each block's norm, without bias.

    Alistarh et al. 2017, arXiv:1610.02132, Theorem 3.2 (stochastic quantisation by blocks):
        q_i = norm_i sign(g_i) level_i / levels,  level_i = levels |g_i| / norm_i rounded at random;  y = mean q_i
    Levels are sent as whole bits instead of Elias codes. A block of zeros stays zero. There is no error feedback,
    because rounding is unbiased. `two_way(qsgd)` has error feedback, and compresses both directions.
    Sends (N-1) x (ceil(log2(2 levels + 1))/8 + 4/block_size) bytes per parameter and step.
    State: none.
    Use it on few ranks, if there is no memory for residuals.
    Not for many ranks: what arrives grows with N, and 8 bits cost more than dense from 9 ranks on.

    levels: positive levels, 1 to 127: 7 takes 4 bits, 127 takes 8.
    block_size: elements per norm, a multiple of 8.
    norm: "l2", the paper's, or "max", the largest magnitude, which uses all levels.
    dense_1d: average parameters with fewer than two dimensions exactly.
    seed: of the rounding.
    """

    name = "qsgd"
    Options = QSGDOptions
    options: QSGDOptions

    def set_up(self) -> None:
        o = self.options
        codec = QSGDLevels(levels=o.levels, block_size=o.block_size, norm=o.norm)
        GatherMean.__init__(self, codec, NOTHING_KEPT, dense_1d=o.dense_1d, seed=o.seed)
