"""Messages of a flat tensor of parameters or deltas: in float32, or compressed with error feedback."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from commopt.compress import make_compressor
from commopt.compress.base import equal_blocks
from commopt.compress.feedback import HEADER, NOTHING_KEPT, ErrorFeedback, Kept, try_out
from commopt.errors import ConfigError, check_flag
from commopt.exchange.base import PIECE
from commopt.wire.bucket import Blocks, ParameterIndex, Share
from commopt.wire.payload import Payload, is_sound
from commopt.wire.state import State, Stateful


class Message(Stateful):
    """Packs and unpacks a flat tensor of all parameters, in registration order.

    given: `{compressor: int8, error_feedback: true}` with the compressor's own options, or its name alone; None sends float32. What
    compression left out of a message goes into the next one (`error_feedback`, true by default), whichever peer gets that.
    """

    def __init__(self, given: Any, *, seed: int = 0) -> None:
        options = dict(given) if isinstance(given, Mapping) else {"compressor": given}
        self.seed, self.has_feedback = seed, options.pop("error_feedback", True)
        check_flag("message: error_feedback", self.has_feedback)
        if given is not None and options.get("compressor") is None:
            raise ConfigError(
                f"message: {given!r}: no compressor is named; write {{compressor: int8}}, or leave message out"
            )
        self.compressor = None if given is None else make_compressor(options, "message")

    def pieces(self, numel: int) -> Sequence[int]:
        """The lengths that a parameter may be cut into to be shared out among a machine's ranks."""
        if self.compressor is None:
            return equal_blocks(numel, PIECE)
        return [numel] if self.compressor.shared_scale else self.compressor.block_lengths(numel, 1)

    def bind(self, index: ParameterIndex, rank: int, share: Share | None = None) -> None:
        """Allocate the residual of this rank. share: the one that `index` is of, whose blocks and keys are then those of the whole."""
        self.index, self.rank, self.device = index, rank, torch.device("cpu")
        self.feedback: ErrorFeedback | None = None
        self.allocate()
        if self.compressor is not None:
            table = self.compressor.table(index if share is None else share.whole, 1)
            self._everything = table.of_share(share).everything
            kept = Kept() if self.has_feedback else NOTHING_KEPT
            residual = self.state.get("residual")
            try_out(self.compressor, kept, self.device)
            self.feedback = ErrorFeedback(self.compressor, kept, self._everything, residual=residual)

    def declare(self) -> list[State]:
        has_residual = self.compressor is not None and self.has_feedback
        return [State("residual", held="rank", on_resize="mean")] if has_residual else []

    def pack(self, x: Tensor, sequence: int) -> Payload:
        """The payload of (elements,) f32."""
        return Payload.of(x) if self.feedback is None else self.feedback.compress(x, [self._blocks(sequence)])[0]

    def unpack(self, payload: Payload, sequence: int) -> Tensor | None:
        """(elements,) f32 that a rank packed; None if it is not sound, or of another size."""
        if self.compressor is None:
            tensors = payload.opened((torch.float32, self.index.total))
            return None if tensors is None else tensors[0]
        blocks, layout = self._blocks(sequence), payload.layout
        fits = len(layout) > 1 if self.compressor.is_ragged else layout == HEADER + self.compressor.layout(blocks)
        if not fits or layout[:1] != HEADER or int(payload.tensors[0]) >= 0:
            return None
        out = torch.zeros(self.index.total, dtype=torch.float32)
        try:
            self.compressor.decompress_(payload.tensors[1:], blocks, out)
        except ValueError:  # damaged, or of variable length and from a rank with another model or other options
            return None
        return out if is_sound(out) else None

    def take_back(self, x: Tensor, payload: Payload, sequence: int) -> None:
        """Undo the last `pack`, of a message that no peer received: restores the residual."""
        if self.feedback is not None:
            self.feedback.undo(x, [payload], [self._blocks(sequence)])

    def bytes_per_element(self) -> float:
        return 4.0 if self.compressor is None else self.compressor.bytes_per_element()

    def _blocks(self, sequence: int) -> Blocks:
        blocks = self._everything
        assert self.compressor is not None
        if not self.compressor.stochastic:
            return blocks
        rank = 0 if self.compressor.shares_keys else self.rank
        counts = np.full(len(self.index.names), sequence, dtype=np.int64)
        return blocks.having(keys=blocks.drawn(self.seed, "message", rank, counts))
