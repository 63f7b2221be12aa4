"""1-bit Adam with parameter groups that stay out of the freeze, as DeepSpeed's had them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from commopt.groups import Group
from commopt.methods import OnebitAdam
from commopt.wire.bucket import Bucket


class PartlyFrozenAdam(OnebitAdam):
    """1-bit Adam whose groups with `non_freeze: True` go on with the exact mean gradient, and a variance that adapts, for ever."""

    _is_live = False  # whether the parameter that moves now stays out of the freeze

    def exchange(self, bucket: Bucket, group: Group) -> None:
        live, frozen = self._split(bucket)
        if live is None:
            return super().exchange(bucket, group)
        self.mean.exchange(live, group)  # first: it keeps nothing, should the bucket be void
        if live.void is None and frozen is not None:
            super().exchange(frozen, group)
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
            b1, b2 = self.settings(name)["betas"]
            self.part("momentum", name).lerp_(g, 1 - b1)  # m <- b1 m + (1 - b1) g
            self.part("variance", name).mul_(b2).addcmul_(g, g, value=1 - b2)  # v <- b2 v + (1 - b2) g^2
        return super().receive(frozen) if frozen is not None else None

    def update(self, p: Parameter, name: str, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        self._is_live = self.is_frozen and bool(group.get("non_freeze"))
        state["variance_step"] += self._is_live
        super().update(p, name, state, group)

    def bounded(self, root: Tensor, momentum: Tensor, uncorrected: float = 1.0) -> Tensor:
        return root if self._is_live else super().bounded(root, momentum, uncorrected)  # the bound is for signs

    def _split(self, bucket: Bucket) -> tuple[Bucket | None, Bucket | None]:
        """The parts of a bucket that are not frozen, if anything is, and that are; None for an empty one."""
        if not self.is_frozen:
            return None, bucket
        parts: dict[bool, list[tuple[str, Tensor]]] = {True: [], False: []}
        for name, x in bucket.views():
            parts[bool(self.settings(name).get("non_freeze"))].append((name, x))
        live, frozen = (
            Bucket.of(parts[is_live], bucket.label) if parts[is_live] else None for is_live in (True, False)
        )
        return live, frozen
