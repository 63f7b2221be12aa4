"""The blocks of one message or more in the order in which they lie in memory, with where their scales and codes are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from commopt.kernels.cpu.compiled import F32, U8, Places
from commopt.wire.bucket import Blocks, Int64Array, UInt64Array, kept
from commopt.wire.payload import Bundle, Payload

NO_KEYS = np.zeros(0, np.uint64)


class Row(NamedTuple):
    """places: (B,) each: where blocks begin among values, in the state, their lengths, where their scales are and where codes begin."""

    scales: F32
    codes: U8
    places: Places
    keys: UInt64Array  # none, or one for each block
    parameters: Int64Array

    @classmethod
    def alone(cls, scales: Tensor, codes: Tensor, blocks: Blocks, bits: int, homes: Int64Array | None = None) -> Row:
        """Of one message, block after block. bits: of each code. homes: if not those of the blocks."""
        homes = blocks.homes if homes is None else homes
        places = (blocks.starts, homes, blocks.lengths, np.arange(len(blocks)), byte_starts(blocks, bits))
        return cls(
            scales.numpy(), codes.numpy(), places, NO_KEYS if blocks.keys is None else blocks.keys, blocks.parameters
        )

    @classmethod
    def of(cls, payloads: Sequence[Payload], parts: Sequence[Blocks], bits: int) -> Row:
        """Of messages behind headers of four bytes. Neighbours in memory are served by different ranks, and cost a pass each else."""
        bundle = Bundle.of(payloads)

        def arrange() -> tuple[Int64Array, Places, Int64Array]:
            own = list(zip(bundle.at, parts, strict=True))
            scales = [place // 4 + 1 + np.arange(len(blocks)) for place, blocks in own]
            codes = [place + 4 + 4 * len(blocks) + byte_starts(blocks, bits) for place, blocks in own]
            values = [[getattr(blocks, key) for blocks in parts] for key in ("starts", "homes", "lengths")]
            every = [np.concatenate(column) for column in (*values, scales, codes)]
            order = np.argsort(every[0], kind="stable")
            return order, tuple(column[order] for column in every), np.concatenate([x.parameters for x in parts])[order]

        by = [x for blocks in parts for x in (blocks.starts, blocks.homes, blocks.lengths)]
        order, places, parameters = kept(parts[0].tables, ("row", bits, bundle.at), by, arrange)
        keys = [blocks.keys for blocks in parts if blocks.keys is not None]
        drawn = np.concatenate(keys)[order] if len(keys) == len(parts) else NO_KEYS
        codes = bundle.octets
        return cls(codes[: len(codes) // 4 * 4].view(np.float32), codes, places, drawn, parameters)

    def first_bad(self) -> int:
        """The first parameter that has a block whose scale is not finite, or -1."""
        is_good = np.isfinite(self.scales[self.places[3]])
        return -1 if is_good.all() else int(self.parameters[~is_good].min())


def byte_starts(blocks: Blocks, bits: int) -> Int64Array:
    """(B,) where each block's codes begin."""
    sizes = (blocks.lengths * bits + 7) // 8
    return np.asarray(np.cumsum(sizes) - sizes, dtype=np.int64)
