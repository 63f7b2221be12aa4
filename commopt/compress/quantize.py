"""Two to eight bits per element and one scale per block.

Stochastic rounding takes the upper of two neighbouring levels with the probability that makes it right on average, to 2^-24 of
their distance; draws come from the blocks' keys. Without keys, and with `stochastic=False`, values go to the nearest level.
A block whose scale would be below 2^-126 counts as a block of zeros, and one whose scale is beyond float32 as a bad one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from commopt import kernels
from commopt.compress.base import Compressor, equal_blocks
from commopt.errors import check_flag, check_option
from commopt.wire.bucket import Blocks
from commopt.wire.payload import Layout


class BlockScaled(Compressor):
    """What these codecs share. Payload: (B,) f32 scales, (sum of ceil(n bits/8),) u8 codes; a bad block's scale is NaN."""

    block_size: int | None

    @property
    @abstractmethod
    def code_bits(self) -> int:
        """Bits per element, from 2 to 8."""

    def block_lengths(self, numel: int, ranks: int) -> list[int]:
        return equal_blocks(numel, self.block_size or max(numel, 1))

    def layout(self, blocks: Blocks) -> Layout:
        return (
            (torch.float32, len(blocks)),
            (torch.uint8, int(((blocks.lengths * self.code_bits + 7) // 8).sum())),
        )

    def is_bad(self, codes: Sequence[Tensor], blocks: Blocks) -> Tensor:
        return ~codes[0].isfinite()


class EvenLevels(BlockScaled):
    """scale * code with integers -levels .. levels as codes, scale = norm / levels, code = round(c / scale).

    Codes are two's complement in `code_bits` bits, the first one in the lowest bits of the first byte; each block starts a byte.
    """

    levels: int

    @property
    def code_bits(self) -> int:
        return bits_of(self.levels)

    @property
    def has_l2_norm(self) -> bool:
        """The norm is the block's L2 norm, and not its largest magnitude."""
        return False

    def compress_(
        self, x: Tensor, residual: Tensor | None, parts: Sequence[Blocks], out: Sequence[Sequence[Tensor]]
    ) -> None:
        for blocks, (scales, codes) in zip(parts, out, strict=True):
            kernels.of("quantize", x.device).compress_levels_(
                x,
                residual,
                blocks,
                scales,
                codes,
                levels=self.levels,
                bits=self.code_bits,
                squared=self.has_l2_norm,
                stochastic=self.is_stochastic,
            )

    def decompress_(
        self, codes: Sequence[Tensor], blocks: Blocks, out: Tensor, *, alpha: float = 1.0, add: bool = False
    ) -> None:
        scales, packed = codes
        kernels.of("quantize", out.device).decompress_levels_(
            packed, scales, blocks, out, bits=self.code_bits, alpha=alpha, add=add
        )


@dataclass(frozen=True)
class BlockInt(EvenLevels):
    """Integers of `bits` bits, scale = max|c| / (2^(bits-1) - 1): symmetric block quantisation.

    Dettmers et al. 2022, arXiv:2110.02861 (blocks). |c - C(c)| <= scale, and half of that to the nearest level; only
    stochastic rounding is unbiased.
    """

    bits: int = 8
    block_size: int = 256
    stochastic: bool = True

    def __post_init__(self) -> None:
        check_option("bits", self.bits, lambda x: x in (2, 4, 8), "2, 4 or 8")
        check_block_size(self.block_size)
        check_flag("stochastic", self.stochastic)

    @property
    def levels(self) -> int:  # type: ignore[override]
        return int(2 ** (self.bits - 1)) - 1

    @property
    def is_stochastic(self) -> bool:
        return self.stochastic


@dataclass(frozen=True)
class QSGDLevels(EvenLevels):
    """norm / levels * sign(c) * level with level = levels |c| / norm, rounded stochastically: unbiased.

    Alistarh et al. 2017, arXiv:1610.02132, with levels as whole bits instead of Elias codes: ceil(log2(2 levels + 1)) bits per
    element. norm: "l2", the paper's, or "max", the largest magnitude, which wastes no level. What travels is norm / levels.
    With "l2" the squared error is at most min(n / levels^2, sqrt(n) / levels) ||c||^2 on average.
    """

    levels: int = 7
    block_size: int = 512
    norm: str = "l2"

    def __post_init__(self) -> None:
        check_option(
            "levels", self.levels, lambda x: isinstance(x, int) and 1 <= x <= 127, "a whole number from 1 to 127"
        )
        check_block_size(self.block_size)
        check_option("norm", self.norm, lambda x: x in ("l2", "max"), "'l2' or 'max'")

    @property
    def has_l2_norm(self) -> bool:
        return self.norm == "l2"

    @property
    def is_stochastic(self) -> bool:
        return True


@dataclass(frozen=True)
class BlockFloat8(BlockScaled):
    """float8 e4m3 values (three bits of mantissa, up to 448), scale = max|c| / 448.

    Micikevicius et al. 2022, arXiv:2209.05433 (the format). Codes are the bit patterns of torch.float8_e4m3fn, as bytes;
    to the nearest they are torch's own cast of c / scale. |c - C(c)| <= |c| / 8 and half of that to the nearest, but in
    the format's subnormal numbers: scale / 512, below scale / 64.
    """

    block_size: int = 256
    stochastic: bool = True

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        check_flag("stochastic", self.stochastic)

    @property
    def code_bits(self) -> int:
        return 8

    @property
    def is_stochastic(self) -> bool:
        return self.stochastic

    def compress_(
        self, x: Tensor, residual: Tensor | None, parts: Sequence[Blocks], out: Sequence[Sequence[Tensor]]
    ) -> None:
        for blocks, (scales, codes) in zip(parts, out, strict=True):
            kernels.of("quantize", x.device).compress_float8_(
                x, residual, blocks, scales, codes, stochastic=self.stochastic
            )

    def decompress_(
        self, codes: Sequence[Tensor], blocks: Blocks, out: Tensor, *, alpha: float = 1.0, add: bool = False
    ) -> None:
        scales, values = codes
        kernels.of("quantize", out.device).decompress_float8_(values, scales, blocks, out, alpha=alpha, add=add)


@dataclass(frozen=True)
class Natural(BlockScaled):
    """Powers of two: sign and exponent, rounded stochastically between the two around |c|; unbiased.

    Horváth et al. 2019, arXiv:1905.10988 (natural compression, C_nat): E ||C(c) - c||^2 <= ||c||^2 / 8. The paper sends sign and
    exponent in 9 bits; here they take 8. scale = 2^ceil(log2 max|c|), and a code is the sign in the highest bit and k = 0 .. 127
    below it: 0, or 2^(k - 127) scale. What lies below the smallest power, 2^-126 scale or 2^-126 where that is larger, goes to it
    or to zero, unbiased too. The one exception: beyond 2^127 there is no power of two in float32, so such values become 2^127.
    """

    block_size: int = 2048

    def __post_init__(self) -> None:
        check_block_size(self.block_size)

    @property
    def code_bits(self) -> int:
        return 8

    @property
    def is_stochastic(self) -> bool:
        return True

    def compress_(
        self, x: Tensor, residual: Tensor | None, parts: Sequence[Blocks], out: Sequence[Sequence[Tensor]]
    ) -> None:
        for blocks, (scales, codes) in zip(parts, out, strict=True):
            kernels.of("quantize", x.device).compress_natural_(x, residual, blocks, scales, codes)

    def decompress_(
        self, codes: Sequence[Tensor], blocks: Blocks, out: Tensor, *, alpha: float = 1.0, add: bool = False
    ) -> None:
        scales, powers = codes
        kernels.of("quantize", out.device).decompress_natural_(powers, scales, blocks, out, alpha=alpha, add=add)


def bits_of(levels: int) -> int:
    """ceil(log2(2 levels + 1)): how many bits hold the integers -levels .. levels."""
    return (2 * levels).bit_length()


def check_block_size(block_size: int) -> None:
    """Raise ConfigError unless blocks of any number of bits per element fill whole bytes."""
    check_option(
        "block_size",
        block_size,
        lambda x: isinstance(x, int) and x >= 8 and x % 8 == 0,
        "a positive multiple of 8, so that codes fill bytes",
    )
