"""Half precision: two bytes per element."""

from typing import Annotated, Any

import torch
from pydantic import AfterValidator
from torch import Tensor

from commopt import kernels
from commopt.compress.base import Codes
from commopt.compress.fused import Fused
from commopt.errors import ConfigError
from commopt.kernels.reference import cast as plain
from commopt.options import BlockSize, checked_dataclass
from commopt.wire.bucket import Blocks
from commopt.wire.payload import Layout

LONGEST = 2048  # elements of a block of which kernels know in one pass whether it is bad


def _half(dtype: torch.dtype) -> torch.dtype:
    if dtype not in (torch.float16, torch.bfloat16):
        raise ConfigError(f"dtype: {dtype} is not a half-precision type; write torch.float16 or torch.bfloat16")
    return dtype


@checked_dataclass
class Cast(Fused):
    """Round to float16 or bfloat16. Payload: (n,) in that dtype. A value beyond the dtype's range marks its block as bad."""

    dtype: Annotated[torch.dtype, AfterValidator(_half)] = torch.float16
    block_size: BlockSize = 2048

    def layout(self, blocks: Blocks) -> Layout:
        return ((self.dtype, blocks.elements),)

    def pads(self, device: torch.device) -> bool:
        return super().pads(device) and self.block_size <= LONGEST

    def writing(self) -> dict[str, Any]:
        return {"kernel": "cast", "dtype": self.dtype}

    def reading(self) -> dict[str, Any]:
        return {"kernel": "cast", "dtype": self.dtype}

    def write_(self, x: Tensor, residual: Tensor | None, blocks: Blocks, codes: Codes) -> None:
        _kernel(x).compress_(x, residual, blocks, codes[0])

    def decompress_(self, codes: Codes, blocks: Blocks, out: Tensor, *, alpha: float = 1.0, add: bool = False) -> None:
        _kernel(out).decompress_(codes[0], blocks, out, alpha=alpha, add=add)

    def is_bad(self, codes: Codes, blocks: Blocks) -> Tensor:
        return _kernel(codes[0]).bad_blocks(codes[0], blocks)  # type: ignore[no-any-return]


def _kernel(x: Tensor) -> Any:
    """The kernels of one message; triton's are of many, of blocks that are not too long."""
    return plain if kernels.has_triton(x.device) else kernels.of("cast", x.device)
