"""1-bit Adam with parameter groups that stay out of the freeze, as in DeepSpeed."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from commopt.groups import Group
from commopt.methods import OnebitAdam
from commopt.wire.bucket import Bucket


class PartlyFrozenAdam(OnebitAdam):
    """1-bit Adam whose groups with `non_freeze: True` keep using the exact mean gradient, and a variance that adapts."""

    _is_live = False  # whether the group that is being updated stays out of the freeze

    def exchange(self, bucket: Bucket, group: Group) -> None:
        parts = self._split(bucket)
        for is_live, part in parts.items():  # live first: it changes no state, should the bucket be void
            exchange = self.mean.exchange if is_live else super().exchange
            exchange(part, group)
            bucket.void = part.void
            if part.void is not None:
                return
        found = dict(view for part in parts.values() for view in part.views())
        for name, x in bucket.views() if True in parts else ():
            x.copy_(found[name])

    def receive(self, bucket: Bucket) -> None:
        parts = self._split(bucket)
        if True in parts:
            self.adapt_("variance", parts[True])
            self.follow_(parts[True])
        if False in parts:
            super().receive(parts[False])

    def update(self, names: Sequence[str], group: Mapping[str, Any]) -> None:
        self._is_live = self.is_frozen and bool(group.get("non_freeze"))
        if self._is_live:
            self.state["variance_step"][self._positions(names)] += 1
        super().update(names, group)

    @property
    def has_signs(self) -> bool:
        return super().has_signs and not self._is_live

    def _split(self, bucket: Bucket) -> dict[bool, Bucket]:
        """The live part of a bucket (True), then the frozen one, without empty ones; the bucket itself if nothing in it is live."""
        parts: dict[bool, list[tuple[str, Tensor]]] = {True: [], False: []}
        for name, x in bucket.views() if self.is_frozen else ():
            parts[bool(self.settings(name).get("non_freeze"))].append((name, x))
        if not parts[True]:
            return {False: bucket}
        return {is_live: Bucket.of(views, bucket.label) for is_live, views in parts.items() if views}
