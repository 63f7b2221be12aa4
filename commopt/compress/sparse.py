"""A few elements of each block, with their places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from commopt import kernels
from commopt.compress.base import Compressor, element_indices, equal_blocks
from commopt.compress.indices import all_index_bytes, decode_all, encode_all_
from commopt.errors import check_option
from commopt.wire import noise
from commopt.wire.bucket import Blocks, Int64Array
from commopt.wire.payload import Layout

_LEVELS = 127
_VALUE_DTYPES = {32: torch.float32, 16: torch.float16, 8: torch.int8, 1: torch.uint8}


@dataclass(frozen=True)
class Values:
    """How chosen values travel: as float32, or with one float32 scale per block as float16, int8 or signs.

    bits: 32, 16 (v / max|v|), 8 (127 v / max|v|, rounded) or 1 (the sign, times mean|v|). A bad block is marked by NaN:
    its values with 32 bits, its scale otherwise.
    """

    bits: int

    def sizes(self, ks: Int64Array) -> Int64Array:
        """(B,) elements that each block's values travel as."""
        return (ks + 7) // 8 if self.bits == 1 else ks

    def layout(self, ks: Int64Array) -> Layout:
        values = (_VALUE_DTYPES[self.bits], int(self.sizes(ks).sum()))
        return (values,) if self.bits == 32 else ((torch.float32, len(ks)), values)

    def encode(self, values: Tensor, ks: Int64Array, good: Tensor) -> list[Tensor]:
        """values: (sum ks,) f32; good: (B,) bool. The tensors of `layout`."""
        counts = torch.from_numpy(ks).to(values.device)
        if self.bits == 32:
            return [torch.where(good.repeat_interleave(counts), values, math.nan)]
        block = torch.arange(len(ks), device=values.device).repeat_interleave(counts)
        size = values.abs().nan_to_num(0.0, 0.0)
        if self.bits == 1:
            scales = torch.zeros(len(ks), dtype=torch.float64, device=values.device).index_add_(0, block, size.double())
            scales = (scales / counts.clamp(min=1)).float()
            unpacked = torch.zeros(int(self.sizes(ks).sum()) * 8, dtype=torch.uint8, device=values.device)
            unpacked[self._bit_places(ks, values.device)] = (values >= 0).to(torch.uint8)
            codes = (unpacked.view(-1, 8) << torch.arange(8, dtype=torch.uint8, device=values.device)).sum(1)
            codes = codes.to(torch.uint8)
        else:
            scales = torch.zeros(len(ks), device=values.device).scatter_reduce_(0, block, size, "amax")
            ratio = values / torch.where(scales > 0, scales, 1.0)[block]
            codes = ratio.half() if self.bits == 16 else (ratio.nan_to_num(0.0) * _LEVELS).round().to(torch.int8)
        return [torch.where(good, scales, math.nan), codes]

    def decode(self, codes: Sequence[Tensor], ks: Int64Array) -> Tensor:
        """(sum ks,) f32"""
        if self.bits == 32:
            return codes[0]
        scales, values = codes
        scales = scales.repeat_interleave(torch.from_numpy(ks).to(scales.device))
        if self.bits == 1:
            bits = (values.view(-1, 1) >> torch.arange(8, dtype=torch.uint8, device=values.device)) & 1
            return torch.where(bits.view(-1)[self._bit_places(ks, values.device)].bool(), scales, -scales)
        return values.float() * (scales if self.bits == 16 else scales / _LEVELS)

    def is_bad(self, codes: Sequence[Tensor], ks: Int64Array) -> Tensor:
        if self.bits != 32:
            return ~codes[0].isfinite()
        block = torch.arange(len(ks), device=codes[0].device).repeat_interleave(
            torch.from_numpy(ks).to(codes[0].device)
        )
        bad = torch.zeros(len(ks), dtype=torch.int64, device=codes[0].device)
        return bad.index_add_(0, block, (~codes[0].isfinite()).long()).ne(0)

    def _bit_places(self, ks: Int64Array, device: torch.device) -> Tensor:
        first = np.cumsum(self.sizes(ks)) - self.sizes(ks)
        within = np.arange(int(ks.sum())) - np.repeat(np.cumsum(ks) - ks, ks)
        return torch.from_numpy(np.repeat(first * 8, ks) + within).to(device)


@dataclass(frozen=True)
class _Sparse(Compressor):
    """What the sparse codecs share: some elements of each block, the rest stays in the residual.

    value_bits: 32, 16, 8 or 1 for each value; what rounding loses stays in the residual.
    block_size: a multiple of 8, or None for whole parameters.
    """

    value_bits: int = 16
    block_size: int | None = None

    def __post_init__(self) -> None:
        check_option("value_bits", self.value_bits, lambda x: x in _VALUE_DTYPES, "32, 16, 8 or 1")
        wanted = "a positive multiple of 8, or leave it out for whole parameters"
        check_option("block_size", self.block_size or 8, lambda x: x > 0 and x % 8 == 0, wanted)

    @property
    def values(self) -> Values:
        return Values(self.value_bits)

    def block_lengths(self, numel: int, ranks: int) -> list[int]:
        return equal_blocks(numel, self.block_size or max(1, numel))


