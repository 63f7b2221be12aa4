"""Error feedback: what a compressor left out of this message is added to the next."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from commopt import kernels
from commopt.compress.base import Compressor, Tell
from commopt.kernels.reference.runs import corrected, element_indices, first_bad, keep_rest_, run_of_element
from commopt.wire import noise
from commopt.wire.bucket import Blocks, Bucket, Int64Array, ParameterIndex
from commopt.wire.payload import Bundle, Layout, Payload, in_a_row
from commopt.wire.residual import Accumulated, Given, Moved, Residual, end_to_end, once

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
        homes: Int64Array = np.sort(blocks.homes) if kept.bits == 8 else np.zeros(0, np.int64)
        if residual is None:
            elements = int((blocks.homes + blocks.lengths).max()) if kept.bits and len(blocks) else 0
            residual = torch.zeros(elements, dtype=kept.dtype, device=device)
        if scales is None:
            scales = torch.zeros(len(homes), device=device, dtype=torch.float32)
        self.residual, self.scales = residual, scales
        self._stored = Residual(residual, scales, homes, kept.decay, kept.average)

    def compress(
        self,
        x: Tensor,
        parts: Sequence[Blocks],
        received: Sequence[Payload] = (),
        moved: Moved | Accumulated | Tensor | None = None,
        room: int = 0,
        tell: Tell | None = None,
    ) -> list[Payload]:
        """The payloads of x + residual, one for each of `parts`; x is left as it is.

        received: messages that x has been made of. On a GPU, where nobody has read their headers, these ones carry on what they say.
        moved: how c is made of the given values while they are compressed, for compressors that take it; or a tensor in the residual's
        place. room: bytes of the payloads' row, if it is to be padded. tell: see `Compressor.encode_payloads`.
        """
        if self.bits == 0 or self._stored.is_plain:
            given = self.residual if self.bits and moved is None else moved
            return self._encode(x, given, parts, received, room, tell)
        if not self.compressor.takes(self._stored, contracts=self.kept.contracts):
            return self._encode_apart(x, parts, received, room, tell)
        copies = self.compressor.pads(x.device)  # kernels then write the copy, too
        self._stored = self._stored.copying(parts) if copies else self._stored.copied(parts)
        return self._encode(x, self._stored, parts, received, room)

    def undo(self, x: Tensor, payloads: Sequence[Payload], parts: Sequence[Blocks]) -> None:
        """Undo the last `compress` of x: e <- (e + decompressed) - x in good blocks, exact to about one ulp.

        If the residual is decayed, averaged or stored in fewer than 32 bits, it is restored from a copy, exactly.
        """
        if self.bits == 0:
            return
        if not self._stored.is_plain:
            self._stored.restore_(parts)
            return
        sent = torch.zeros_like(x)
        self.compressor.decompress_payloads_(payloads, parts, sent)
        bad = [self.compressor.is_bad(payload.tensors[1:], own) for payload, own in zip(payloads, parts, strict=True)]
        if kernels.has_triton(x.device):
            from commopt.kernels.cuda import residuals

            residuals.undo_(x, sent, torch.cat(bad), self.residual, parts)
            return
        for blocks, is_bad in zip(parts, bad, strict=True):
            before = corrected(sent, self.residual, blocks) - corrected(x, None, blocks)
            keep_rest_(self.residual, before, ~is_bad, blocks)

    def values(self, blocks: Blocks) -> Tensor:
        """(elements of blocks,) f32: the residual of some blocks, end to end."""
        stored = self.residual[self._places(blocks)].float()
        if self.bits != 8:
            return stored
        return stored * self.scales[self._slots(blocks)][run_of_element(blocks.lengths, stored.device)]

    def set_values(self, values: Tensor, blocks: Blocks) -> None:
        """Overwrite the residual of some blocks; `values` as `values()` gives them."""
        if kernels.has_triton(values.device):
            from commopt.kernels.cuda import residuals

            residuals.store_(values.clone(), replace(self._stored, average=0.0), [blocks])
            return
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

    def clear(self, parts: Sequence[Blocks]) -> None:
        self._stored.clear_(parts)

    def dense(self, state: Mapping[str, Tensor], name: str, blocks: Blocks) -> Tensor:
        """(elements of blocks,) f32: the saved residual `name`, of this rank or another."""
        stored = {key: x.to(self.residual.device) for key, x in state.items() if key.startswith(name)}
        residual, scales = stored[name], stored.get(f"{name}_scales")
        return ErrorFeedback(self.compressor, self.kept, blocks, residual=residual, scales=scales).values(blocks)

    def _encode(
        self,
        x: Tensor,
        residual: Given,
        parts: Sequence[Blocks],
        received: Sequence[Payload],
        room: int = 0,
        tell: Tell | None = None,
    ) -> list[Payload]:
        if self.compressor.is_ragged:
            assert residual is None or isinstance(residual, Tensor)
            payloads, has_headers = self.compressor.encode_payloads(x, residual, parts, received, tell)
        else:
            layouts = layouts_of(self.compressor, parts)
            payloads = in_a_row(layouts, x.device, is_zero=not self.compressor.pads(x.device), room=room)
            has_headers = self.compressor.compress_payloads_(x, residual, parts, payloads, received)
            if self.kept.contracts and self.compressor.needs_fit and (residual is None or isinstance(residual, Tensor)):
                self.compressor.fit_payloads_(payloads, x, residual, parts)
        if not has_headers:
            own = [(payload, blocks) for payload, blocks in zip(payloads, parts, strict=True) if len(blocks)]
            found = [first_bad(self.compressor.is_bad(payload.tensors[1:], blocks), blocks) for payload, blocks in own]
            first = first_of([*found, first_bad_parameter(received)])
            if isinstance(payloads, Bundle):
                payloads.head_all_(first)
            else:
                for payload in payloads:
                    payload.tensors[0].fill_(first)
        return payloads

    def _encode_apart(
        self, x: Tensor, parts: Sequence[Blocks], received: Sequence[Payload], room: int, tell: Tell | None
    ) -> list[Payload]:
        """Compress with the residual as float32, and store it afterwards; keep a copy of what was stored, for `undo`."""
        self._stored = self._stored.copied(parts)
        moved = [blocks.having(homes=homes) for blocks, homes in zip(parts, end_to_end(parts), strict=True)]
        if kernels.has_triton(x.device):
            from commopt.kernels.cuda import residuals

            left = residuals.read(self._stored, parts)
            payloads = self._encode(x, left, moved, received, room, tell)
            residuals.store_(left, self._stored, parts)
            return payloads
        before = torch.cat([self.values(blocks) for blocks in parts])
        residual = before * self.kept.decay
        payloads = self._encode(x, residual, moved, received, room)
        rest = torch.split(residual.lerp_(before, self.kept.average), [blocks.elements for blocks in parts])
        for payload, blocks, part in zip(payloads, parts, rest, strict=True):
            if not bool(self.compressor.is_bad(payload.tensors[1:], blocks).any()):  # else void: it is undone
                self.set_values(part, blocks)
        return payloads

    def _places(self, blocks: Blocks) -> Tensor:
        return element_indices(blocks.homes, blocks.lengths, self.residual.device)

    def _slots(self, blocks: Blocks) -> Tensor:
        return torch.from_numpy(self._stored.slots(blocks.homes)).to(self.residual.device)


def try_out(compressor: Compressor, kept: Kept, device: torch.device) -> None:
    """Compress and read two tiny parameters, so that the kernels are there before a step waits for them."""
    if kernels.has_triton(device):
        return
    bucket = Bucket.of([(name, torch.ones(64, dtype=torch.float32, device=device)) for name in ("a", "b")])
    table = compressor.table(ParameterIndex(bucket.names, (64, 64)), 2)
    parts = [own.having(keys=own.drawn(0, "try", 0, np.zeros(2, np.int64))) for own in table.parts(bucket).by_owner]
    sent = ErrorFeedback(compressor, kept, table.everything, device).compress(bucket.flat, parts)
    compressor.decompress_payloads_(sent, parts, bucket.flat)


def first_bad_parameter(payloads: Sequence[Payload]) -> int:
    """The index of the first bad parameter in the headers of messages, or -1; equal on all ranks that read the same messages."""
    if not payloads:
        return -1
    if payloads[0].row.device.type != "cpu":
        return first_of(torch.cat([payload.tensors[0] for payload in payloads]).tolist())
    heads = Bundle.of(payloads).heads  # far faster than `tensors` of hundreds of messages
    return -1 if heads.max() < 0 else int(heads[heads >= 0].min())


def layouts_of(compressor: Compressor, parts: Sequence[Blocks]) -> list[Layout]:
    """The layout of a message for each of `parts`, header included; made once."""
    name = ("layouts", compressor)
    return once(parts, name, lambda: [HEADER + compressor.layout(blocks) for blocks in parts])


def first_of(found: Iterable[int]) -> int:
    """The lowest index of a bad parameter, or -1 if all are -1."""
    return min((k for k in found if k >= 0), default=-1)
