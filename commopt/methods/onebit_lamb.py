"""1-bit LAMB: LAMB whose variance and layer-wise rates continue from the freeze, while signs of the momentum are sent."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from commopt import kernels
from commopt.errors import check_option
from commopt.kernels.reference.apply import Lamb, Root
from commopt.method import options
from commopt.optim.frozen import FreezeStep, FrozenOptions, FrozenVariance
from commopt.optim.optimizers import trust_ratio
from commopt.optim.update import move_
from commopt.options import Flag, Fraction, Number, Positive, Share
from commopt.wire.bucket import Bucket, alike
from commopt.wire.state import State


@options
class OnebitLambOptions(FrozenOptions):
    freeze_step: FreezeStep = "auto"
    min_coeff: Annotated[Number, Field(ge=0)] | None = None
    max_coeff: Positive | None = None
    coeff_beta: Fraction = 0.9
    factor_min: Share = 0.5
    factor_max: Annotated[Number, Field(ge=1)] = 4.0
    factor_threshold: Fraction = 0.1
    bias_correction: Flag | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        highest = 10.0 if self.max_coeff is None else self.max_coeff
        wanted = f"a number from 0 to max_coeff, {highest}"
        check_option("min_coeff", self.min_coeff, lambda low: (low or 0.0) <= highest, wanted)


class OnebitLamb(FrozenVariance):
    """LAMB whose momentum is averaged with one bit per element each way once its variance has settled.

    Li et al. 2021, arXiv:2104.06069, Algorithm 1. Steps 1 to freeze_step are LAMB on the exact mean gradient, per
    tensor:
        m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  d = m / (sqrt(v) + eps) + weight_decay x
        c = clamp(||x|| / ||d||, min_coeff, max_coeff);  c' <- coeff_beta c' + (1 - coeff_beta) c;  x <- x - lr c d
    then v and c' stay, w continues from v, and with g_i the local gradient and C scaled signs with error feedback on
    both sides:
        m_i = b1 m + (1 - b1) g_i;  m <- C(mean C(m_i));  g' = (m - b1 m_before) / (1 - b1);  w <- b2 w + (1 - b2) g'^2
        d0 = m / (sqrt(v) + eps);  d = d0 + weight_decay x;  s = min(1, ||d0|| / ||d||)
        f = s max_j((sqrt(v_j) + eps) / (sqrt(w_j) + eps)) + 1 - s, in [factor_min, factor_max], and in [1 -+ factor_threshold] f_before
        x <- x - lr c' f d
    Differs from the paper: scale="rms" is the default, with a scale per block, so that buckets overlap with backward.
    The paper's form is scale="model" with prescale=true. It trained no better (a small network, scikit-learn's digits,
    4 ranks). Rank j then averages the j-th part of every tensor, under one scale; in the released code it averages the
    j-th part of one flat buffer. max_ratio bounds steps, which the paper does not. c' is the mean of its terms from
    the first on, while the paper's starts at 0; a tensor without any has 1. Coordinates whose variance is zero at the
    freeze are masked, as in `onebit_adam`. Masked coordinates do not count in f: a single one would keep it at 1 or
    above. One rank alone does not compress.
    Sends after the freeze 2(N-1)/N x (1/8 + 4/block_size) bytes per parameter and step.
    State: m, v, w, 4 bytes per parameter of worker residual and 4/N of server residual.
    Use it for large batches that need LAMB's rate per layer to train.
    Not for tensors whose gradients are mostly zero: signs move all of their coordinates.

    freeze_step: as in `onebit_adam`.
    min_coeff, max_coeff, bias_correction: as in `commopt.optim.LAMB`; the paper has no bias correction.
    coeff_beta: how slowly c' follows c. factor_min, factor_max, factor_threshold: the bounds of f, and of its change
        in a step.
    scale, block_size, residual_bits: as in `ef_sign`; "rms" by default.
    prescale: with scale="model", bring all tensors to one magnitude before they are compressed, by factors taken from
        the momentum at the freeze.
    max_ratio, momentum_mask: as in `onebit_adam`.
    """

    name = "onebit_lamb"
    keeps_answers = False
    needs_whole = True
    Options = OnebitLambOptions
    options: OnebitLambOptions
    stands_for = ("LAMB", "Lamb", "FusedLamb")
    states: ClassVar[tuple[State, ...]] = (
        *FrozenVariance.states,
        State("fresh_variance"),
        State("coeffs", of="parameter", dtype=torch.int64, on_device=True),  # terms of c'
        State("coeff", of="parameter", dtype=torch.float64, on_device=True),
        State("factor", of="parameter", dtype=torch.float64, initial=1.0, on_device=True),
    )

    def corrects_bias(self, group: Mapping[str, Any]) -> bool:
        given = self.options.bias_correction
        return bool(group.get("bias_correction", False)) if given is None else given

    def bound(self) -> None:
        super().bound()
        if self.device.type == "cpu":  # else the first step would wait for the kernels
            kernel, one = kernels.of("apply", self.device), torch.ones(8, dtype=torch.float32)
            how = Lamb(True, Root(1.0, 1.0), 1.0, 0.0, 1.0, (0.0, 1.0), 0.5, (0.5, 2.0, 0.1), 1.0)
            kernel.directions(one, one, one, one, one.bool(), how)
            kernel.freshen_([one], [one.clone()], [one.clone()], 0.5, 0.5)

    def receive(self, bucket: Bucket) -> None:
        if not self.is_frozen:
            super().receive(bucket)
            return
        self.mask_(bucket)
        for betas, names, xs in self._by_betas(bucket):  # w, then the momentum
            states = (self.parts_of(key, names) for key in ("momentum", "fresh_variance"))
            kernels.of("apply", self.device).freshen_(xs, *states, *betas)

    def update(self, names: Sequence[str], group: Mapping[str, Any]) -> None:
        if kernels.has_triton(self.device):
            self._update_alike(names, group)
            return
        for name, one in self._how(names, group).items():
            state = self.entry(name)
            self._update(self.held(name), name, state, one)
            self.keep(name, state)

    def _update_alike(self, names: Sequence[str], group: Mapping[str, Any]) -> None:
        """`_update` on a GPU: norms and rates stay there."""
        for one, own in alike(names, self._how(names, group).__getitem__).items():
            held = {name: self.held(name) for name in own}
            kernels.of("apply", self.device).lamb_(held, self.index, self.state, one, self.mask)

    def _how(self, names: Sequence[str], group: Mapping[str, Any]) -> dict[str, Lamb]:
        o, (b1, b2), corrects = self.options, group["betas"], self.corrects_bias(group)
        step, variance_step = self.numbers("step", names), self.numbers("variance_step", names)
        of_all = (group["weight_decay"], group["lr"], self._bounds(group), o.coeff_beta)

        def how(name: str) -> Lamb:
            size, lacking = (1 / (1 - b1 ** step[name]), math.sqrt(1 - b2 ** step[name])) if corrects else (1.0, 1.0)
            root, factor = self.root_of(variance_step[name], group), (o.factor_min, o.factor_max, o.factor_threshold)
            return Lamb(self.is_frozen, root, size, *of_all, factor, lacking)

        return {name: how(name) for name in names}

    def _bounds(self, group: Mapping[str, Any]) -> tuple[float, float]:
        """Of the trust ratio; those of the optimizer unless given."""
        low, high = self.options.min_coeff, self.options.max_coeff
        low = group.get("min_coeff", 0.01) if low is None else low
        return low, group.get("max_coeff", 10.0) if high is None else high

    def _update(self, p: Tensor, name: str, state: dict[str, Any], how: Lamb) -> None:
        mask = None if self.mask is None else self.index.view(self.mask, name).view(p.shape)
        fresh = state["fresh_variance"] if how.is_frozen else None
        given = (p, state["momentum"], state["variance"], fresh, mask)
        direction, adam, ratio = kernels.of("apply", self.device).directions(*given, how)
        if how.is_frozen:
            share = None  # of the direction that is not decay
            if how.decay:
                whole = float(direction.norm())
                share = min(1.0, float(adam.norm()) / whole) if whole > 0 else 1.0
            state["factor"] = self._factor(ratio, share, state["factor"])
            mean = state["coeff"] / (1 - how.beta ** state["coeffs"]) if state["coeffs"] else 1.0
            coeff = mean * state["factor"]
        else:
            coeff = trust_ratio(p, direction, *how.bounds)
            if coeff != 1.0:  # it is 1 if a norm is 0
                state["coeff"] += (1 - how.beta) * (coeff - state["coeff"])
                state["coeffs"] += 1
        move_([p], [direction], how.lr * coeff)

    def _factor(self, ratio: float, share: float | None, before: float) -> float:
        """f, which adapts a tensor's rate from the warm-up to its variance since then."""
        if ratio == 0.0:  # no element, or all of them masked
            return before
        factor = ratio if share is None else ratio * share + 1 - share
        factor = min(max(factor, self.options.factor_min), self.options.factor_max)
        threshold = self.options.factor_threshold
        return float(min(max(factor, before * (1 - threshold)), before * (1 + threshold)))

    def freeze(self) -> None:
        super().freeze()
        self.state["fresh_variance"].copy_(self.state["variance"])