@dataclass(frozen=True)
class TopK(_Sparse):
    """The share `density` of each block with the largest magnitudes, at least one element; the choice is exact.

    Aji and Heafield 2017, arXiv:1704.05021; Stich et al. 2018, arXiv:1809.07599: a contraction with delta >= density.
    A sample of each block gives a threshold that leaves few candidates (Lin et al. 2018, arXiv:1712.01887, section 3.1), among
    which the exact cut is made; where the sample misleads, among all. Of equal magnitudes the first is taken.
    Payload: scales (B,) f32 unless value_bits is 32, values, and the Elias-Fano code of the places (`compress/indices.py`).
    """

    density: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_option("density", self.density, lambda x: 0 < x <= 1, "a number above 0, at most 1")

    def ks(self, blocks: Blocks) -> Int64Array:
        """(B,) how many elements of each block travel."""
        return np.asarray(np.ceil(self.density * blocks.lengths * (1 - 1e-12)), dtype=np.int64)

    def layout(self, blocks: Blocks) -> Layout:
        ks = self.ks(blocks)
        return (*self.values.layout(ks), (torch.uint8, int(all_index_bytes(blocks.lengths, ks).sum())))

    def compress_(
        self, x: Tensor, residual: Tensor | None, parts: Sequence[Blocks], out: Sequence[Sequence[Tensor]]
    ) -> None:
        for blocks, codes in zip(parts, out, strict=True):
            ks = self.ks(blocks)
            indices, values, good = kernels.of("select", x.device).select_(x, residual, blocks, ks)
            is_good = torch.from_numpy(good).to(x.device)
            for target, code in zip(codes, self.values.encode(values, ks, is_good), strict=False):
                target.copy_(code)
            encode_all_(indices, blocks.lengths, ks, codes[-1])
            if residual is not None:
                _keep_rest(residual, blocks, ks, indices, self.values.decode(codes[:-1], ks), is_good)

    def decompress_(
        self, codes: Sequence[Tensor], blocks: Blocks, out: Tensor, *, alpha: float = 1.0, add: bool = False
    ) -> None:
        ks = self.ks(blocks)
        indices = decode_all(codes[-1], blocks.lengths, ks)
        _put(self.values.decode(codes[:-1], ks) * alpha, indices, ks, blocks, out, add=add)

    def is_bad(self, codes: Sequence[Tensor], blocks: Blocks) -> Tensor:
        return self.values.is_bad(codes[:-1], self.ks(blocks))


@dataclass(frozen=True)
class RandomK(_Sparse):
    """The share `density` of each block at random places that all ranks draw alike, so that they never travel.

    Stich et al. 2018, arXiv:1809.07599. Of each n/k consecutive elements one is taken, uniformly: the chance of an element is k/n,
    but for the rounding of n/k. With `is_unbiased` values are multiplied by n/k, for use without error feedback.
    Payload: as `TopK`, without the places.
    """

    shares_keys: ClassVar[bool] = True
    density: float = 0.01
    is_unbiased: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_option("density", self.density, lambda x: 0 < x <= 1, "a number above 0, at most 1")

    @property
    def is_stochastic(self) -> bool:
        return True

    def ks(self, blocks: Blocks) -> Int64Array:
        """(B,) how many elements of each block travel."""
        return np.asarray(np.ceil(self.density * blocks.lengths * (1 - 1e-12)), dtype=np.int64)

    def places(self, blocks: Blocks) -> tuple[Int64Array, Int64Array]:
        """(sum ks,) ascending places in each block, and (sum ks,) out of how many each was drawn."""
        ks = self.ks(blocks)
        keys = np.zeros(len(blocks), np.uint64) if blocks.keys is None else blocks.keys
        n, k = np.repeat(blocks.lengths, ks), np.repeat(ks, ks)
        j = np.arange(len(k)) - np.repeat(np.cumsum(ks) - ks, ks)
        first, end = j * n // k, (j + 1) * n // k
        drawn = (noise.bits(keys, ks) >> np.uint64(32)) * (end - first).astype(np.uint64) >> np.uint64(32)
        return first + drawn.astype(np.int64), end - first

    def layout(self, blocks: Blocks) -> Layout:
        return self.values.layout(self.ks(blocks))

    def compress_(
        self, x: Tensor, residual: Tensor | None, parts: Sequence[Blocks], out: Sequence[Sequence[Tensor]]
    ) -> None:
        for blocks, codes in zip(parts, out, strict=True):
            ks, (places, drawn_from) = self.ks(blocks), self.places(blocks)
            c = x[element_indices(blocks.starts, blocks.lengths, x.device)]
            homes = element_indices(blocks.homes, blocks.lengths, x.device)
            if residual is not None:
                c += residual[homes]
            block = _block_of(blocks.lengths, x.device)
            bad = torch.zeros(len(blocks), dtype=torch.int64, device=x.device)
            good = bad.index_add_(0, block, (~c.isfinite()).long()).eq(0)
            indices = torch.from_numpy(places).to(x.device)
            own = indices + torch.from_numpy(np.repeat(np.cumsum(blocks.lengths) - blocks.lengths, ks)).to(x.device)
            values = c[own] * torch.from_numpy(drawn_from).to(x.device) if self.is_unbiased else c[own]
            for target, code in zip(codes, self.values.encode(values, ks, good), strict=True):
                target.copy_(code)
            if residual is not None:
                residual[homes] = torch.where(good[block], c, residual[homes])
                _keep_rest(residual, blocks, ks, indices, self.values.decode(codes, ks), good)

    def decompress_(
        self, codes: Sequence[Tensor], blocks: Blocks, out: Tensor, *, alpha: float = 1.0, add: bool = False
    ) -> None:
        ks, indices = self.ks(blocks), torch.from_numpy(self.places(blocks)[0]).to(out.device)
        _put(self.values.decode(codes, ks) * alpha, indices, ks, blocks, out, add=add)

    def is_bad(self, codes: Sequence[Tensor], blocks: Blocks) -> Tensor:
        return self.values.is_bad(codes, self.ks(blocks))


