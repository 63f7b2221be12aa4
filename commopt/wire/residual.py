"""What messages have left out, in the form that it is stored in."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from commopt.wire.bucket import Blocks, Int64Array, kept

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Residual:
    """The residual e of c = x + decay e, which becomes average e + (1 - average) (c - decompressed).

    values: (elements,) f32, bf16, or i8 with scales: (B,) f32, one for each block; a block's is that of its place in homes, which ascend.
    copy, scales_copy: what was stored before the last message, of the elements from `base` on and of all scales, if it is kept.
    tables: what kernels have made of blocks, which lasts.
    """

    values: Tensor
    scales: Tensor
    homes: Int64Array
    decay: float = 1.0
    average: float = 0.0
    copy: Tensor | None = None
    scales_copy: Tensor | None = None
    base: int = 0
    tables: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def is_plain(self) -> bool:
        """Whether it is float32 and just what was left out; then a message is undone without a copy."""
        return self.values.dtype == torch.float32 and self.decay == 1.0 and self.average == 0.0

    @property
    def has_scales(self) -> bool:
        return self.values.dtype == torch.int8

    def slots(self, homes: Int64Array) -> Int64Array:
        """Where the scales are of blocks, or of parts of them, that begin at these homes."""
        return np.searchsorted(self.homes, homes, side="right") - 1

    def copying(self, parts: Sequence[Blocks]) -> Residual:
        """The residual with room for a copy of these blocks, which is still to be written."""
        places = runs(parts)
        base, end = (places[0].start, places[-1].stop) if places else (0, 0)
        return replace(
            self, copy=self.values.new_empty(end - base), scales_copy=torch.empty_like(self.scales), base=base
        )

    def copied(self, parts: Sequence[Blocks]) -> Residual:
        """The residual with a copy of these blocks."""
        new = self.copying(parts)
        for own, copy in new._pairs(parts):
            copy.copy_(own)
        return new

    def restore_(self, parts: Sequence[Blocks]) -> None:
        """Overwrite what is stored of these blocks by the copy."""
        for own, copy in self._pairs(parts):
            own.copy_(copy)

    def clear_(self, parts: Sequence[Blocks]) -> None:
        """Forget these blocks."""
        for place in runs(parts):
            self.values[place] = 0

    def _pairs(self, parts: Sequence[Blocks]) -> Iterator[tuple[Tensor, Tensor]]:
        """What is stored of these blocks, and its place in the copy."""
        assert self.copy is not None
        assert self.scales_copy is not None
        for place in runs(parts):
            yield self.values[place], self.copy[place.start - self.base : place.stop - self.base]
            if self.has_scales:
                slots = slice(*np.searchsorted(self.homes, (place.start, place.stop)).tolist())
                yield self.scales[slots], self.scales_copy[slots]


@dataclass(frozen=True, eq=False)
class Moved:
    """Instead of a residual: c = (1 - eta) average + eta x - known, and nothing is kept; without an average c = x - known.

    known, average: (elements,) f32, laid out by the blocks' homes.
    """

    known: Tensor
    average: Tensor | None = None
    eta: float = 1.0


@dataclass(frozen=True, eq=False)
class Blended(Moved):
    """c = known + x, after x <- s + weight (x - s) with one or two states in turn; known is a residual, and becomes c - decompressed.

    states: (elements,) f32, laid out by the blocks' homes, and their weights.
    """

    states: tuple[tuple[Tensor, float], ...] = ()


@dataclass(frozen=True, eq=False)
class Accumulated:
    """A residual of momentum: c = v + u, where first u <- factor u + x, which is written in place of x.

    Or with Nesterov's, if `moved` is another tensor than x's: u <- factor (u + x), written there, and x <- x + u; c = v + x.
    values: v; velocity: u; (elements,) f32, laid out by the blocks' homes, and by `homes`, (B,). u itself is left as it is.
    """

    values: Tensor
    velocity: Tensor
    homes: Int64Array
    moved: Tensor
    factor: float


Given: TypeAlias = Tensor | Residual | Moved | Accumulated | None  # with x to a codec that takes it


def runs(parts: Sequence[Blocks]) -> list[slice]:
    """The stretches of the state that hold these blocks and nothing else, in ascending order; found once."""

    def find() -> list[slice]:
        homes, lengths = (np.concatenate([getattr(blocks, key) for blocks in parts]) for key in ("homes", "lengths"))
        order = np.argsort(homes, kind="stable")
        starts, ends = homes[order], (homes + lengths)[order]
        is_first = np.append(True, starts[1:] != ends[:-1])[: len(starts)]
        return [
            slice(*pair) for pair in zip(starts[is_first].tolist(), ends[np.roll(is_first, -1)].tolist(), strict=True)
        ]

    return once(parts, "runs", find)


def end_to_end(parts: Sequence[Blocks]) -> list[Int64Array]:
    """(B,) for each of some parts, where its blocks begin if all of them lie one after the other; found once."""

    def find() -> list[Int64Array]:
        ends = np.cumsum(np.concatenate([blocks.lengths for blocks in parts]))
        starts = ends - np.concatenate([blocks.lengths for blocks in parts])
        return np.split(starts, np.cumsum([len(blocks) for blocks in parts])[:-1])

    return once(parts, "end to end", find)


def once(parts: Sequence[Blocks], name: Hashable, find: Callable[[], T]) -> T:
    """What follows from the homes and lengths of blocks alone, kept with the blocks."""
    return kept(parts[0].tables, name, [x for blocks in parts for x in (blocks.homes, blocks.lengths)], find)
