"""What travels of a flat tensor of parameters or deltas: as it is, or compressed with error feedback."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from commopt.compress import make_compressor
from commopt.compress.feedback import NOTHING_KEPT, ErrorFeedback, Kept
from commopt.errors import ConfigError, check_flag
from commopt.exchange.base import is_finite
from commopt.wire import noise
from commopt.wire.bucket import Blocks, ParameterIndex
from commopt.wire.payload import Layout, Payload
from commopt.wire.state import State, Stateful

_HEADER: Layout = ((torch.int32, 1),)  # of ErrorFeedback's payloads: the first parameter that is not finite, or -1


class Message(Stateful):
    """Packs and unpacks parts of a flat tensor of all parameters, in registration order.

    given: `{compressor: int8, error_feedback: true}` with the compressor's own options, or its name alone; None sends float32. What
    compression left out of a message goes into the next one (`error_feedback`, true by default), whoever gets that.
    """

    def __init__(self, given: Any, *, seed: int = 0) -> None:
        options = dict(given) if isinstance(given, Mapping) else {"compressor": given}
        has_feedback = options.pop("error_feedback", True)
        check_flag("message: error_feedback", has_feedback)
        if given is None:
            self.compressor = None
        elif options.get("compressor") is None:
            raise ConfigError(
                f"message: {given!r}: no compressor is named; write {{compressor: int8}}, or leave message out"
            )
        else:
            self.compressor = make_compressor(options, "message")
        self.has_feedback, self.seed = has_feedback, seed

    def bind(self, index: ParameterIndex, rank: int) -> None:
        """Allocate the residual of this rank."""
        self.index, self.rank, self.device = index, rank, torch.device("cpu")
        self.feedback: ErrorFeedback | None = None
        self.allocate()
        if self.compressor is not None:
            self._everything = self.compressor.table(index, 1).everything
            kept = Kept() if self.has_feedback else NOTHING_KEPT
            residual = self.state.get("residual")
            self.feedback = ErrorFeedback(self.compressor, kept, self._everything, residual=residual)

    def declare(self) -> list[State]:
        has_residual = self.compressor is not None and self.has_feedback
        return [State("residual", held="rank", on_resize="mean")] if has_residual else []

    def cut(self, parts: int) -> list[slice]:
        """`parts` stretches of about the same size, which no block of the compressor, and without one no element, crosses."""
        total = self.index.total
        if self.compressor is None:
            edges = [total * k // parts for k in range(parts + 1)]
        else:
            starts = np.append(np.sort(self._everything.starts), total)
            edges = [int(starts[np.searchsorted(starts, total * k // parts)]) for k in range(parts + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(edges)]

    def pack(self, x: Tensor, part: slice, sequence: int) -> Payload:
        """The payload of one part; x: (elements of the part,) f32."""
        if self.feedback is None:
            return Payload.of(x)
        return self.feedback.compress(x, [self._blocks(part, sequence)])[0]

    def unpack(self, payload: Payload, part: slice, sequence: int) -> Tensor | None:
        """(elements of the part,) f32: what somebody packed; None where it is not finite, or not of this size."""
        n = part.stop - part.start
        if self.compressor is None:
            return (
                payload.tensors[0]
                if payload.layout == ((torch.float32, n),) and is_finite(payload.tensors[0])
                else None
            )
        blocks = self._blocks(part, sequence)
        if not self._fits(payload, blocks) or int(payload.tensors[0]) >= 0:
            return None
        out = torch.zeros(n, dtype=torch.float32)
        try:
            self.compressor.decompress_(payload.tensors[1:], blocks, out)
        except ValueError:  # codes of no length known beforehand, from a rank with another model or other options
            return None
        return out

    def take_back(self, x: Tensor, payload: Payload, part: slice, sequence: int) -> None:
        """Undo the last `pack`, of a message that nobody got: the residual is what it was before."""
        if self.feedback is not None:
            self.feedback.undo(x, [payload], [self._blocks(part, sequence)])

    def bytes_per_element(self) -> float:
        return 4.0 if self.compressor is None else self.compressor.bytes_per_element()

    def _fits(self, payload: Payload, blocks: Blocks) -> bool:
        """Whether a payload has the layout of these blocks' codes; of ragged ones, whether it has a header."""
        assert self.compressor is not None
        if self.compressor.is_ragged:
            return len(payload.layout) > 1 and payload.layout[:1] == _HEADER
        return payload.layout == _HEADER + self.compressor.layout(blocks)

    def _blocks(self, part: slice, sequence: int) -> Blocks:
        assert self.compressor is not None
        everything = self._everything
        inside = np.flatnonzero((everything.starts >= part.start) & (everything.starts < part.stop))
        blocks = everything.only(inside)
        rank = 0 if self.compressor.shares_keys else self.rank
        keys = None
        if self.compressor.is_stochastic:
            counts = np.full(len(blocks), sequence, dtype=np.int64)
            keys = noise.keys(self.seed, "message", rank, counts, blocks.homes)
        return Blocks(blocks.starts - part.start, blocks.homes, blocks.lengths, blocks.parameters, blocks.groups, keys)