@dataclass(frozen=True)
class Threshold(_Sparse):
    """Every element whose magnitude reaches `threshold`: how much travels is the gradient's business.

    Strom 2015 (with error feedback). Payload: counts (B,) i32, then as `TopK`. Lengths travel first.
    """

    is_ragged: ClassVar[bool] = True
    threshold: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_option("threshold", self.threshold, lambda x: 0 < x < math.inf, "a number above 0")

    def layout(self, blocks: Blocks) -> Layout:
        raise NotImplementedError("a threshold's payload has no length beforehand")

    def encode(self, x: Tensor, residual: Tensor | None, blocks: Blocks) -> Sequence[Tensor]:
        ks = np.zeros(len(blocks), dtype=np.int64)
        indices, values, good = kernels.of("select", x.device).select_(
            x, residual, blocks, ks, threshold=self.threshold
        )
        is_good = torch.from_numpy(good).to(x.device)
        codes = self.values.encode(values, ks, is_good)
        places = torch.empty(int(all_index_bytes(blocks.lengths, ks).sum()), dtype=torch.uint8, device=x.device)
        encode_all_(indices, blocks.lengths, ks, places)
        if residual is not None:
            _keep_rest(residual, blocks, ks, indices, self.values.decode(codes, ks), is_good)
        marked = torch.where(is_good, torch.from_numpy(ks).to(x.device), -1 - torch.from_numpy(ks).to(x.device))
        return [marked.int(), *codes, places]

    def compress_(
        self, x: Tensor, residual: Tensor | None, parts: Sequence[Blocks], out: Sequence[Sequence[Tensor]]
    ) -> None:
        raise NotImplementedError("a threshold's payload has no length beforehand; use encode")

    def decompress_(
        self, codes: Sequence[Tensor], blocks: Blocks, out: Tensor, *, alpha: float = 1.0, add: bool = False
    ) -> None:
        marked = codes[0].cpu().numpy().astype(np.int64)
        ks = np.where(marked >= 0, marked, -1 - marked)
        indices = decode_all(codes[-1], blocks.lengths, ks)
        _put(self.values.decode(codes[1:-1], ks) * alpha, indices, ks, blocks, out, add=add)

    def is_bad(self, codes: Sequence[Tensor], blocks: Blocks) -> Tensor:
        return codes[0] < 0


def _block_of(lengths: Int64Array, device: torch.device) -> Tensor:
    return torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(device)


def _element_places(starts: Int64Array, ks: Int64Array, indices: Tensor) -> Tensor:
    return indices + torch.from_numpy(np.repeat(starts, ks)).to(indices.device)


def _keep_rest(residual: Tensor, blocks: Blocks, ks: Int64Array, indices: Tensor, sent: Tensor, good: Tensor) -> None:
    """residual <- residual - sent at the chosen places of good blocks."""
    chosen = good.repeat_interleave(torch.from_numpy(ks).to(good.device))
    places = _element_places(blocks.homes, ks, indices)[chosen]
    residual[places] -= sent[chosen]


def _put(values: Tensor, indices: Tensor, ks: Int64Array, blocks: Blocks, out: Tensor, *, add: bool) -> None:
    if not add:
        for start, n in zip(blocks.starts.tolist(), blocks.lengths.tolist(), strict=True):
            out[start : start + n] = 0
    places = _element_places(blocks.starts, ks, indices)  # no two are equal
    out[places] += values
