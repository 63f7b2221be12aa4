"""Two to eight bits per element and one scale per block.

Stochastic rounding takes the upper of two neighbouring levels with the probability that makes it right on average, to 2^-24 of
their distance; draws come from the blocks' keys. Without keys, and with `stochastic=False`, values go to the nearest level.
A block whose scale would be below 2^-126 counts as a block of zeros, and one whose scale is beyond float32 as a bad one.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, Strict
from torch import Tensor

from commopt import kernels
from commopt.compress.base import Codes
from commopt.compress.fused import Fused
from commopt.options import BlockSize, Flag, checked_dataclass
from commopt.wire.bucket import Blocks
from commopt.wire.payload import Layout, Payload


class BlockScaled(Fused):
    """What these codecs share. Payload: (B,) f32 scales, (sum of ceil(n bits/8),) u8 codes; a bad block's scale is NaN."""

    kind: ClassVar[str]
    levels: int
    code_bits = 8  # for each element, from 2 to 8
    goes_in_rows: ClassVar[bool] = True
    recalls: ClassVar[bool] = True
    has_l2_norm = False  # the norm is the block's L2 norm, and not its largest magnitude

    def layout(self, blocks: Blocks) -> Layout:
        return ((torch.float32, len(blocks)), (torch.uint8, int(((blocks.lengths * self.code_bits + 7) // 8).sum())))

    def write_(self, x: Tensor, residual: Tensor | None, blocks: Blocks, codes: Codes) -> None:
        how = self.writing()
        kernels.of(how.pop("kernel"), x.device).compress_(x, residual, blocks, *codes, **how)

    def decompress_(self, codes: Codes, blocks: Blocks, out: Tensor, *, alpha: float = 1.0, add: bool = False) -> None:
        how, (scales, packed) = self.reading(), codes
        kernels.of(how.pop("kernel"), out.device).decompress_(packed, scales, blocks, out, alpha=alpha, add=add, **how)

    def writing(self) -> dict[str, Any]:
        how = {"squared": self.has_l2_norm, "stochastic": self.stochastic}
        return {"kernel": "quantize", "kind": self.kind, "levels": self.levels, "bits": self.code_bits, **how}

    def reading(self) -> dict[str, Any]:
        return {"kernel": "quantize", "kind": self.kind, "bits": self.code_bits}


class EvenLevels(BlockScaled):
    """scale * code with integers -levels .. levels as codes, scale = norm / levels, code = round(c / scale).

    Codes are two's complement in `code_bits` bits, the first one in the lowest bits of the first byte; each block starts a byte.
    """

    kind = "levels"

    @property
    def code_bits(self) -> int:  # type: ignore[override]
        return bits_of(self.levels)

    @property
    def needs_fit(self) -> bool:
        coarse = 4 if self.has_l2_norm else 8
        return self.block_size is None or self.block_size > coarse * self.levels**2

    def fit_payloads_(
        self, payloads: Sequence[Payload], x: Tensor, residual: Tensor | None, parts: Sequence[Blocks]
    ) -> None:
        if not self.needs_fit or not kernels.has_triton(x.device):
            return super().fit_payloads_(payloads, x, residual, parts)
        from commopt.kernels.cuda import quantize
        from commopt.kernels.cuda.pieces import Messages

        quantize.fit_all_(x, residual, Messages.of(payloads, parts), bits=self.code_bits)
        return None

    def fit_(self, codes: Codes, x: Tensor, residual: Tensor | None, blocks: Blocks) -> None:
        """Multiply each block's scale by <c, q> / ||q||^2 for its codes' values q, if their variance may exceed ||c||^2.

        It is at most (sqrt(1 + n / levels^2) - 1) / 2 of that with the largest magnitude as norm, sqrt(n) / levels - 1 with "l2".
        """
        if not self.needs_fit:
            return
        kernels.of("quantize", x.device).fit_(x, residual, blocks, *codes, bits=self.code_bits)


@checked_dataclass
class BlockInt(EvenLevels):
    """Integers of `bits` bits, scale = max|c| / (2^(bits-1) - 1): symmetric block quantisation.

    Dettmers et al. 2022, arXiv:2110.02861 (blocks). |c - C(c)| <= scale, and half of that to the nearest level; only
    stochastic rounding is unbiased.
    """

    bits: Literal[2, 4, 8] = 8
    block_size: BlockSize = 256
    stochastic: Flag = True

    @property
    def levels(self) -> int:  # type: ignore[override]
        return int(2 ** (self.bits - 1)) - 1


@checked_dataclass
class QSGDLevels(EvenLevels):
    """norm / levels * sign(c) * level with level = levels |c| / norm, rounded stochastically: unbiased.

    Alistarh et al. 2017, arXiv:1610.02132, with levels as whole bits instead of Elias codes: ceil(log2(2 levels + 1)) bits per
    element. norm: "l2", the paper's, or "max", the largest magnitude, which wastes no level. What travels is norm / levels.
    With "l2" the squared error is at most min(n / levels^2, sqrt(n) / levels) ||c||^2 on average.
    """

    stochastic = True
    levels: Annotated[int, Strict(), Field(ge=1, le=127)] = 7
    block_size: BlockSize = 512
    norm: Literal["l2", "max"] = "l2"

    @property
    def has_l2_norm(self) -> bool:  # type: ignore[override]
        return self.norm == "l2"


@checked_dataclass
class Ternary(EvenLevels):
    """scale * sign(c) * Bernoulli(|c| / scale) with scale = max|c|: unbiased, 2 bits per element.

    Wen et al. 2017, arXiv:1705.07878 (TernGrad's quantiser). Each block has the scale of its own rank; the paper shares the
    largest one among ranks, so that codes can be summed as integers, and clips beforehand. block_size: None for whole parameters,
    as in the paper. Without keys: +-scale above half of it, else zero.
    """

    levels = 1
    stochastic = True
    block_size: BlockSize | None = 2048


@checked_dataclass
class BlockFloat8(BlockScaled):
    """float8 e4m3 values (three bits of mantissa, up to 448), scale = max|c| / 448.

    Micikevicius et al. 2022, arXiv:2209.05433 (the format). Codes are the bit patterns of torch.float8_e4m3fn, as bytes;
    rounded to the nearest, they are torch's own cast of c / scale. |c - C(c)| <= |c| / 8, and half of that to the nearest, except
    for the format's subnormal numbers, below scale / 64: scale / 512.
    """

    kind = "float8"
    levels = 448
    block_size: BlockSize = 256
    stochastic: Flag = True


@checked_dataclass
class Natural(BlockScaled):
    """Powers of two: sign and exponent, rounded stochastically between the two around |c|; unbiased.

    Horváth et al. 2019, arXiv:1905.10988 (natural compression, C_nat): E ||C(c) - c||^2 <= ||c||^2 / 8. The paper sends sign and
    exponent in 9 bits; here they take 8. scale = 2^ceil(log2 max|c|), and a code is the sign in the highest bit and k = 0 .. 127
    below it: 0, or 2^(k - 127) scale. What lies below the smallest power, 2^-126 scale or 2^-126 where that is larger, goes to it
    or to zero, unbiased too. The one exception: beyond 2^127 there is no power of two in float32, so such values become 2^127.
    """

    kind = "natural"
    levels = 1
    stochastic = True
    block_size: BlockSize = 2048


def bits_of(levels: int) -> int:
    """ceil(log2(2 levels + 1)): how many bits hold the integers -levels .. levels."""
    return (2 * levels).bit_length()


def pack_codes_(values: Tensor, bits: int, out: Tensor) -> None:
    """(n,) f32 whole numbers in -2^(bits-1) .. 2^(bits-1) - 1 to (ceil(n bits/8),) u8, as `EvenLevels` packs them."""
    kernel, one, levels = kernels.of("quantize", out.device), values.new_ones(1), 2 ** (bits - 1)
    kernel.compress_(values, None, _one_block(values), one, out, kind="levels", levels=levels, bits=bits, is_given=True)


def unpack_codes(code: Tensor, bits: int, n: int) -> Tensor:
    """(n,) f32: what `pack_codes_` was given."""
    kernel, values = kernels.of("quantize", code.device), torch.empty(n, dtype=torch.float32, device=code.device)
    one, blocks = values.new_ones(1), _one_block(values)
    kernel.decompress_(code, one, blocks, values, kind="levels", bits=bits, alpha=1.0, add=False)
    return values


def _one_block(x: Tensor) -> Blocks:
    zero = np.zeros(1, np.int64)
    return Blocks(zero, zero, zero + len(x), zero, zero)
