"""What replaces the mean over ranks: a bucket in, the estimate of its mean out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from commopt.compress.base import equal_blocks
from commopt.compress.feedback import first_of
from commopt.groups.base import Group
from commopt.wire.bucket import Bucket, ParameterIndex, Share
from commopt.wire.payload import Payload
from commopt.wire.state import Stateful

PIECE = 2048  # elements that stay together where nothing else decides, and that one rank serves


class Exchange(Stateful, ABC):
    """Overwrites a bucket with an estimate of its mean over ranks.

    exchanges: (P,) i64, how often each parameter has been exchanged; whoever runs the exchange counts, and void buckets do not.
    """

    is_linear = False  # scaled gradients may be exchanged as they are: no state depends on their scale
    merges_buckets = False  # all buckets of a step travel as one, in registration order
    needs_float32 = True
    seed = 0

    def bind(
        self,
        named_parameters: Sequence[tuple[str, Tensor]],
        group: Group,
        exchanges: Tensor | None = None,
        share: Share | None = None,
    ) -> None:
        """Allocate this rank's state for the trainable parameters, in registration order; called once.

        exchanges: the count that this exchange is part of; its own if None. share: what this rank exchanges, if it is not everything.
        """
        self.index, self.device = ParameterIndex.of(named_parameters), named_parameters[0][1].device
        self.rank, self.ranks, self.share = group.rank, group.size, share
        self.lay_out(named_parameters, group)
        self.allocate()
        if exchanges is None:
            exchanges = self.state.get("exchanges", torch.zeros(len(self.index.names), dtype=torch.int64))
        self.exchanges = exchanges
        for part in self.parts:
            if isinstance(part, Exchange):
                part.bind(named_parameters, group, exchanges, share)
        self.bound()

    def lay_out(self, named_parameters: Sequence[tuple[str, Tensor]], group: Group) -> None:
        """Work out what the declared state depends on, from the parameters and the group; before state is allocated."""

    def bound(self) -> None:
        """Called at the end of `bind`, when all state is there."""

    def pieces(self, numel: int, ranks: int) -> Sequence[int]:
        """The lengths that a parameter may be cut into to be shared out among a machine's ranks; ranks: how many machines there are."""
        return equal_blocks(numel, PIECE)

    @abstractmethod
    def exchange(self, bucket: Bucket, group: Group) -> None:
        """Overwrite bucket.flat, or set bucket.void and leave all state as it was.

        The bucket holds this rank's share of the parameters: all of them, if its machine has no other ranks. All of a machine's ranks
        make the same calls of `is_void`.
        """

    def is_void(self, bucket: Bucket, bad: int, group: Group) -> bool:
        """Whether a bucket has to be left out, because this rank or another of its machine found a bad parameter.

        bad: the first one's index, as this rank and its like on other machines found it; -1 for none.
        """
        if group.inside is not None:
            own = torch.tensor([bad], dtype=torch.int32, device=bucket.flat.device)
            bad = first_of(int(one.tensors[0]) for one in group.inside.all_gather(Payload.of(own)))
        if bad >= 0:
            bucket.void = self.index.names[min(bad, len(self.index.names) - 1)]  # a damaged message may name any
        return bad >= 0

    def average_(self, bucket: Bucket, group: Group) -> bool:
        """Overwrite a bucket by its exact mean over ranks; False if that made it void."""
        bucket.flat /= group.size
        if bucket.flat.numel():
            group.all_reduce(bucket.flat)
        return not self.is_void(bucket, first_bad(self.index, bucket), group)

    def bytes_per_parameter(self, ranks: int) -> float:
        """What one rank sends per parameter and step after any warm-up, for large matrices; the formula, not a measurement."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it sends")

    @property
    def state_form(self) -> str:
        """What the layout of the saved state depends on beside the model; a checkpoint of another form is refused."""
        return ""

    def exchange_alone(self, bucket: Bucket, group: Group) -> None:
        """One machine is its own mean, and still does not let a NaN through."""
        self.is_void(bucket, first_bad(self.index, bucket), group)


def first_bad(index: ParameterIndex, bucket: Bucket) -> int:
    """The index of the first parameter with a NaN or an inf, or -1."""
    if is_finite(bucket.flat):
        return -1
    return first_of(index.position[name] for name, x in bucket.views() if not bool(x.isfinite().all()))


def is_finite(x: Tensor) -> bool:
    """Whether no element is a NaN or an inf; one pass, and a second one only where the sum overflows."""
    return math.isfinite(float(x.sum(dtype=torch.float32))) or bool(x.isfinite().all())
