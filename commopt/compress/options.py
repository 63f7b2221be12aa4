"""Options that many methods share: the scales of signs, how residuals are kept, and the codec itself."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ValidationInfo

from commopt.compress import make_compressor
from commopt.compress.base import Compressor
from commopt.compress.feedback import NOTHING_KEPT, Kept
from commopt.compress.sign import SIGNS, BlockSign
from commopt.errors import ConfigError
from commopt.options import BlockSize, Count, Flag, NoOptions, Share, Whole, options


def _codec(given: Any, info: ValidationInfo) -> Compressor:
    return make_compressor(given, str(info.field_name))


Codec = Annotated[Compressor, BeforeValidator(_codec)]  # its name, or {"compressor": name, option: value}
ResidualBits = Literal[32, 16, 8]
ValueBits = Literal[32, 16, 8, 1]
SignScale = Literal["l1", "rms", "l2", "model"]


@options
class SignOptions(NoOptions):
    """How signs are scaled, and the residual of what they leave out."""

    scale: SignScale = "l1"
    block_size: BlockSize = 2048
    prescale: Flag = False
    residual_bits: ResidualBits = 32

    def __post_init__(self) -> None:
        if self.prescale and self.scale != "model":
            raise ConfigError(
                f"prescale: true has no effect with scale: {self.scale!r}, where every tensor has a scale of its own; "
                "write scale: model"
            )

    def compressor(self) -> BlockSign:
        return SIGNS[self.scale](self.block_size)


@options
class ResidualOptions(NoOptions):
    residual_bits: ResidualBits = 32
    residual_decay: Share = 1.0

    def kept(self) -> Kept:
        return Kept(self.residual_bits, self.residual_decay)


@options
class ErrorFeedbackOptions(ResidualOptions):
    """Whether and how residuals are kept, what stays dense, and the seed of stochastic rounding."""

    error_feedback: Flag = True
    reset_every: Count | None = None
    dense_1d: Flag = False
    seed: Whole = 0

    def __post_init__(self) -> None:
        if not self.error_feedback and (self.residual_bits, self.residual_decay, self.reset_every) != (32, 1.0, None):
            raise ConfigError(
                "residual_bits, residual_decay and reset_every have no effect with error_feedback: false; leave them out"
            )

    def kept(self) -> Kept:
        if not self.error_feedback:
            return NOTHING_KEPT
        return Kept(self.residual_bits, self.residual_decay, reset_every=self.reset_every)
