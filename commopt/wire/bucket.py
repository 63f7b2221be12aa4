"""A flat tensor with named parameter views, and the blocks that its elements are compressed in."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from commopt.wire import noise

Int64Array = NDArray[np.int64]
UInt64Array = NDArray[np.uint64]
K = TypeVar("K")
T = TypeVar("T")
MOST_LAYOUTS = 64  # what is kept of each


@dataclass(frozen=True)
class ParameterIndex:
    """The trainable parameters in registration order: what state is laid out by, on every rank alike.

    Residuals, momentum and variance are one flat tensor each, in this order, so that nothing depends on how
    DDP happens to bucket the gradients.
    """

    names: tuple[str, ...]
    numels: tuple[int, ...]

    @classmethod
    def of(cls, named_parameters: Iterable[tuple[str, Tensor]]) -> ParameterIndex:
        pairs = [(name, p.numel()) for name, p in named_parameters]
        return cls(tuple(name for name, _ in pairs), tuple(n for _, n in pairs))

    @cached_property
    def position(self) -> dict[str, int]:
        return {name: k for k, name in enumerate(self.names)}

    @cached_property
    def offsets(self) -> Int64Array:
        """(P + 1,) where each parameter starts in a flat tensor of all; the last entry is the total."""
        return np.concatenate([[0], np.cumsum(self.numels)]).astype(np.int64)

    @property
    def total(self) -> int:
        return int(self.offsets[-1])

    def size(self, name: str) -> int:
        """How many elements belong to `name`."""
        return self.numels[self.position[name]] if name in self.position else 0

    def view(self, flat: Tensor, name: str) -> Tensor:
        """The (n,) slice of a flat tensor of all parameters that belongs to `name`; empty if it is none of them."""
        start = int(self.offsets[self.position[name]]) if name in self.position else 0
        return flat[start : start + self.size(name)]

    def places(self, names: tuple[str, ...], starts: tuple[int, ...], share: Share | None = None) -> Blocks:
        """Some parameters, or a share of each, as one block each, made once: they start there among values, and in a flat tensor of all."""

        def make() -> Blocks:
            which = np.asarray([self.position[name] for name in names], dtype=np.int64)
            offsets = self.offsets[:-1] if share is None else self.offsets[:-1] + share.starts
            numels = np.asarray((self if share is None else share.index).numels, dtype=np.int64)
            return Blocks(np.asarray(starts, dtype=np.int64), offsets[which], numels[which], which, which)

        return kept(vars(self).setdefault("_places", {}), (names, starts, share), (), make)


def alike(names: Iterable[str], key: Callable[[str], K]) -> dict[K, list[str]]:
    """Names by what `key` makes of them."""
    found: dict[K, list[str]] = {}
    for name in names:
        found.setdefault(key(name), []).append(name)
    return found


def kept(tables: dict[Any, Any], name: Hashable, by: Sequence[object], make: Callable[[], T]) -> T:
    """What follows from `name` and some objects, made once and kept together with these, as they are known by their ids."""
    key = (name, *map(id, by))
    if key not in tables:
        if len(tables) > MOST_LAYOUTS:
            tables.clear()
        tables[key] = make(), by
    found: T = tables[key][0]
    return found


def once_per_layout(cut: Callable[[Any, Bucket], T]) -> Callable[[Any, Bucket], T]:
    """Keep what a method makes of a bucket, which follows from the bucket's layout alone; for up to 64 of them."""

    @functools.wraps(cut)
    def looked_up(self: Any, bucket: Bucket) -> T:
        tables = vars(self).setdefault(f"_{cut.__name__}_by_layout", {})
        return kept(tables, (bucket.names, bucket.starts), (), lambda: cut(self, bucket))

    return looked_up


