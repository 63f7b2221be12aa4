"""1-bit Adam with parameter groups that stay out of the freeze, as DeepSpeed's had them."""

from __future__ import annotations

from typing import Any

from torch.nn import Parameter

from commopt.groups.base import Group
from commopt.methods.onebit_adam import OnebitAdam
from commopt.wire.bucket import Bucket


class PartlyFrozenAdam(OnebitAdam):
    """1-bit Adam whose groups with `non_freeze: True` go on with the exact mean gradient, and a variance that adapts, for ever."""

    def aggregate(self, bucket: Bucket, group: Group) -> None:
        live, frozen = self._split(bucket)
        if live is None:
            return super().aggregate(bucket, group)
        self._mean.aggregate(live, group)  # first: it keeps nothing, should the bucket be void
        if live.void is None and frozen is not None:
            super().aggregate(frozen, group)
        bucket.void = live.void or (frozen.void if frozen is not None else None)
        if bucket.void is None:
            found = dict(live.views()) | dict(frozen.views() if frozen is not None else ())
            for name, x in bucket.views():
                x.copy_(found[name])
        return None

    def receive(self, bucket: Bucket) -> None:
        live, frozen = self._split(bucket)
        if live is None:
            return super().receive(bucket)
        for name, g in live.views():
            b1, b2 = self.options(name)["betas"]
            self.part("momentum", name).lerp_(g, 1 - b1)  # m <- b1 m + (1 - b1) g
            self.part("variance", name).mul_(b2).addcmul_(g, g, value=1 - b2)  # v <- b2 v + (1 - b2) g^2
        return super().receive(frozen) if frozen is not None else None

    def update(self, p: Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not (self.is_frozen and group.get("non_freeze")):
            return super().update(p, state, group)
        state["variance_step"] += 1
        bound, self.max_ratio = self.max_ratio, None  # which is for signs
        try:
            return super().update(p, state, group)
        finally:
            self.max_ratio = bound

    def _split(self, bucket: Bucket) -> tuple[Bucket | None, Bucket | None]:
        """The parts of a bucket that are not frozen, if anything is, and that are; None for an empty one."""
        if not self.is_frozen:
            return None, bucket
        views = bucket.views()
        live = [(name, x) for name, x in views if self.options(name).get("non_freeze")]
        frozen = [(name, x) for name, x in views if not self.options(name).get("non_freeze")]
        label = bucket.label
        return Bucket.of(live, label) if live else None, Bucket.of(frozen, label) if frozen else None
