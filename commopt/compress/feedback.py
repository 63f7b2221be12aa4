"""Error feedback: what a compressor left out of this message is added to the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from commopt.compress.base import Compressor
from commopt.kernels.reference.runs import corrected, element_indices, first_bad, keep_rest_, run_of_element
from commopt.wire import noise
from commopt.wire.bucket import Blocks, Int64Array
from commopt.wire.payload import Layout, Payload, in_a_row

HEADER: Layout = ((torch.int32, 1),)  # of every payload: the first parameter that is not finite, or -1
_STORED_AS = {32: torch.float32, 16: torch.bfloat16, 8: torch.int8}


@dataclass(frozen=True)
class Kept:
    """How the residual is kept, which is what messages left out.

    bits: 32, 16 (bfloat16) or 8 for each element of the residual; 0 for no residual. decay: its factor from step to step.
    average: LoCo's moving average. reset_every: forget it after this many exchanges; never if None. contracts: what messages leave
    out comes again, so that codecs must leave out less than there was (`Compressor.fit_`); else they are to be unbiased.
    """

    bits: int = 32
    decay: float = 1.0
    average: float = 0.0
    reset_every: int | None = None
    contracts: bool = True

    @property
    def dtype(self) -> torch.dtype:
        return _STORED_AS.get(self.bits, torch.float32)


NOTHING_KEPT = Kept(bits=0, contracts=False)


class ErrorFeedback:
    """A compressor and the residual of what it has not sent yet, e <- (x + decay e) - decompressed.

    Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847. `decay` below 1 and 8-bit storage are LoCo's
    (Xie et al. 2024, arXiv:2407.04480), as is forgetting the residual from time to time, which the caller does (`clear`).
    residual: (elements,) f32, bf16 or i8, laid out by the blocks' homes. In 8 bits every block has a scale of
    its own, max |e| / 127, and is rounded stochastically; with 0 bits there is no residual.
    Each payload starts with an int32: the index of the first parameter with a non-finite value in any of the message's
    blocks, or -1.

    kept: with `average` e <- average e + (1 - average) (x + decay e - decompressed), instead of the last error alone.
    blocks: every block that this side will ever compress. residual, scales: the storage; allocated if None.
    """

    def __init__(
        self,
        compressor: Compressor,
        kept: Kept,
        blocks: Blocks,
        device: torch.device | str = "cpu",
        *,
        residual: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> None:
        self.compressor, self.kept, self.bits = compressor, kept, kept.bits
        self._homes: Int64Array = np.sort(blocks.homes) if kept.bits == 8 else np.zeros(0, np.int64)
        if residual is None:
            elements = int((blocks.homes + blocks.lengths).max()) if kept.bits and len(blocks) else 0
            residual = torch.zeros(elements, dtype=kept.dtype, device=device)
        if scales is None:
            scales = torch.zeros(len(self._homes), device=device, dtype=torch.float32)
        self.residual, self.scales = residual, scales
        self._before: list[tuple[Tensor, Tensor]] = []

    def compress(self, x: Tensor, parts: Sequence[Blocks], received: Sequence[Payload] = ()) -> list[Payload]:
        """The payloads of x + residual, one for each of `parts`; x is left as it is.

        received: messages that x has been made of. On a GPU, where nobody has read their headers, these ones carry on what they say.
        """
        if self.bits == 0 or (self.bits == 32 and self.kept.decay == 1.0 and self.kept.average == 0.0):
            return self._encode(x, self.residual if self.bits else None, parts, received)
        return self._encode_with_copy(x, parts, received)

    def undo(self, x: Tensor, payloads: Sequence[Payload], parts: Sequence[Blocks]) -> None:
        """Undo the last `compress` of x: e <- (e + decompressed) - x in good blocks, exact to about one ulp.

        If the residual is decayed, averaged or stored in fewer than 32 bits, it is restored from a copy, exactly.
        """
        if self.bits == 0:
            return
        if self._before:
            for blocks, (stored, scales) in zip(parts, self._before, strict=True):
                self.residual[self._places(blocks)] = stored
                if self.bits == 8:
                    self.scales[self._slots(blocks)] = scales
            self._before = []
            return
        for payload, blocks in zip(payloads, parts, strict=True):
            sent, codes = torch.zeros_like(x), payload.tensors[1:]
            self.compressor.decompress_(codes, blocks, sent)
            before = corrected(sent, self.residual, blocks) - corrected(x, None, blocks)
            keep_rest_(self.residual, before, ~self.compressor.is_bad(codes, blocks), blocks)

    def values(self, blocks: Blocks) -> Tensor:
        """(elements of blocks,) f32: the residual of some blocks, end to end."""
        stored = self.residual[self._places(blocks)].float()
        if self.bits != 8:
            return stored
        return stored * self.scales[self._slots(blocks)][run_of_element(blocks.lengths, stored.device)]

    def set_values(self, values: Tensor, blocks: Blocks) -> None:
        """Overwrite the residual of some blocks; `values` as `values()` gives them."""
        if self.bits == 8:
            per_element = run_of_element(blocks.lengths, values.device)
            largest = values.new_zeros(len(blocks))
            scales = largest.scatter_reduce_(0, per_element, values.abs(), "amax") / 127
            steps = torch.where(scales > 0, 1 / scales, 0.0).nan_to_num(0.0, 0.0, 0.0)[per_element]
            round_up: Tensor | float = 0.5
            if blocks.keys is not None:
                round_up = noise.uniform(noise.mix(blocks.keys), blocks.lengths, values.device)
            values = (values * steps + round_up).floor().clamp(-127, 127)
            self.scales[self._slots(blocks)] = scales
        self.residual[self._places(blocks)] = values.to(self.residual.dtype)

    def clear(self, blocks: Blocks) -> None:
        self.residual[self._places(blocks)] = 0

    def dense(self, state: Mapping[str, Tensor], name: str, blocks: Blocks) -> Tensor:
        """(elements of blocks,) f32: the saved residual `name`, of this rank or another."""
        stored = {key: x.to(self.residual.device) for key, x in state.items() if key.startswith(name)}
        residual, scales = stored[name], stored.get(f"{name}_scales")
        return ErrorFeedback(self.compressor, self.kept, blocks, residual=residual, scales=scales).values(blocks)

    def _encode(
        self, x: Tensor, residual: Tensor | None, parts: Sequence[Blocks], received: Sequence[Payload]
    ) -> list[Payload]:
        has_headers = False
        if self.compressor.is_ragged:
            messages = [self.compressor.encode(x, residual, blocks) for blocks in parts]
            layouts = [HEADER + tuple((code.dtype, code.numel()) for code in codes) for codes in messages]
            payloads = in_a_row(layouts, x.device)
            for payload, codes in zip(payloads, messages, strict=True):
                for view, code in zip(payload.tensors[1:], codes, strict=True):
                    view.copy_(code)
            has_headers = self.compressor.note_headers_(payloads, parts, received)
        else:
            payloads = in_a_row([HEADER + self.compressor.layout(blocks) for blocks in parts], x.device)
            has_headers = self.compressor.compress_payloads_(x, residual, parts, payloads, received)
            for payload, blocks in zip(payloads, parts, strict=True) if self.kept.contracts else ():
                self.compressor.fit_(payload.tensors[1:], x, residual, blocks)
        if not has_headers:
            own = zip(payloads, parts, strict=True)
            found = [first_bad(self.compressor.is_bad(payload.tensors[1:], blocks), blocks) for payload, blocks in own]
            first = first_of([*found, first_bad_parameter(received)])
            for payload in payloads:
                payload.tensors[0].fill_(first)
        return payloads

    def _encode_with_copy(self, x: Tensor, parts: Sequence[Blocks], received: Sequence[Payload]) -> list[Payload]:
        """Compress with the residual as float32; keep a copy of what is stored, for `undo`."""
        self._before = [
            (self.residual[self._places(blocks)], self.scales[self._slots(blocks)] if self.bits == 8 else self.scales)
            for blocks in parts
        ]
        ends = np.cumsum([0, *(blocks.elements for blocks in parts)])
        before = torch.cat([self.values(blocks) for blocks in parts])
        residual = before * self.kept.decay
        moved = [
            blocks.having(homes=start + np.cumsum(blocks.lengths) - blocks.lengths)
            for blocks, start in zip(parts, ends, strict=False)
        ]
        payloads = self._encode(x, residual, moved, received)
        residual.lerp_(before, self.kept.average)
        for payload, blocks, part in zip(payloads, parts, torch.split(residual, np.diff(ends).tolist()), strict=True):
            if not bool(self.compressor.is_bad(payload.tensors[1:], blocks).any()):  # else void: it is undone
                self.set_values(part, blocks)
        return payloads

    def _places(self, blocks: Blocks) -> Tensor:
        return element_indices(blocks.homes, blocks.lengths, self.residual.device)

    def _slots(self, blocks: Blocks) -> Tensor:
        return torch.from_numpy(np.searchsorted(self._homes, blocks.homes)).to(self.residual.device)


def first_bad_parameter(payloads: Sequence[Payload]) -> int:
    """The index of the first bad parameter in the headers of messages, or -1; equal on all ranks that read the same messages."""
    return first_of(torch.cat([payload.tensors[0] for payload in payloads]).tolist()) if payloads else -1


def first_of(found: Iterable[int]) -> int:
    """The lowest index of a bad parameter, or -1 if all are -1."""
    return min((k for k in found if k >= 0), default=-1)
