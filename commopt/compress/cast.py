"""Half precision: two bytes per element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from commopt.compress.base import Compressor, element_indices, equal_blocks
from commopt.errors import ConfigError
from commopt.wire.bucket import Blocks
from commopt.wire.payload import Layout


@dataclass(frozen=True)
class Cast(Compressor):
    """Round to float16 or bfloat16. Payload: (n,) in that dtype. A value beyond the dtype's range marks its block as bad."""

    dtype: torch.dtype = torch.float16
    block_size: int = 2048

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float16, torch.bfloat16):
            raise ConfigError(f"dtype: {self.dtype} is no half precision; write torch.float16 or torch.bfloat16")

    def block_lengths(self, numel: int, ranks: int) -> list[int]:
        return equal_blocks(numel, self.block_size)

    def layout(self, blocks: Blocks) -> Layout:
        return ((self.dtype, blocks.elements),)

    def compress_(
        self, x: Tensor, residual: Tensor | None, parts: Sequence[Blocks], out: Sequence[Sequence[Tensor]]
    ) -> None:
        for blocks, (codes,) in zip(parts, out, strict=True):
            c = x[element_indices(blocks.starts, blocks.lengths, x.device)]
            homes = element_indices(blocks.homes, blocks.lengths, x.device)
            if residual is not None:
                c = c + residual[homes]
            codes.copy_(c)
            if residual is not None:
                good = (~self.is_bad([codes], blocks))[_block_of_element(blocks, x.device)]
                residual[homes] = torch.where(good, c - codes.float(), residual[homes])

    def decompress_(
        self, codes: Sequence[Tensor], blocks: Blocks, out: Tensor, *, alpha: float = 1.0, add: bool = False
    ) -> None:
        places = element_indices(blocks.starts, blocks.lengths, out.device)
        values = codes[0].float() * alpha
        out[places] = out[places] + values if add else values

    def is_bad(self, codes: Sequence[Tensor], blocks: Blocks) -> Tensor:
        bad = torch.zeros(len(blocks), dtype=torch.int64, device=codes[0].device)
        return bad.index_add_(0, _block_of_element(blocks, bad.device), (~codes[0].isfinite()).long()).ne(0)


def _block_of_element(blocks: Blocks, device: torch.device) -> Tensor:
    return torch.from_numpy(np.repeat(np.arange(len(blocks)), blocks.lengths)).to(device)
