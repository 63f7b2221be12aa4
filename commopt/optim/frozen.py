"""Adam-like methods that freeze their variance, and compress from then on."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from commopt.compress.feedback import Kept
from commopt.compress.options import SignOptions, SignScale
from commopt.compress.sign import equalising_factors
from commopt.errors import AttachError
from commopt.exchange.mean import Mean
from commopt.exchange.two_way import TwoWayMean
from commopt.groups.base import Group
from commopt.optim.update import UpdateMethod
from commopt.options import Count, Positive, Wanted, options
from commopt.wire.bucket import Bucket
from commopt.wire.shards import shard_start
from commopt.wire.state import State

_log = logging.getLogger(__name__)
_STABLE_RATIO = 0.96
_LATEST = 0.25  # the share of a run by which "auto" freezes

FreezeStep = Annotated[Count | Literal["auto"], Wanted("a whole number from 1, or 'auto'")]
Masks = Annotated[Mapping[str, Tensor], Wanted("{parameter name: tensor of its shape}, in Python")]


@options
class FrozenOptions(SignOptions):
    scale: SignScale = "rms"
    momentum_mask: Masks | None = None
    max_ratio: Annotated[Positive | None, Wanted("a number above 0, or null for no bound")] = 3.0


class FrozenVariance(UpdateMethod):
    """An Adam-like method that stops adapting its variance at a freeze, and from then on compresses what it exchanges.

    warmup_option: the option that says when: as `freeze_step` of `onebit_adam`, where "auto" is section 7.1 of Tang et al. 2021,
        arXiv:2102.02888; or None for never.

    At the freeze, coordinates whose variance is zero are masked as well, since a compressed momentum is never zero there and
    would move them by lr * scale / eps; and those whose variance has overflowed, which stand still under Adam too.
    """

    moments = ("momentum", "variance")
    counters = ("step", "variance_step")
    warmup_option: ClassVar[str] = "freeze_step"
    warmup_steps = 0
    state_form = ""
    states: ClassVar[tuple[State, ...]] = (
        State("momentum"),
        State("variance"),
        State("frozen", of="run", dtype=torch.int64),
        State("last_lr", of="run", dtype=torch.float64, initial=math.nan),
    )

    def set_up(self) -> None:
        super().set_up()
        self.freeze_at: int | str | None = getattr(self.options, self.warmup_option)
        if isinstance(self.freeze_at, int):
            self.warmup_steps = self.freeze_at
        self.mean = Mean()
        self.two_way = TwoWayMean(self.options.compressor(), Kept(self.options.residual_bits))
        self.parts = (self.mean, self.two_way)
        self.merges_buckets, self.state_form = self.two_way.merges_buckets, self.two_way.state_form
        self.momentum_mask = dict(self.options.momentum_mask or {})
        self.mask: Tensor | None = None  # (n,) bool, True if momentum may be other than zero; None for everywhere

    def declare(self) -> list[State]:
        if self.freeze_at != "auto":
            return super().declare()
        norms = State("variance_norms", of="run", numel=self._window + 1, dtype=torch.float64, initial=math.nan)
        return [norms, *super().declare()]  # the last ones, in a ring

    @property
    def is_frozen(self) -> bool:
        return bool(self.state["frozen"])

    @property
    def is_steady(self) -> bool:
        return self.is_frozen

    @property
    def is_exact(self) -> bool:
        return not self.is_frozen

    def bytes_per_parameter(self, ranks: int) -> float:
        return self.two_way.bytes_per_parameter(ranks)

    def pieces(self, numel: int, ranks: int) -> Sequence[int]:
        return self.two_way.pieces(numel, ranks)

    def lay_out(self, named_parameters: Sequence[tuple[str, Tensor]], group: Group) -> None:
        super().lay_out(named_parameters, group)
        self._window = max(1, round(1 / (1 - self.optimizer.param_groups[0]["betas"][1])))
        shapes = {name: self.parameters[name].shape for name, _ in named_parameters}
        for name, mask in self.momentum_mask.items():
            if name not in shapes:
                raise AttachError(f"momentum_mask: the model has no trainable parameter {name!r}")
            shape, given = shapes[name], tuple(torch.as_tensor(mask).shape)
            if len(given) > len(shape) or any(n not in (1, m) for n, m in zip(given[::-1], shape[::-1], strict=False)):
                raise AttachError(f"momentum_mask: {name!r} is of shape {tuple(shape)}, its mask of {given}")

    def restored(self) -> None:
        super().restored()
        if self.is_frozen:
            self._make_mask()

    def exchange(self, bucket: Bucket, group: Group) -> None:
        for name, g in bucket.views() if self.is_frozen else ():
            self.accumulate_(name, g)
        (self.mean if self.is_exact else self.two_way).exchange(bucket, group)

    def accumulate_(self, name: str, g: Tensor) -> None:
        """Overwrite a gradient by what is exchanged after the freeze: this rank's momentum with it."""
        torch.lerp(
            self.own_part("momentum", name), g, 1 - self.settings(name)["betas"][0], out=g
        )  # m_i = b1 m + (1 - b1) g_i

    def count(self, entry: dict[str, Any]) -> None:
        entry["step"] += 1
        entry["variance_step"] += self.is_exact

    def after_step(self) -> None:
        rate = float(self.optimizer.param_groups[0]["lr"])
        is_rising = rate > float(self.state["last_lr"])  # no rate is above nan
        self.state["last_lr"].fill_(rate)
        if not self.is_frozen and self._is_settled(is_rising):
            if is_rising and self.rank == 0:
                why = "the learning rate still rises, and the variance will not follow what comes"
                _log.warning("%s: %s: %s is too early: %s", self.name, self.warmup_option, self.freeze_at, why)
            self.freeze()

    def freeze(self) -> None:
        """End the warm-up."""
        if self.rank == 0:
            _log.info("%s: compression begins after step %d", self.name, self.applied_steps)
        self.state["frozen"].fill_(1)
        self._make_mask()
        if self.mask is not None:
            self.state["momentum"].masked_fill_(~self.mask, 0.0)
        if self.options.prescale:
            self.two_way.factors = equalising_factors(self.state["momentum"], self.index)

    def masked_(self, x: Tensor, name: str) -> Tensor:
        """x with zeros where the momentum of the parameter `name` is masked."""
        return x if self.mask is None else x.masked_fill_(~self.index.view(self.mask, name), 0.0)

    @property
    def has_signs(self) -> bool:
        """Whether the momentum is made of signs by now, which do not shrink where the variance does."""
        return self.is_frozen and self.ranks > 1

    def roots(self, state: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """sqrt(v) + eps, and the same once signs have come in, raised where |momentum| over it would exceed `max_ratio`."""
        root: Tensor = state["variance"].sqrt()
        lacking = math.sqrt(1 - group["betas"][1] ** state["variance_step"]) if state["variance_step"] else 1.0
        if self.corrects_bias(group):
            root /= lacking
            lacking = 1.0
        root += group["eps"]
        if not self.has_signs or self.options.max_ratio is None:
            return root, root
        return root, torch.maximum(root, state["momentum"].abs() * (lacking / self.options.max_ratio))

    def receive(self, bucket: Bucket) -> None:
        for name, x in bucket.views():
            m, v, (b1, b2) = self.part("momentum", name), self.part("variance", name), self.settings(name)["betas"]
            if self.is_exact:
                v.mul_(b2).addcmul_(x, x, value=1 - b2)  # v <- b2 v + (1 - b2) g^2
            else:
                self.masked_(x, name)
            if self.is_frozen and not self.is_local:
                m.copy_(x)
            else:
                m.lerp_(x, 1 - b1)  # m <- b1 m + (1 - b1) g

    def corrects_bias(self, group: Mapping[str, Any]) -> bool:
        """Whether momentum and variance are corrected for their bias, as in Adam."""
        return bool(self.options.bias_correction)

    def variance_correction(self, group: Mapping[str, Any]) -> float:
        """1 - b2^t of the variance's own bias, 1.0 if the method corrects none."""
        return 1 - float(group["betas"][1]) ** self.applied_steps if self.corrects_bias(group) else 1.0

    def _is_settled(self, is_rising: bool) -> bool:
        """Whether the warm-up ends after this step; the same on all ranks, since it reads only what they share."""
        if self.freeze_at is None:
            return False
        if self.freeze_at != "auto":
            return self.applied_steps >= int(self.freeze_at)
        group, norms = self.optimizer.param_groups[0], self.state["variance_norms"]
        norm = float(self.state["variance"].sum(dtype=torch.float64)) / self.variance_correction(group)
        place = self.applied_steps % len(norms)
        norms[place] = norm
        earlier = float(norms[(place + 1) % len(norms)])  # of 1/(1 - b2) steps ago; nan before that
        is_late = self.planned is not None and self.applied_steps >= _LATEST * self.planned
        is_stable = min(earlier, norm) >= _STABLE_RATIO * max(earlier, norm)
        return not is_rising and norm > 0 and (is_stable or is_late)

    def _make_mask(self) -> None:
        mask = self.state["variance"].ne(0) & self.state["variance"].isfinite()
        for name, given in self.momentum_mask.items():
            p, view = self.parameters[name], self.index.view(mask, name)
            own = torch.as_tensor(given, device=mask.device).ne(0).expand(p.shape).reshape(-1)
            view.logical_and_(own[shard_start(p) :][: len(view)])
        self.mask = None if bool(mask.all()) else mask


def move_along_(p: Tensor, start: Tensor, kept: float, momentum: Tensor, root: Tensor, rate: float) -> None:
    """p <- kept start - rate momentum / root, computed in float32 and rounded once."""
    x = p.float().copy_(start)  # p itself if it is float32
    if kept != 1.0:
        x.mul_(kept)
    p.copy_(x.addcdiv_(momentum, root, value=-rate))
