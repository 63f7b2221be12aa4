"""One bit per element and one scale per block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from commopt import kernels
from commopt.bucket import Blocks
from commopt.compress.base import Compressor, equal_blocks
from commopt.errors import ConfigError, check_option
from commopt.wire import Layout


@dataclass(frozen=True)
class BlockSign(Compressor):
    """scale * sign(c) with the mean magnitude of the block as its scale, scale = |c|_1 / n.

    Karimireddy et al. 2019, arXiv:1901.09847 (EF-signSGD), with blocks instead of whole tensors: always a contraction,
    ||c - C(c)||^2 = (1 - rho^2) ||c||^2 with rho = |c|_1 / (sqrt(n) ||c||_2). sign(0) is +1, -0.0 included.
    Payload: (B,) f32 scales, (sum of ceil(n/8),) u8 bits, the first element in the most significant bit.
    """

    block_size: int = 2048

    def __post_init__(self) -> None:
        check_option(
            "block_size", self.block_size, _is_whole_bytes, "a positive multiple of 8, so that bits fill bytes"
        )

    def block_lengths(self, numel: int, ranks: int) -> list[int]:
        return equal_blocks(numel, self.block_size)

    def layout(self, blocks: Blocks) -> Layout:
        return ((torch.float32, len(blocks)), (torch.uint8, blocks.sign_bytes))

    def compress_(
        self, x: Tensor, residual: Tensor | None, parts: Sequence[Blocks], out: Sequence[Sequence[Tensor]]
    ) -> None:
        for blocks, (scales, bits) in zip(parts, out, strict=True):
            kernels.of(x.device).compress_signs_(x, residual, blocks, scales, bits, squared=False)

    def decompress_(
        self, codes: Sequence[Tensor], blocks: Blocks, out: Tensor, *, alpha: float = 1.0, add: bool = False
    ) -> None:
        scales, bits = codes
        kernels.of(out.device).unpack_signs_(bits, scales, blocks, out, alpha=alpha, add=add)

    def is_bad(self, codes: Sequence[Tensor], blocks: Blocks) -> Tensor:
        return ~codes[0].isfinite()


@dataclass(frozen=True)
class TensorSign(BlockSign):
    """scale * sign(c) with one scale per parameter that keeps its L2 norm, scale = ||c||_2 / sqrt(n).

    The form of DeepSpeed's 1-bit optimizers (arXiv:2102.02888). Each parameter is N equal chunks of whole bytes, chunk j
    served by rank j; workers have one scale for the parameter, the server has one per chunk. Unlike DeepSpeed's, padding is not
    counted in the scale. Not a contraction where rho <= 1/2 (heavy tails, sparse tensors). Payload as `BlockSign`'s.
    """

    shared_scale: ClassVar[bool] = True

    def block_lengths(self, numel: int, ranks: int) -> list[int]:
        return equal_blocks(numel, 8 * -(-numel // (8 * ranks))) if numel else []

    def compress_(
        self, x: Tensor, residual: Tensor | None, parts: Sequence[Blocks], out: Sequence[Sequence[Tensor]]
    ) -> None:
        kernel = kernels.of(x.device)
        if all(len(np.unique(blocks.groups)) == len(blocks) for blocks in parts) and len(parts) == 1:
            for blocks, (scales, bits) in zip(parts, out, strict=True):
                kernel.compress_signs_(x, residual, blocks, scales, bits, squared=True)
            return
        squares = [
            np.asarray(torch.as_tensor(kernel.block_sums(x, residual, blocks, squared=True)).cpu()) for blocks in parts
        ]
        groups = np.concatenate([blocks.groups for blocks in parts])
        lengths = np.concatenate([blocks.lengths for blocks in parts])
        which, place = np.unique(groups, return_inverse=True)
        total = np.bincount(place, np.concatenate(squares), len(which))
        count = np.bincount(place, lengths, len(which))
        with np.errstate(over="ignore", invalid="ignore"):
            scale = np.sqrt(total / count).astype(np.float32)
        scale = np.where(np.isfinite(scale), scale, np.float32(np.nan))
        for blocks, (scales, bits) in zip(parts, out, strict=True):
            scales.copy_(torch.from_numpy(scale[np.searchsorted(which, blocks.groups)]))
            kernel.pack_signs_(x, residual, blocks, scales, bits)


def _is_whole_bytes(block_size: int) -> bool:
    return isinstance(block_size, int) and block_size >= 8 and block_size % 8 == 0


def scaled_sign(scale: str, block_size: int = 2048) -> BlockSign:
    """The sign compressor that a method's `scale` option names: "l1", per block, or "l2", per tensor."""
    if scale == "l1":
        return BlockSign(block_size)
    if scale == "l2":
        return TensorSign(block_size)
    raise ConfigError(
        f"scale: {scale!r} is no scale; write 'l1' (mean magnitude per block) or 'l2' (DeepSpeed's, per tensor)"
    )