@dataclass(frozen=True, eq=False)
class Share:
    """What one of a machine's ranks exchanges with the other machines: a stretch of each parameter, which may be empty.

    whole: the layout of all parameters. edges: (P, L + 1) where in each parameter the stretches of the L ranks begin and end.
    rank: whose share this is.
    """

    whole: ParameterIndex
    edges: Int64Array
    rank: int

    @classmethod
    def cut(cls, whole: ParameterIndex, ranks: int, rank: int, pieces: Callable[[int], Sequence[int]]) -> Share:
        """About the same for each of a machine's ranks. pieces(numel): the lengths that a parameter may be cut into."""
        edges = np.zeros((len(whole.names), ranks + 1), dtype=np.int64)
        load = np.zeros(ranks, dtype=np.int64)
        for k in sorted(range(len(whole.names)), key=lambda k: -whole.numels[k]):
            ends = np.cumsum([0, *pieces(whole.numels[k])])
            each, more = divmod(len(ends) - 1, ranks)
            counts = np.full(ranks, each)
            counts[np.argsort(load, kind="stable")[:more]] += 1  # one more for those that have least so far
            edges[k] = ends[np.cumsum([0, *counts])]
            load += np.diff(edges[k])
        return cls(whole, edges, rank)

    @property
    def starts(self) -> Int64Array:
        """(P,) where in its parameter each stretch begins."""
        return self.edges[:, self.rank]

    @cached_property
    def index(self) -> ParameterIndex:
        """The layout of the stretches, by the parameters' names."""
        return ParameterIndex(self.whole.names, tuple((self.edges[:, self.rank + 1] - self.starts).tolist()))

    def of(self, x: Tensor, name: str) -> Tensor:
        """The stretch of a parameter's (n,) values."""
        k = self.whole.position[name]
        return x[self.edges[k, self.rank] : self.edges[k, self.rank + 1]]

    @once_per_layout
    def places(self, bucket: Bucket) -> list[list[slice]]:
        """Where each rank's stretches lie in a bucket of whole parameters."""
        edges = self.edges[[self.whole.position[name] for name in bucket.names]] + np.asarray(bucket.starts)[:, None]
        return [[slice(*pair) for pair in edges[:, k : k + 2].tolist()] for k in range(edges.shape[1] - 1)]

    def take(self, bucket: Bucket, rank: int) -> Tensor:
        """A rank's stretches of a bucket of whole parameters, end to end."""
        return torch.cat([bucket.flat[place] for place in self.places(bucket)[rank]])

    def bucket(self, bucket: Bucket, flat: Tensor) -> Bucket:
        """The bucket of this rank's stretches; flat: their values."""
        lengths = [place.stop - place.start for place in self.places(bucket)[self.rank]]
        return Bucket(flat, bucket.names, tuple(itertools.accumulate(lengths[:-1], initial=0)), bucket.label)


@dataclass
class Bucket:
    """One flat tensor with named parameter views: DDP's bucket, an optimizer's parameters and an outer delta are all this.

    flat: (n,), the values; names: the parameters it holds, in the order they lie in it; starts: (len(names),) where
    each begins. After an exchange `void` names the first parameter that held a NaN or an inf on any rank, or is None.
    """

    flat: Tensor
    names: tuple[str, ...]
    starts: tuple[int, ...]
    label: str = "bucket 0"
    void: str | None = field(default=None, compare=False)

    @classmethod
    def of(cls, tensors: Sequence[tuple[str, Tensor]], label: str = "bucket 0") -> Bucket:
        """Copy named tensors into one flat bucket."""
        flat = torch.cat([x.detach().reshape(-1) for _, x in tensors])
        starts = itertools.accumulate((x.numel() for _, x in tensors[:-1]), initial=0)
        return cls(flat, tuple(name for name, _ in tensors), tuple(starts), label)

    def views(self) -> list[tuple[str, Tensor]]:
        """(name, (n,) view) of each parameter, in the order they lie in."""
        return list(zip(self.names, torch.tensor_split(self.flat, self.starts[1:]), strict=True))

    def with_flat(self, flat: Tensor) -> Bucket:
        """The same views over another flat tensor."""
        return Bucket(flat, self.names, self.starts, self.label)


