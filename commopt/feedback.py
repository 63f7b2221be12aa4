"""Error feedback: what a compressor left out of this message goes into the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from commopt.bucket import Blocks
from commopt.compress.base import Compressor
from commopt.wire import Payload

_HEADER = ((torch.int32, 1),)


class ErrorFeedback:
    """A compressor and the residual of what it has not sent yet, e <- (x + e) - decompressed.

    Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847. residual: (elements,) f32, laid out as the
    blocks' homes say. Each payload starts with an int32: the index of the first parameter with a non-finite
    value in any of the message's blocks, or -1.
    """

    def __init__(self, compressor: Compressor, elements: int, device: torch.device | str = "cpu") -> None:
        self.compressor = compressor
        self.residual = torch.zeros(elements, dtype=torch.float32, device=device)

    def compress(self, x: Tensor, parts: Sequence[Blocks]) -> list[Payload]:
        """The payloads of x + residual, one for each of `parts`; x is left as it is."""
        payloads = [Payload.allocate(_HEADER + self.compressor.layout(blocks), x.device) for blocks in parts]
        self.compressor.compress_(x, self.residual, parts, [payload.tensors[1:] for payload in payloads])
        bad = [self.compressor.first_bad(p.tensors[1:], blocks) for p, blocks in zip(payloads, parts, strict=True)]
        first = min((k for k in bad if k >= 0), default=-1)
        for payload in payloads:
            payload.tensors[0].fill_(first)
        return payloads

    def undo(self, x: Tensor, payloads: Sequence[Payload], parts: Sequence[Blocks]) -> None:
        """Take the last `compress` of x back: e <- (e + decompressed) - x where it was written, exact to about one ulp."""
        for payload, blocks in zip(payloads, parts, strict=True):
            sent = torch.zeros_like(x)
            codes = payload.tensors[1:]
            self.compressor.decompress_(codes, blocks, sent)
            good = (~self.compressor.is_bad(codes, blocks)).tolist()
            for is_good, start, home, n in zip(good, blocks.starts, blocks.homes, blocks.lengths, strict=True):
                if is_good:
                    e = self.residual[home : home + n]
                    e.add_(sent[start : start + n]).sub_(x[start : start + n])


def first_bad_parameter(payloads: Sequence[Payload]) -> int:
    """What the headers of some ranks' messages say: the first bad parameter's index, or -1; the same on all who read the same."""
    heads = torch.stack([payload.tensors[0][0] for payload in payloads]).tolist()
    return min((head for head in heads if head >= 0), default=-1)
