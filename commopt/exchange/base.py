"""What replaces the mean over ranks: a bucket in, the estimate of its mean out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from commopt.groups.base import Group
from commopt.wire.bucket import Bucket, ParameterIndex
from commopt.wire.state import Stateful


class Exchange(Stateful, ABC):
    """Overwrites a bucket with an estimate of its mean over ranks.

    exchanges: (P,) i64, how often each parameter has been exchanged; whoever runs the exchange counts, and void buckets do not.
    """

    is_linear: ClassVar[bool] = False  # scaled gradients may be exchanged as they are: no state depends on their scale
    merges_buckets = False  # all buckets of a step travel as one, in registration order
    needs_float32 = True
    seed = 0
    rank: int
    ranks: int
    exchanges: Tensor

    def bind(
        self, named_parameters: Sequence[tuple[str, Tensor]], group: Group, exchanges: Tensor | None = None
    ) -> None:
        """Allocate this rank's state for the trainable parameters, in registration order; called once.

        exchanges: the count that this exchange is part of; its own if None.
        """
        self.index, self.device = ParameterIndex.of(named_parameters), named_parameters[0][1].device
        self.rank, self.ranks = group.rank, group.size
        self.lay_out(named_parameters, group)
        self.allocate()
        if exchanges is None:
            exchanges = self.state.get("exchanges", torch.zeros(len(self.index.names), dtype=torch.int64))
        self.exchanges = exchanges
        for part in self.parts:
            if isinstance(part, Exchange):
                part.bind(named_parameters, group, exchanges)
        self.bound()

    def lay_out(self, named_parameters: Sequence[tuple[str, Tensor]], group: Group) -> None:
        """Work out what the declared state depends on, from the parameters and the group; before state is allocated."""

    def bound(self) -> None:
        """Called at the end of `bind`, when all state is there."""

    @abstractmethod
    def exchange(self, bucket: Bucket, group: Group) -> None:
        """Overwrite bucket.flat, or set bucket.void and leave all state as it was."""

    def bytes_per_parameter(self, ranks: int) -> float:
        """What one rank sends per parameter and step after any warm-up, for large matrices; the formula, not a measurement."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it sends")

    @property
    def state_form(self) -> str:
        """What the layout of the saved state depends on beside the model; a checkpoint of another form is refused."""
        return ""

    def exchange_alone(self, bucket: Bucket) -> None:
        """One rank is its own mean, and still does not let a NaN through."""
        if not is_finite(bucket.flat):
            bucket.void = first_bad(self.index, bucket)


def first_bad(index: ParameterIndex, bucket: Bucket) -> str:
    """The first parameter in registration order with a NaN or an inf."""
    return min(
        (name for name, x in bucket.views() if not bool(x.isfinite().all())), key=lambda name: index.position[name]
    )


def average_(bucket: Bucket, index: ParameterIndex, group: Group) -> None:
    """Overwrite a bucket by its exact mean over ranks, which makes it void unless all of that is finite."""
    bucket.flat /= group.size
    group.all_reduce(bucket.flat)
    if not is_finite(bucket.flat):
        bucket.void = first_bad(index, bucket)


def is_finite(x: Tensor) -> bool:
    """Whether no element is a NaN or an inf; one pass, and a second one only where the sum overflows."""
    return math.isfinite(float(x.sum(dtype=torch.float32))) or bool(x.isfinite().all())