@dataclass(frozen=True, eq=False)
class Blocks:
    """Runs of consecutive elements that are compressed one by one: the unit of scale, ownership, residual and finiteness.

    starts: (B,) where each block begins in the tensor that holds the values. homes: (B,) where it begins in the state
    (a flat tensor in registration order). lengths: (B,). parameters: (B,) index of the parameter it is part of.
    groups: (B,) blocks with the same number share one scale. byte_starts: (B,) where its sign bits begin.
    keys: (B,) random key of each block (`noise.keys`), for codecs that round stochastically; None for the others.
    places: (B,) what names a block when a key is drawn for it: its home in a machine that exchanges all of the model; None for homes.
    words: where kernels draw the keys, what they are made of beside places (`noise.words`), one for all parameters or (P,) for each.
    tables: what has been made of these blocks on a device, which lasts.
    """

    starts: Int64Array
    homes: Int64Array
    lengths: Int64Array
    parameters: Int64Array
    groups: Int64Array
    keys: UInt64Array | None = None
    places: Int64Array | None = None
    words: UInt64Array | None = None
    tables: dict[Any, Any] = field(default_factory=dict, repr=False)

    def drawn(self, seed: int, purpose: str, rank: int, counts: Int64Array) -> UInt64Array:
        """(B,) u64: a random key for each block. counts: (P,) how often each parameter has been drawn for."""
        return noise.keys(seed, purpose, rank, counts[self.parameters], self.named)

    def worded(self, seed: int, purpose: str, rank: int, counts: Int64Array) -> Blocks:
        """The blocks with the words that kernels draw their keys by. counts: as for `drawn`."""
        own = counts[self.own_parameters]
        is_one = len(own) == 0 or (own == own[0]).all()
        return self.having(words=noise.words(seed, purpose, rank, own[:1] if is_one else counts), places=self.named)

    @property
    def runs(self) -> list[slice]:
        """Where they lie among the values, those that adjoin as one."""
        if not len(self):
            return []
        ends = self.starts + self.lengths
        breaks = np.flatnonzero(self.starts[1:] != ends[:-1]) + 1
        first, last = np.concatenate([[0], breaks]), np.concatenate([breaks, [len(self)]]) - 1
        return [slice(*pair) for pair in zip(self.starts[first].tolist(), ends[last].tolist(), strict=True)]

    @property
    def named(self) -> Int64Array:
        """(B,) `places`, or else homes."""
        return self.homes if self.places is None else self.places

    @cached_property
    def own_parameters(self) -> Int64Array:
        """Which parameters have blocks here."""
        return np.unique(self.parameters)

    @cached_property
    def byte_starts(self) -> Int64Array:
        sizes = (self.lengths + 7) // 8
        return np.asarray(np.cumsum(sizes) - sizes, dtype=np.int64)

    @cached_property
    def sign_bytes(self) -> int:
        """Bytes of one bit per element, each block padded to whole bytes."""
        return int(((self.lengths + 7) // 8).sum())

    @cached_property
    def elements(self) -> int:
        return int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.lengths)

    def only(self, which: Int64Array) -> Blocks:
        """Some of the blocks, by their number."""
        starts, homes, lengths = self.starts[which], self.homes[which], self.lengths[which]
        keys, places = _only(self.keys, which), _only(self.places, which)
        return Blocks(starts, homes, lengths, self.parameters[which], self.groups[which], keys, places, self.words)

    def having(self, **fields: Any) -> Blocks:
        """The same blocks at other starts or homes, or with other keys; what has been derived from the lengths stays derived."""
        new = copy.copy(self)
        new.__dict__.update(fields)
        return new


@dataclass(frozen=True)
class BlockTable:
    """Every block of a model, and which rank serves it.

    Per parameter the cut is decided once, at attach, by registration order; a bucket's blocks are looked up here, so that
    results do not depend on the bucket layout.

    offsets: (B,) within its parameter; lengths, parameters, groups: (B,); owners: (B,) the rank that serves the block.
    places, served_places: (B,) `Blocks.places` at the workers and at the owner, if this is only a share of the model.
    """

    index: ParameterIndex
    ranks: int
    offsets: Int64Array
    lengths: Int64Array
    parameters: Int64Array
    groups: Int64Array
    owners: Int64Array
    places: Int64Array | None = None
    served_places: Int64Array | None = None

    @classmethod
    def cut(
        cls,
        index: ParameterIndex,
        ranks: int,
        block_lengths: Callable[[int, int], Sequence[int]],
        *,
        shared_scale: bool,
        without: frozenset[str] = frozenset(),
    ) -> BlockTable:
        """Cut each parameter into blocks. block_lengths(numel, ranks) gives the lengths of one parameter's blocks.

        Parameters named in `without` get none: they are not compressed.
        With `shared_scale` the blocks of a parameter share a scale, and its j-th block is served by rank j; else block b,
        counted over all parameters in registration order, is served by rank b mod N.
        """
        lengths_of = [
            np.asarray([] if name in without else block_lengths(n, ranks), dtype=np.int64)
            for name, n in zip(index.names, index.numels, strict=True)
        ]
        counts = np.asarray([len(lengths) for lengths in lengths_of])
        none = np.zeros(0, np.int64)
        lengths = np.concatenate([*lengths_of, none])
        parameters = np.repeat(np.arange(len(counts)), counts)
        offsets = np.concatenate([*(np.cumsum(one) - one for one in lengths_of), none])
        number = np.arange(len(lengths), dtype=np.int64)
        if shared_scale:
            first = np.repeat(np.cumsum(counts) - counts, counts)
            return cls(index, ranks, offsets, lengths, parameters, parameters, number - first)
        return cls(index, ranks, offsets, lengths, parameters, number, number % ranks)

    def of_share(self, share: Share | None) -> BlockTable:
        """The blocks of one rank's share of the model, where they lie in it; owners and random keys are those of the whole."""
        if share is None:
            return self
        offsets = self.offsets - share.starts[self.parameters]
        own = np.flatnonzero((offsets >= 0) & (offsets < np.asarray(share.index.numels)[self.parameters]))
        whole = (self.lengths, self.parameters, self.groups, self.owners, self.everything.homes, self._served_homes)
        return BlockTable(share.index, self.ranks, offsets[own], *(x[own] for x in whole))

    @cached_property
    def _served_homes(self) -> Int64Array:
        """(B,) where each block begins in its owner's server residual."""
        homes = np.zeros(len(self.lengths), dtype=np.int64)
        for rank in np.unique(self.owners):
            mine = self.owners == rank
            homes[mine] = np.cumsum(self.lengths[mine]) - self.lengths[mine]
        return homes

    @cached_property
    def everything(self) -> Blocks:
        """Every block, where it lies in a flat tensor of all parameters."""
        homes = self.index.offsets[self.parameters] + self.offsets
        return Blocks(homes, homes, self.lengths, self.parameters, self.groups, places=self.places)

    def served_by(self, rank: int) -> Blocks:
        """All blocks that `rank` serves: values and homes in its server residual, which lies in block order."""
        return self._served(np.flatnonzero(self.owners == rank))

    def _served(self, own: Int64Array) -> Blocks:
        homes, places = self._served_homes[own], _only(self.served_places, own)
        return Blocks(homes, homes, self.lengths[own], self.parameters[own], own, places=places)

    def at_home(self, rank: int) -> Blocks:
        """All blocks that `rank` serves, where they lie in a flat tensor of all parameters."""
        return self.everything.only(np.flatnonzero(self.owners == rank))

    def _of(self, bucket: Bucket) -> tuple[Int64Array, Blocks]:
        """The numbers of a bucket's blocks, and the blocks."""
        order = [self.index.position[name] for name in bucket.names]
        start_of = np.zeros(len(self.index.names), dtype=np.int64)
        start_of[order] = bucket.starts
        edges = np.searchsorted(self.parameters, np.arange(len(self.index.names) + 1))
        own = np.concatenate([np.zeros(0, np.int64), *(np.arange(edges[k], edges[k + 1]) for k in order)])
        return own, self.everything.only(own).having(starts=start_of[self.parameters[own]] + self.offsets[own])

    @once_per_layout
    def all_of(self, bucket: Bucket) -> Blocks:
        """All blocks of a bucket."""
        return self._of(bucket)[1]

    @once_per_layout
    def parts(self, bucket: Bucket) -> Parts:
        """The blocks of a bucket, by the rank that serves them."""
        own, blocks = self._of(bucket)
        none = np.zeros(0, np.int64)
        by_owner, served = [blocks.only(none)] * self.ranks, [self._served(none)] * self.ranks
        for rank in np.unique(self.owners[own]):
            which = np.flatnonzero(self.owners[own] == rank)
            by_owner[rank] = mine = blocks.only(which)
            served[rank] = self._served(own[which]).having(starts=np.cumsum(mine.lengths) - mine.lengths)
        return Parts(tuple(by_owner), tuple(served))


@dataclass(frozen=True)
class Parts:
    """A bucket's blocks by owner: as workers see them (in the bucket), and as the owner serves them (end to end)."""

    by_owner: tuple[Blocks, ...]
    served: tuple[Blocks, ...]


def _only(x: NDArray[Any] | None, which: Int64Array) -> NDArray[Any] | None:
    return None if x is None else x[which]
