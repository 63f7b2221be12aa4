"""Adam-like methods that freeze their variance, and compress from then on."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from commopt import kernels
from commopt.compress.feedback import Kept
from commopt.compress.options import SignOptions, SignScale
from commopt.compress.sign import equalising_factors
from commopt.errors import AttachError
from commopt.exchange.mean import Mean
from commopt.exchange.two_way import TwoWayMean
from commopt.groups.base import Group
from commopt.kernels.reference.apply import Move, Root
from commopt.optim.update import UpdateMethod
from commopt.options import Count, Positive, Wanted, options
from commopt.wire.bucket import MOST_LAYOUTS, Bucket, ParameterIndex, alike
from commopt.wire.shards import shard_start
from commopt.wire.state import State

_log = logging.getLogger(__name__)
_STABLE_RATIO = 0.96
_LATEST = 0.25  # the share of a run by which "auto" freezes
_PIECE = 1 << 22  # elements of the variance that are looked at together

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
    keeps_answers: ClassVar[bool] = True  # frozen, answers are the momentum; `receive` needs no earlier one
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
        self.signs = self.options.compressor()
        self.two_way = TwoWayMean(self.signs, Kept(self.options.residual_bits))
        self.parts = (self.mean, self.two_way)
        self.merges_buckets, self.state_form = self.two_way.merges_buckets, self.two_way.state_form
        self.momentum_mask = dict(self.options.momentum_mask or {})
        self._hidden: dict[Any, Tensor] = {}  # by a bucket's layout, (n,) bool, True if momentum is masked
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

    def bound(self) -> None:
        super().bound()
        if self.device.type == "cpu":  # else the first step would wait for the kernel
            one, index = torch.ones(8, dtype=torch.float32), ParameterIndex(("x",), (8,))
            kernels.of("apply", self.device).move_(
                {"x": one}, index, one.clone(), one.clone(), Move(Root(1.0, 1.0), 1.0)
            )

    def restored(self) -> None:
        super().restored()
        if self.is_frozen:
            self._make_mask()

    def exchange(self, bucket: Bucket, group: Group) -> None:
        if self.is_exact:
            return self.mean.exchange(bucket, group)
        states = self.accumulates(bucket) if self.is_frozen else []
        weights = [[*alike(bucket.names, weight)] for _, weight in states]
        two_way = self.two_way
        # then kernels blend while they compress, and write the momentum while they decode
        fits = self.signs.blends(self.device) and self.ranks > 1 and self.share is None and two_way.factors is None
        two_way.mask = self.mask if fits and not kernels.has_triton(self.device) else None
        is_hidden = self.mask is None or two_way.mask is not None
        two_way.also = self.state["momentum"] if fits and states and is_hidden and self.keeps_answers else None
        if fits and self.options.residual_bits == 32 and all(len(one) == 1 for one in weights):
            two_way.blended = tuple((self.state[key], w) for (key, _), (w,) in zip(states, weights, strict=True))
        else:
            two_way.blended = ()
            for key, weight in states:
                self.blend_(key, bucket, weight)
        return two_way.exchange(bucket, group)

    def accumulates(self, bucket: Bucket) -> list[tuple[str, Callable[[str], float]]]:
        """What gradients become after the freeze, before they are exchanged: x <- s + weight (x - s), with these states in turn."""
        return [("momentum", lambda name: 1 - self.betas(name)[0])]  # m_i = b1 m + (1 - b1) g_i

    def count(self, names: Sequence[str]) -> None:
        self.state["step"][self._positions(names)] += 1
        if self.is_exact:
            self.state["variance_step"][self._positions(names)] += 1

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
            for m, own in zip(torch.split(self.state["momentum"], _PIECE), torch.split(self.mask, _PIECE), strict=True):
                m.masked_fill_(~own, 0.0)
        if self.options.prescale:
            self.two_way.factors = equalising_factors(self.state["momentum"], self.index)

    def mask_(self, bucket: Bucket) -> None:
        """Zeros where the momentum is masked, unless what has been decoded is."""
        if self.mask is None or (self.two_way.mask is not None and not self.is_local):
            return
        layout = (bucket.names, bucket.starts)
        if layout not in self._hidden:
            if len(self._hidden) > MOST_LAYOUTS:
                self._hidden.clear()
            self._hidden[layout] = torch.cat([~self.index.view(self.mask, name) for name in bucket.names])
        bucket.flat.masked_fill_(self._hidden[layout], 0.0)

    @property
    def has_signs(self) -> bool:
        """Whether the momentum is made of signs by now, which do not shrink where the variance does."""
        return self.is_frozen and self.ranks > 1

    def root_of(self, variance_steps: int, group: Mapping[str, Any]) -> Root:
        """sqrt(v) + eps; once signs have come in, raised where |momentum| over it would exceed `max_ratio`."""
        lacking = math.sqrt(1 - group["betas"][1] ** variance_steps) if variance_steps else 1.0
        divisor, rest = (lacking, 1.0) if self.corrects_bias(group) else (1.0, lacking)
        max_ratio = self.options.max_ratio if self.has_signs else None
        return Root(divisor, group["eps"], 0.0 if max_ratio is None else rest / max_ratio)

    def move_(self, how: Mapping[str, Move], start: Tensor | None = None, mean: Tensor | None = None) -> None:
        """Step parameters along the momentum, each as told by name; start, mean: flat tensors of all, see `Move`."""
        kernel, moments = kernels.of("apply", self.device), (self.state["momentum"], self.state["variance"])
        for one, names in alike(how, how.__getitem__).items():
            kernel.move_({name: self.held(name) for name in names}, self.index, *moments, one, start, mean)

    def receive(self, bucket: Bucket) -> None:
        if self.is_exact:
            self.adapt_("variance", bucket)
        else:
            self.mask_(bucket)
        if self.is_frozen and not self.is_local:
            if self.two_way.also is None:
                torch._foreach_copy_(self.parts_of("momentum", bucket.names), [x for _, x in bucket.views()])
        else:
            self.follow_(bucket)

    def adapt_(self, key: str, bucket: Bucket) -> None:
        """Take gradients into the variance that is the state `key`."""
        for (_, b2), names, gs in self._by_betas(bucket):
            vs = self.parts_of(key, names)
            torch._foreach_mul_(vs, b2)
            torch._foreach_addcmul_(vs, gs, gs, value=1 - b2)  # v <- b2 v + (1 - b2) g^2

    def follow_(self, bucket: Bucket) -> None:
        """Take gradients into the momentum."""
        for (b1, _), names, gs in self._by_betas(bucket):
            torch._foreach_lerp_(self.parts_of("momentum", names), gs, 1 - b1)  # m <- b1 m + (1 - b1) g

    def _by_betas(self, bucket: Bucket) -> Iterator[tuple[tuple[float, float], list[str], list[Tensor]]]:
        """The parameters of a bucket that have the same betas: these, names, and views."""
        views = dict(bucket.views())
        for betas, names in self.by_betas(bucket.names).items():
            yield betas, names, [views[name] for name in names]

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
        mask = torch.empty_like(self.state["variance"], dtype=torch.bool)
        pieces = zip(torch.split(mask, _PIECE), torch.split(self.state["variance"], _PIECE), strict=True)
        for own, v in pieces:  # a piece at a time, because isfinite takes as much memory again
            torch.logical_and(v.ne(0), v.isfinite(), out=own)
        for name, given in self.momentum_mask.items():
            p, view = self.parameters[name], self.index.view(mask, name)
            own = torch.as_tensor(given, device=mask.device).ne(0).expand(p.shape).reshape(-1)
            view.logical_and_(own[shard_start(p) :][: len(view)])
        self.mask = None if bool(mask.all()) else mask
        self._hidden.clear()
