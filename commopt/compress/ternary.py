"""Minus one, zero or one."""

from __future__ import annotations

from commopt.compress.quantize import EvenLevels
from commopt.options import BlockSize, checked_dataclass


@checked_dataclass
class Ternary(EvenLevels):
    """scale * sign(c) * Bernoulli(|c| / scale) with scale = max|c|: unbiased, 2 bits per element.

    Wen et al. 2017, arXiv:1705.07878 (TernGrad's quantiser). Each block has the scale of its own rank; the paper shares the
    largest one among ranks, so that codes can be summed as integers, and clips beforehand. block_size: None for whole parameters,
    as in the paper. Without keys: +-scale above half of it, else zero.
    """

    stochastic = True
    block_size: BlockSize | None = 2048

    @property
    def levels(self) -> int:  # type: ignore[override]
        return 1
