"""Sparse codecs on a GPU: counts, places and values stay there, and the messages of all ranks are read by one set of launches."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from commopt import kernels
from commopt.compress.base import Codes, Compressor, Tell
from commopt.wire.bucket import Blocks
from commopt.wire.payload import Layout, Payload, in_a_row
from commopt.wire.residual import Accumulated, Given, Moved, Residual

VALUE_DTYPES = {32: torch.float32, 16: torch.float16, 8: torch.int8, 1: torch.uint8}


@dataclass(frozen=True)
class Decoded:
    """The entries, places and values of messages of the same blocks, one message behind the other, on a GPU."""

    kernel: Any
    blocks: Blocks
    entries: Any
    indices: Tensor
    values: Tensor

    def add_(self, out: Tensor, *, alpha: float, add: bool) -> None:
        """out <- alpha * the sum of all values, or out + that; added message after message."""
        self.kernel.add_(self.indices, self.values, self.blocks, self.entries, out, alpha=alpha, add=add)

    def settle_(self, out: Tensor, given: Accumulated, *, alpha: float, cleared: int) -> None:
        """`add_`, and u <- what has been written of it; 0 where the message `cleared`, if there is one, has values that are not 0."""
        where = (self.indices, self.values, self.blocks, self.entries)
        self.kernel.add_(*where, out, alpha=alpha, add=False, given=given, cleared=cleared)


class Resident(Compressor):
    """What kernels of sparse codecs are given. A damaged message stands for NaN there: nobody asks the GPU whether it is sound."""

    value_bits: Any

    @abstractmethod
    def choose_there(
        self, kernel: Any, x: Tensor, residual: Tensor | Accumulated | None, blocks: Blocks, tell: Tell | None = None
    ) -> Any:
        """`choose` by the kernels: the entries, and what is chosen. tell: see `encode_payloads`."""

    @abstractmethod
    def entries_in(self, kernel: Any, messages: Sequence[Codes], blocks: Blocks) -> Any:
        """The entries of messages of the same blocks, by their sizes and counts."""

    def places_in(self, kernel: Any, codes: Tensor, blocks: Blocks, entries: Any) -> tuple[Tensor, Tensor]:
        """(K,) i64: the places that messages name; and (1,), 0 unless they name none."""
        return kernel.decoded(codes, entries)  # type: ignore[no-any-return]

    def compress_payloads_(
        self,
        x: Tensor,
        residual: Given,
        parts: Sequence[Blocks],
        payloads: Sequence[Payload],
        received: Sequence[Payload] = (),
    ) -> bool:
        assert not isinstance(residual, (Residual, Moved))
        if not kernels.has_triton(x.device):
            return super().compress_payloads_(x, residual, parts, payloads, received)
        headers = kernels.of("headers", x.device)
        first = headers.noted_in(payloads, received)
        for blocks, payload in zip(parts, payloads, strict=True):
            self.write_there(x, residual, blocks, payload.tensors[1:], first)
        headers.write_(first, payloads)
        return True

    def encode_payloads(
        self,
        x: Tensor,
        residual: Tensor | None,
        parts: Sequence[Blocks],
        received: Sequence[Payload] = (),
        tell: Tell | None = None,
    ) -> tuple[list[Payload], bool]:
        if not kernels.has_triton(x.device):
            return super().encode_payloads(x, residual, parts, received)
        kernel, headers = kernels.of("sparse", x.device), kernels.of("headers", x.device)
        chosen = [self.choose_there(kernel, x, residual, blocks, tell) for blocks in parts]
        payloads = in_a_row([((torch.int32, 1), *self.layout_there(entries)) for entries, _ in chosen], x.device)
        first = headers.noted_in(payloads, received)
        for payload, blocks, found in zip(payloads, parts, chosen, strict=True):
            self.code_there(kernel, found[0], found[1], residual, blocks, payload.tensors[1:], first)
        headers.write_(first, payloads)
        return payloads, True

    def add_up_(self, payloads: Sequence[Payload], blocks: Blocks, out: Tensor, *, alpha: float) -> None:
        if not kernels.has_triton(out.device):
            return super().add_up_(payloads, blocks, out, alpha=alpha)
        return self.decoded(payloads, blocks, out.device).add_(out, alpha=alpha, add=False)

    def decoded(self, payloads: Sequence[Payload], blocks: Blocks, device: torch.device) -> Decoded:
        """What messages of the same blocks hold, by kernels."""
        return self.read_there([payload.tensors[1:] for payload in payloads], blocks, device)

    def write_there(
        self,
        x: Tensor,
        residual: Tensor | Accumulated | None,
        blocks: Blocks,
        codes: Codes,
        first: Tensor | None = None,
    ) -> None:
        """`write_`; first: (1,) i32, the header where bad blocks are noted."""
        kernel = kernels.of("sparse", x.device)
        entries, chosen = self.choose_there(kernel, x, residual, blocks)
        values = residual.values if isinstance(residual, Accumulated) else residual
        self.code_there(kernel, entries, chosen, values, blocks, codes, first)

    def encode_there(self, x: Tensor, residual: Tensor | None, blocks: Blocks) -> list[Tensor]:
        """`encode` of counts; the host reads how many there are."""
        kernel = kernels.of("sparse", x.device)
        entries, chosen = self.choose_there(kernel, x, residual, blocks)
        codes = [torch.empty(n, dtype=dtype, device=x.device) for dtype, n in self.layout_there(entries)]
        self.code_there(kernel, entries, chosen, residual, blocks, codes, None)
        return codes

    def layout_there(self, entries: Any) -> Layout:
        """The layout of a message with counts."""
        values = entries.sign_bytes if self.value_bits == 1 else entries.count
        scales = () if self.value_bits == 32 else ((torch.float32, len(entries)),)
        codes = ((VALUE_DTYPES[self.value_bits], values), (torch.uint8, entries.code_bytes))
        return ((torch.int32, len(entries)), *scales, *codes)

    def code_there(
        self,
        kernel: Any,
        entries: Any,
        chosen: Any,
        residual: Tensor | None,
        blocks: Blocks,
        codes: Codes,
        first: Tensor | None,
    ) -> None:
        """Write the codes of what is chosen."""
        counts = codes[0] if self.is_ragged else None
        scales, values = codes[self.is_ragged], codes[self.is_ragged + (self.value_bits < 32)]
        notes = {"first": first, "counts": counts}
        kernel.code_(chosen, blocks, entries, residual, self.value_bits, scales, values, **notes)
        if not self.shares_keys:
            codes[-1].copy_(kernel.encoded(chosen.indices, entries))

    def read_there(self, messages: Sequence[Codes], blocks: Blocks, device: torch.device) -> Decoded:
        kernel = kernels.of("sparse", device)
        joined = messages[0] if len(messages) == 1 else [torch.cat(kind) for kind in zip(*messages, strict=True)]
        entries = self.entries_in(kernel, messages, blocks)
        indices, is_damaged = self.places_in(kernel, joined[-1], blocks, entries)
        scales, codes = joined[self.is_ragged], joined[self.is_ragged + (self.value_bits < 32)]
        values = kernel.values_of(codes, scales, entries, self.value_bits, is_damaged)
        return Decoded(kernel, blocks, entries, indices, values)
