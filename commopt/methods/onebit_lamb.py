"""1-bit LAMB: LAMB whose variance and layer-wise rates are carried on from the freeze, while signs of the momentum travel."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from commopt.compress.sign import check_prescale, equalising_factors, scaled_sign
from commopt.errors import check_flag, check_option
from commopt.exchange.compressed import TwoWayMean
from commopt.exchange.mean import Mean
from commopt.groups.base import Group
from commopt.optim.parents import trust_ratio
from commopt.optim.update import FrozenVariance, move_
from commopt.wire.bucket import Bucket


class OnebitLamb(FrozenVariance):
    """LAMB whose momentum is averaged with one bit per element each way once its variance has settled.

    Li et al. 2021, arXiv:2104.06069, Algorithm 1. Steps 1 to freeze_step are LAMB on the exact mean gradient, per tensor:
        m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  d = m / (sqrt(v) + eps) + weight_decay x
        c = clamp(||x|| / ||d||, min_coeff, max_coeff);  c' <- coeff_beta c' + (1 - coeff_beta) c;  x <- x - lr c d
    then v and c' stay, w goes on from v, and with g_i the local gradient and C scaled signs with error feedback on both sides:
        m_i = b1 m + (1 - b1) g_i;  m <- C(mean C(m_i));  g' = (m - b1 m_before) / (1 - b1);  w <- b2 w + (1 - b2) g'^2
        d0 = m / (sqrt(v) + eps);  d = d0 + weight_decay x;  s = min(1, ||d0|| / ||d||)
        f = s max_j((sqrt(v_j) + eps) / (sqrt(w_j) + eps)) + 1 - s, in [factor_min, factor_max], and in [1 -+ factor_threshold] f_before
        x <- x - lr c' f d
    Differs from the paper: scale="l1" is the default, a scale per block, with which buckets overlap with backward; the paper's
    form is scale="model" with prescale=true, and trained no better (a small network, scikit-learn's digits, 4 ranks). c' is the
    mean of its terms from the first on, where the paper's starts at 0; a tensor without any has 1. Coordinates whose variance is
    zero at the freeze are masked, as in `onebit_adam`, and masked coordinates have no say in f: one alone would hold it at 1 or
    above. One rank alone does not compress.
    Sends after the freeze 2(N-1)/N x (1/8 + 4/block_size) bytes per parameter and step.
    State: m, v, w, 4 bytes per parameter of worker residual and 4/N of server residual.
    Use it for large batches, where LAMB's rate per layer is what makes them train.
    Not for tensors whose gradients are mostly zero: signs move all of their coordinates.

    freeze_step: as in `onebit_adam`.
    min_coeff, max_coeff, bias_correction: as in `commopt.optim.parents.LAMB`; the paper has no bias correction.
    coeff_beta: how slowly c' follows c. factor_min, factor_max, factor_threshold: the bounds of f, and of its change in a step.
    scale, block_size, residual_bits: as in `ef_sign`.
    prescale: with scale="model", bring all tensors to one magnitude before they are compressed, by factors taken from the
        momentum at the freeze.
    momentum_mask: as in `onebit_adam`.
    max_norm, grad_scaler: see `Aggregator`. In the warm-up the norm is that of the mean gradient.
    """

    name = "onebit_lamb"
    arenas: ClassVar[tuple[str, ...]] = ("momentum", "variance", "fresh_variance")
    counters: ClassVar[tuple[str, ...]] = ("step", "variance_step", "coeffs")
    numbers: ClassVar[Mapping[str, float]] = {"coeff": 0.0, "factor": 1.0}

    def __init__(
        self,
        named_params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        freeze_step: int | str = "auto",
        min_coeff: float = 0.01,
        max_coeff: float = 10.0,
        coeff_beta: float = 0.9,
        factor_min: float = 0.5,
        factor_max: float = 4.0,
        factor_threshold: float = 0.1,
        bias_correction: bool = False,
        scale: str = "l1",
        block_size: int = 2048,
        prescale: bool = False,
        residual_bits: int = 32,
        momentum_mask: Mapping[str, Tensor] | None = None,
        max_ratio: float | None = 3.0,
        max_norm: float | None = None,
        grad_scaler: Any = None,
    ) -> None:
        check_flag("bias_correction", bias_correction)
        check_option("max_coeff", max_coeff, lambda x: 0 < x < math.inf, "a number above 0")
        up_to_coeff = f"a number from 0 to max_coeff, {max_coeff}"
        check_option("min_coeff", min_coeff, lambda x: 0 <= x <= max_coeff, up_to_coeff)
        check_option("coeff_beta", coeff_beta, lambda x: 0 <= x < 1, "a number in [0, 1)")
        check_option("factor_max", factor_max, lambda x: 1 <= x < math.inf, "a number of at least 1")
        check_option("factor_min", factor_min, lambda x: 0 < x <= 1, "a number above 0, at most 1")
        check_option("factor_threshold", factor_threshold, lambda x: 0 <= x < 1, "a number in [0, 1)")
        check_prescale(prescale, scale)
        self._mean = Mean()
        self._two_way = TwoWayMean(scaled_sign(scale, block_size), residual_bits=residual_bits)
        self.made_of = (self._mean, self._two_way)
        self.merges_buckets = self._two_way.merges_buckets
        self.bias_correction, self.prescale = bias_correction, prescale
        super().__init__(
            named_params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "min_coeff": min_coeff,
                "max_coeff": max_coeff,
                "coeff_beta": coeff_beta,
                "factor_min": factor_min,
                "factor_max": factor_max,
                "factor_threshold": factor_threshold,
            },
            freeze_step=freeze_step,
            momentum_mask=momentum_mask,
            max_ratio=max_ratio,
            max_norm=max_norm,
            grad_scaler=grad_scaler,
        )

    def bind(self, named_parameters: Sequence[tuple[str, Tensor]], group: Group) -> None:
        super().bind(named_parameters, group)
        self._name_of = {id(p): name for name, p in named_parameters}

    @property
    def is_exact(self) -> bool:
        return not self.is_frozen

    def aggregate(self, bucket: Bucket, group: Group) -> None:
        if not self.is_frozen:
            return self._mean.aggregate(bucket, group)
        for name, g in bucket.views():
            m, b1 = self.part("momentum", name), self.options(name)["betas"][0]
            torch.lerp(m, g, 1 - b1, out=g)  # m_i = b1 m + (1 - b1) g_i
        return self._two_way.aggregate(bucket, group)

    def receive(self, bucket: Bucket) -> None:
        for name, x in bucket.views():
            m, v, w = (self.part(key, name) for key in self.arenas)
            b1, b2 = self.options(name)["betas"]
            if self.is_frozen:
                self.masked_(x, name)
                g = torch.sub(x, m, alpha=b1).div_(1 - b1)  # g' = (m - b1 m_before) / (1 - b1)
                w.mul_(b2).addcmul_(g, g, value=1 - b2)  # w <- b2 w + (1 - b2) g'^2
                m.copy_(x)
            else:
                m.lerp_(x, 1 - b1)  # m <- b1 m + (1 - b1) g
                v.mul_(b2).addcmul_(x, x, value=1 - b2)  # v <- b2 v + (1 - b2) g^2

    def count(self, state: dict[str, Any]) -> None:
        state["step"] += 1
        state["variance_step"] += not self.is_frozen

    def update(self, p: Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        root, size = state["variance"].sqrt(), 1.0
        lacking = math.sqrt(1 - group["betas"][1] ** state["variance_step"]) if state["variance_step"] else 1.0
        if self.bias_correction:
            root /= lacking
            size = 1 / (1 - group["betas"][0] ** state["step"])
        root += group["eps"]
        if self.is_frozen and self.ranks > 1:
            bounded = self.bounded(root, state["momentum"], 1.0 if self.bias_correction else lacking)
        else:
            bounded = root
        adam = size * state["momentum"] / bounded
        direction = adam + group["weight_decay"] * p.float() if group["weight_decay"] else adam
        if self.is_frozen:
            state["factor"] = self._factor(p, state, group, root, adam, direction)
            mean = state["coeff"] / (1 - group["coeff_beta"] ** state["coeffs"]) if state["coeffs"] else 1.0
            coeff = mean * state["factor"]
        else:
            coeff = trust_ratio(p, direction, group["min_coeff"], group["max_coeff"])
            if coeff != 1.0:  # 1 is what it is where a norm is 0
                state["coeff"] += (1 - group["coeff_beta"]) * (coeff - state["coeff"])
                state["coeffs"] += 1
        move_(p, direction, group["lr"] * coeff)

    def _factor(
        self,
        p: Parameter,
        state: Mapping[str, Any],
        group: Mapping[str, Any],
        root: Tensor,
        adam: Tensor,
        direction: Tensor,
    ) -> float:
        """f, by which the rate of a tensor goes on from that of the warm-up as its variance would."""
        fresh = state["fresh_variance"].sqrt()
        if self.bias_correction:
            fresh /= math.sqrt(1 - group["betas"][1] ** state["step"])
        ratio = self.masked_((root / (fresh + group["eps"])).view(-1), self._name_of[id(p)])
        factor = float(ratio.max()) if ratio.numel() else 0.0
        if factor == 0.0:  # no element, or all of them masked
            return float(state["factor"])
        if group["weight_decay"]:
            whole = float(direction.norm())
            share = min(1.0, float(adam.norm()) / whole) if whole > 0 else 1.0
            factor = factor * share + 1 - share
        factor = min(max(factor, group["factor_min"]), group["factor_max"])
        threshold, before = group["factor_threshold"], state["factor"]
        return float(min(max(factor, before * (1 - threshold)), before * (1 + threshold)))

    def variance_correction(self, group: Mapping[str, Any]) -> float:
        return 1 - float(group["betas"][1]) ** self.applied_steps if self.bias_correction else 1.0

    def freeze(self) -> None:
        super().freeze()
        self.arena["fresh_variance"].copy_(self.arena["variance"])
        if self.prescale:
            self._two_way.factors = equalising_factors(self.arena["momentum"], self.index)

    def bytes_per_parameter(self, ranks: int) -> float:
        return self._two_way.bytes_per_parameter(ranks)

    @property
    def state_form(self) -> str:
        return self._two_way.state_form
