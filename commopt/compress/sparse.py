"""A few elements of each block, with their places."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from commopt import kernels
from commopt.compress.base import Codes, Tell
from commopt.compress.indices import all_index_bytes, decode_all, encode_all
from commopt.compress.resident import VALUE_DTYPES, Resident
from commopt.kernels.reference import runs
from commopt.options import BlockSize, Flag, Positive, Share, checked_dataclass
from commopt.wire import noise
from commopt.wire.bucket import Blocks, Int64Array
from commopt.wire.payload import Layout, Payload
from commopt.wire.residual import Accumulated

_LEVELS = 127
_Chosen = tuple[Int64Array, Tensor, Tensor, Tensor]


@checked_dataclass
class _Sparse(Resident):
    """What the sparse codecs share: some elements of each block, the rest stays in the residual.

    value_bits: 32 for float32, or with one float32 scale per block 16 (v / max|v|), 8 (127 v / max|v|, rounded) or 1 (the sign,
    times mean|v|); what rounding loses stays in the residual. A bad block is marked by NaN: its values with 32 bits, else its scale.
    block_size: a multiple of 8, or None for whole parameters.
    """

    value_bits: Literal[32, 16, 8, 1] = 16
    block_size: BlockSize | None = None

    @abstractmethod
    def choose(self, x: Tensor, residual: Tensor | None, blocks: Blocks) -> _Chosen:
        """Choose the elements of c = x + residual to send; residual <- c in good blocks.

        Returns ks (B,), how many of each block; (sum ks,) i64 their indices within their blocks; their values; and (B,) bool good.
        """

    @abstractmethod
    def ks_of(self, codes: Codes, blocks: Blocks) -> Int64Array:
        """(B,) how many elements of each block a message holds."""

    def places_of(self, codes: Codes, blocks: Blocks, ks: Int64Array) -> Tensor:
        """(sum ks,) i64: the places that a message names."""
        return decode_all(codes[-1], blocks.lengths, ks)

    def encode(self, x: Tensor, residual: Tensor | None, blocks: Blocks) -> list[Tensor]:
        if self.is_ragged and kernels.has_triton(x.device):
            return self.encode_there(x, residual, blocks)
        ks, indices, values, good = self.choose(x, residual, blocks)
        codes = self.encode_values(values, ks, good)
        if residual is not None:
            sent = self.decode_values(codes, ks)
            kernels.of("select", x.device).add_(indices, *sent, blocks.homes, ks, residual, alpha=-1.0, good=good)
        if not self.shares_keys:
            codes.append(encode_all(indices, blocks.lengths, ks))
        if self.is_ragged:
            counts = torch.from_numpy(ks).to(x.device)
            codes.insert(0, torch.where(good, counts, -1 - counts).int())
        return codes

    def write_(self, x: Tensor, residual: Tensor | None, blocks: Blocks, codes: Codes) -> None:
        if kernels.has_triton(x.device):
            return self.write_there(x, residual, blocks, codes)
        for target, code in zip(codes, self.encode(x, residual, blocks), strict=True):
            target.copy_(code)
        return None

    def decompress_(self, codes: Codes, blocks: Blocks, out: Tensor, *, alpha: float = 1.0, add: bool = False) -> None:
        if kernels.has_triton(out.device):
            return self.read_there([codes], blocks, out.device).add_(out, alpha=alpha, add=add)
        ks = self.ks_of(codes, blocks)
        codes = codes[1:] if self.is_ragged else codes
        _check(codes, self.layout_of(blocks, ks))
        indices = self.places_of(codes, blocks, ks)
        if not add:
            for start, n in zip(blocks.starts.tolist(), blocks.lengths.tolist(), strict=True):
                out[start : start + n] = 0
        kernels.of("select", out.device).add_(
            indices, *self.decode_values(codes, ks), blocks.starts, ks, out, alpha=alpha
        )
        return None

    def forget_sent_(self, payload: Payload, blocks: Blocks, x: Tensor) -> None:
        """x <- 0, at the blocks' starts, where a message has values that are not 0."""
        codes = payload.tensors[1:]
        ks = self.ks_of(codes, blocks)
        codes = codes[1:] if self.is_ragged else codes
        values, factors = self.decode_values(codes, ks)
        block = runs.run_of_element(ks, x.device)
        places = runs.places_in(blocks.starts, ks, self.places_of(codes, blocks, ks))
        x[places[(values * factors[block]).ne(0)]] *= 0

    def layout_of(self, blocks: Blocks, ks: Int64Array) -> Layout:
        """The layout of a message of ks elements of each block, apart from its counts."""
        scales = () if self.value_bits == 32 else ((torch.float32, len(ks)),)
        values = (VALUE_DTYPES[self.value_bits], int((ks if self.value_bits > 1 else (ks + 7) // 8).sum()))
        places = () if self.shares_keys else ((torch.uint8, int(all_index_bytes(blocks.lengths, ks).sum())),)
        return (*scales, values, *places)

    def encode_values(self, values: Tensor, ks: Int64Array, good: Tensor) -> list[Tensor]:
        """values: (sum ks,) f32; good: (B,) bool. Scales, unless value_bits is 32, and codes."""
        counts = torch.from_numpy(ks).to(values.device)
        if self.value_bits == 32:
            return [torch.where(good.repeat_interleave(counts), values, math.nan)]
        if self.value_bits == 1:
            sizes, block = values.abs().nan_to_num(0.0, 0.0).double(), runs.run_of_element(ks, values.device)
            scales = torch.zeros(len(ks), dtype=torch.float64, device=values.device).index_add_(0, block, sizes)
            scales = (scales / counts.clamp(min=1)).float()
            codes = runs.packed(values >= 0, ks, lowest=True)
        else:
            scales, ratio = kernels.of("select", values.device).ratios(values, ks)
            codes = ratio.half() if self.value_bits == 16 else (ratio.nan_to_num(0.0) * _LEVELS).round().to(torch.int8)
        return [torch.where(good, scales, math.nan), codes]

    def decode_values(self, codes: Codes, ks: Int64Array) -> tuple[Tensor, Tensor]:
        """(sum ks,) f32 values, and (B,) f32 what to multiply those of each block with."""
        if self.value_bits == 32:
            return codes[0], codes[0].new_ones(len(ks))
        scales, values = codes[:2]
        if self.value_bits == 1:
            return runs.unpacked(values, ks, lowest=True).float() * 2 - 1, scales
        return values.float(), scales if self.value_bits == 16 else scales / _LEVELS


@checked_dataclass
class _Density(_Sparse):
    """A share of each block, at least one element: sizes are known beforehand."""

    density: Share = 0.01

    def ks(self, blocks: Blocks) -> Int64Array:
        """(B,) how many elements of each block are sent."""
        return np.asarray(np.ceil(self.density * blocks.lengths * (1 - 1e-12)), dtype=np.int64)

    def ks_of(self, codes: Codes, blocks: Blocks) -> Int64Array:
        return self.ks(blocks)

    def layout(self, blocks: Blocks) -> Layout:
        return self.layout_of(blocks, self.ks(blocks))

    def is_bad(self, codes: Codes, blocks: Blocks) -> Tensor:
        if self.value_bits < 32:
            return super().is_bad(codes, blocks)
        if kernels.has_triton(codes[0].device):  # all values of a bad block are NaN
            entries = self.entries(kernels.of("sparse", codes[0].device), blocks, codes[0].device)
            return ~codes[0][entries.ends - entries.ks].isfinite() if entries.count else entries.ks.bool()
        return runs.bad_runs(codes[0], self.ks(blocks))

    def entries(self, kernel: Any, blocks: Blocks, device: torch.device, messages: int = 1) -> Any:
        """The entries of one message or more, on a GPU: a table that is made once."""

        def sizes() -> tuple[Int64Array, int]:
            ks = self.ks(blocks)
            return ks, int(all_index_bytes(blocks.lengths, ks).sum())

        return kernel.Entries.known(blocks, self.density, sizes, device, messages)

    def entries_in(self, kernel: Any, messages: Sequence[Codes], blocks: Blocks) -> Any:
        for codes in messages:
            _check(codes, self.layout(blocks))
        return self.entries(kernel, blocks, messages[0][0].device, len(messages))


@checked_dataclass
class TopK(_Density):
    """The share `density` of each block with the largest magnitudes, at least one element; the choice is exact.

    Aji and Heafield 2017, arXiv:1704.05021; Stich et al. 2018, arXiv:1809.07599: a contraction with delta >= density.
    A sample of each block gives a threshold that leaves few candidates (Lin et al. 2018, arXiv:1712.01887, section 3.1), among
    which the exact cut is made, or among all if the sample was misleading. The first of equal magnitudes is taken.
    Payload: scales (B,) f32 unless value_bits is 32, values, and the Elias-Fano code of the places (`compress/indices.py`).
    """

    def choose(self, x: Tensor, residual: Tensor | None, blocks: Blocks) -> _Chosen:
        return _largest(x, residual, blocks, self.ks(blocks))

    def choose_there(
        self, kernel: Any, x: Tensor, residual: Tensor | Accumulated | None, blocks: Blocks, tell: Tell | None = None
    ) -> Any:
        entries = self.entries(kernel, blocks, x.device)
        return entries, kernel.largest_(x, residual, blocks, entries)


@checked_dataclass
class RandomK(_Density):
    """The share `density` of each block at random places that all ranks draw alike, and that are never sent.

    Stich et al. 2018, arXiv:1809.07599. Of each n/k consecutive elements one is taken, uniformly: the chance of an element is k/n,
    but for the rounding of n/k. With `is_unbiased` values are multiplied by n/k, for use without error feedback.
    Payload: as `TopK`, without the places.
    """

    shares_keys: ClassVar[bool] = True
    stochastic = True
    is_unbiased: Flag = False

    def places(self, blocks: Blocks) -> tuple[Int64Array, Int64Array]:
        """(sum ks,) ascending places in each block, and (sum ks,) out of how many each was drawn."""
        ks = self.ks(blocks)
        keys = np.zeros(len(blocks), np.uint64) if blocks.keys is None else blocks.keys
        n, k = np.repeat(blocks.lengths, ks), np.repeat(ks, ks)
        j = np.arange(len(k)) - np.repeat(np.cumsum(ks) - ks, ks)
        first, end = j * n // k, (j + 1) * n // k
        drawn = (noise.bits(keys, ks) >> np.uint64(32)) * (end - first).astype(np.uint64) >> np.uint64(32)
        return first + drawn.astype(np.int64), end - first

    def choose(self, x: Tensor, residual: Tensor | None, blocks: Blocks) -> _Chosen:
        ks, (places, drawn_from) = self.ks(blocks), self.places(blocks)
        indices = torch.from_numpy(places).to(x.device)
        values, good = kernels.of("select", x.device).take_(x, residual, blocks, ks, indices)
        if self.is_unbiased:
            values = values * torch.from_numpy(drawn_from).to(x.device)
        return ks, indices, values, good

    def choose_there(
        self, kernel: Any, x: Tensor, residual: Tensor | Accumulated | None, blocks: Blocks, tell: Tell | None = None
    ) -> Any:
        entries = self.entries(kernel, blocks, x.device)
        return entries, kernel.drawn_(x, residual, blocks, entries, self.is_unbiased)

    def places_in(self, kernel: Any, codes: Tensor, blocks: Blocks, entries: Any) -> tuple[Tensor, Tensor]:
        return kernel.draw(blocks, entries), torch.zeros(1, dtype=torch.int64, device=codes.device)

    def places_of(self, codes: Codes, blocks: Blocks, ks: Int64Array) -> Tensor:
        return torch.from_numpy(self.places(blocks)[0]).to(codes[0].device)


@checked_dataclass
class Threshold(_Sparse):
    """Every element whose magnitude reaches `threshold`; the gradient decides how many are sent.

    Strom 2015 (with error feedback). Payload: counts (B,) i32, then as `TopK`. Lengths travel first.
    """

    is_ragged: ClassVar[bool] = True
    threshold: Positive = 0.01

    def layout(self, blocks: Blocks) -> Layout:
        raise NotImplementedError("the size of a threshold's payload is not known beforehand; use encode")

    def choose(self, x: Tensor, residual: Tensor | None, blocks: Blocks) -> _Chosen:
        return _largest(x, residual, blocks, np.zeros(len(blocks), dtype=np.int64), self.threshold)

    def choose_there(
        self, kernel: Any, x: Tensor, residual: Tensor | Accumulated | None, blocks: Blocks, tell: Tell | None = None
    ) -> Any:
        def sizes(noted: Tensor, table: Tensor) -> tuple[int, int, int]:
            assert tell is not None
            fixed = noted.new_full((1 if self.value_bits == 32 else 2,), len(blocks))  # counts, and scales
            ends = table[:3, -1:] if len(blocks) else noted.new_zeros(3, 1)
            return self._totals(*tell(torch.cat([noted, fixed, ends[0 if self.value_bits > 1 else 2], ends[1]]))[-2:])

        return kernel.reaching_(x, residual, blocks, self.threshold, sizes if tell else None)

    def entries_in(self, kernel: Any, messages: Sequence[Codes], blocks: Blocks) -> Any:
        for codes in messages:
            if [code.dtype for code in codes[1:]] != [dtype for dtype, _ in self.layout_of(blocks, 0 * blocks.lengths)]:
                raise ValueError("these codes are of another kind")
        counts = torch.cat([codes[0] for codes in messages])
        values, places = (sum(codes[k].numel() for codes in messages) for k in (-2, -1))
        return kernel.Entries.of(counts, kernel.lengths_of(blocks, counts.device), self._totals(values, places))

    def _totals(self, values: int, places: int) -> tuple[int, int, int]:
        """`Entries`' totals by the bytes of places and the number of codes; if these are bits, a bound of the entries."""
        return (values, places, 0) if self.value_bits > 1 else (8 * values, places, values)

    def ks_of(self, codes: Codes, blocks: Blocks) -> Int64Array:
        marked = codes[0].cpu().numpy().astype(np.int64)
        return np.where(marked >= 0, marked, -1 - marked)

    def is_bad(self, codes: Codes, blocks: Blocks) -> Tensor:
        return codes[0] < 0


def _check(codes: Codes, layout: Layout) -> None:
    if tuple((x.dtype, x.numel()) for x in codes) != layout:
        raise ValueError("these codes do not fit their counts: they are damaged, or of other blocks")


def _largest(x: Tensor, residual: Tensor | None, blocks: Blocks, ks: Int64Array, threshold: float = 0.0) -> _Chosen:
    return ks, *kernels.of("select", x.device).select_(x, residual, blocks, ks, threshold)
