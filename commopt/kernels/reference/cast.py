"""Half precision in plain torch: the oracle of the fast kernels, and what runs on devices without one."""

from torch import Tensor

from commopt.kernels.reference import runs
from commopt.wire.bucket import Blocks


def compress_(x: Tensor, residual: Tensor | None, blocks: Blocks, codes: Tensor) -> None:
    """See `kernels.cpu.cast.compress_`."""
    c = runs.corrected(x, residual, blocks)
    codes.copy_(c)
    if residual is not None:
        runs.keep_rest_(residual, c - codes.float(), ~bad_blocks(codes, blocks), blocks)


def decompress_(codes: Tensor, blocks: Blocks, out: Tensor, *, alpha: float, add: bool) -> None:
    """out <- alpha * codes, or out <- out + that, at the blocks' starts."""
    runs.put_(codes.float() * alpha, blocks, out, add)


def bad_blocks(codes: Tensor, blocks: Blocks) -> Tensor:
    """(B,) bool: which blocks have a NaN or an inf."""
    return runs.bad_runs(codes, blocks.lengths)


def divide_(x: Tensor, divisor: float, out: Tensor) -> None:
    """out <- x / divisor, divided in x's dtype."""
    out.copy_(x / divisor)
