"""One bit per element and one scale per block."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from commopt import kernels
from commopt.compress.base import Codes, equal_blocks
from commopt.compress.fused import Fused
from commopt.options import BlockSize, checked_dataclass
from commopt.wire.bucket import Blocks, Int64Array, ParameterIndex
from commopt.wire.payload import Layout


@checked_dataclass
class BlockSign(Fused):
    """scale * sign(c) with the mean magnitude of the block as its scale, scale = |c|_1 / n.

    Karimireddy et al. 2019, arXiv:1901.09847 (EF-signSGD), with blocks instead of whole tensors: always a contraction,
    ||c - C(c)||^2 = (1 - rho^2) ||c||^2 with rho = |c|_1 / (sqrt(n) ||c||_2). sign(0) is +1, -0.0 included.
    Payload: (B,) f32 scales, (sum of ceil(n/8),) u8 bits, the first element in the most significant bit.
    """

    goes_in_rows: ClassVar[bool] = True
    keeps_l2: ClassVar[bool] = False
    block_size: BlockSize = 2048

    def blends(self, device: torch.device) -> bool:
        """Whether kernels take a `Blended`, and write what they decode into a second tensor, too."""
        return kernels.has_triton(device) or self._rows(device)

    def layout(self, blocks: Blocks) -> Layout:
        return ((torch.float32, len(blocks)), (torch.uint8, blocks.sign_bytes))

    def write_(self, x: Tensor, residual: Tensor | None, blocks: Blocks, codes: Codes) -> None:
        kernels.of("signs", x.device).compress_signs_(x, residual, blocks, *codes, squared=self.keeps_l2)

    def decompress_(self, codes: Codes, blocks: Blocks, out: Tensor, *, alpha: float = 1.0, add: bool = False) -> None:
        scales, bits = codes
        kernels.of("signs", out.device).unpack_signs_(bits, scales, blocks, out, alpha=alpha, add=add)

    def writing(self) -> dict[str, Any]:
        return {"kernel": "signs", "squared": self.keeps_l2}

    def reading(self) -> dict[str, Any]:
        return {"kernel": "signs"}


@checked_dataclass
class RmsSign(BlockSign):
    """scale * sign(c) with the root mean square of the block as its scale, which keeps the block's L2 norm.

    The scale of DeepSpeed's 1-bit optimizers (arXiv:2102.02888) for blocks instead of tensors. ||c - C(c)||^2 = 2 (1 - rho) ||c||^2:
    not a contraction where rho <= 1/2 (heavy tails, sparse blocks).
    """

    keeps_l2: ClassVar[bool] = True


@checked_dataclass
class TensorSign(BlockSign):
    """scale * sign(c) with one scale per parameter that keeps its L2 norm, scale = ||c||_2 / sqrt(n).

    The form of DeepSpeed's 1-bit optimizers (arXiv:2102.02888). Each parameter is N equal chunks of whole bytes, chunk j
    served by rank j; workers have one scale for the parameter, the server has one per chunk. Unlike DeepSpeed's, padding is not
    counted in the scale. Not a contraction where rho <= 1/2 (heavy tails, sparse tensors). Payload as `BlockSign`'s.
    """

    goes_in_rows: ClassVar[bool] = False  # a block's scale depends on those of other messages
    shared_scale: ClassVar[bool] = True

    def writing(self) -> dict[str, Any]:
        return {"kernel": "signs", "squared": True, "groups": self.scale_groups}

    def scale_groups(self, blocks: Blocks) -> Int64Array:
        """(B,) blocks with the same number share one scale."""
        return blocks.groups

    def block_lengths(self, numel: int, ranks: int) -> list[int]:
        return equal_blocks(numel, 8 * -(-numel // (8 * ranks))) if numel else []

    def compress_(self, x: Tensor, residual: Tensor | None, parts: Sequence[Blocks], out: Sequence[Codes]) -> None:
        kernel = kernels.of("signs", x.device)
        if len(parts) == 1 and len(np.unique(self.scale_groups(parts[0]))) == len(parts[0]):
            kernel.compress_signs_(x, residual, parts[0], *out[0], squared=True)
            return
        squares = [torch.as_tensor(kernel.block_sums(x, residual, blocks, squared=True)).cpu() for blocks in parts]
        groups = np.concatenate([self.scale_groups(blocks) for blocks in parts])
        lengths = np.concatenate([blocks.lengths for blocks in parts])
        which, place = np.unique(groups, return_inverse=True)
        sums = torch.cat(squares).numpy()
        is_good = np.isfinite(sums)  # only the blocks that hold a NaN or an inf are marked, so that they can be named
        total = np.bincount(place, np.where(is_good, sums, 0.0), len(which))
        count = np.bincount(place, lengths, len(which))
        with np.errstate(over="ignore", invalid="ignore"):
            scale = np.sqrt(total / count).astype(np.float32)[place]
        scale = np.where(is_good & np.isfinite(scale), scale, np.float32(np.nan))
        of_block = np.split(scale, np.cumsum([len(blocks) for blocks in parts])[:-1])
        for blocks, (scales, bits), own in zip(parts, out, of_block, strict=True):
            scales.copy_(torch.from_numpy(own))
            kernel.compress_signs_(x, residual, blocks, scales, bits, squared=None)


@checked_dataclass
class ModelSign(TensorSign):
    """scale * sign(c) with one L2 scale for the whole model, as in DeepSpeed for its flat fp16 buffer and 1-bit LAMB.

    All buckets of a step travel as one. Workers have one scale, and the server of each rank one for all it serves: its chunk of every
    parameter. DeepSpeed's rank j serves the j-th part of the flat buffer, so that a parameter may have one server scale there.
    Parameters much smaller or larger than the rest are badly scaled unless they are pre-scaled (`equalising_factors`).
    """

    merges_buckets: ClassVar[bool] = True

    def scale_groups(self, blocks: Blocks) -> Int64Array:
        return np.zeros(len(blocks), dtype=np.int64)


def equalising_factors(flat: Tensor, index: ParameterIndex) -> Tensor:
    """(P,) f32 factors that bring all parameters to the same root mean square, the mean of theirs; 1 for parameters that are all zero.

    1-bit LAMB, arXiv:2104.06069: k_p = mean_q(s_q) / s_p with s_p = ||m_p||_2 / sqrt(n_p).
    """
    sizes = [
        float(index.view(flat, name).double().square().mean().sqrt()) if n else 0.0
        for name, n in zip(index.names, index.numels, strict=True)
    ]
    live = [s for s in sizes if s > 0]
    united = sum(live) / max(1, len(live))
    return torch.tensor([united / s if s > 0 else 1.0 for s in sizes], dtype=torch.float32, device=flat.device)


# by scale
SIGNS: Mapping[str, type[BlockSign]] = {"l1": BlockSign, "rms": RmsSign, "l2": TensorSign, "model": ModelSign}
