"""LAMB, which torch does not have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from commopt.errors import check_option
from commopt.optim.parent import Parent, check_adam


class LAMB(Parent):
    """You et al. 2019, arXiv:1904.00962: Adam whose step is scaled, per tensor, to the norm of its weights.

        d = m / (sqrt(v) + eps) + weight_decay x;  x <- x - lr clamp(||x|| / ||d||, min_coeff, max_coeff) d
    The ratio is 1 where either norm is 0. bias_correction: as in Adam; 1-bit LAMB has none. State: m, v.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        min_coeff: float = 0.01,
        max_coeff: float = 10.0,
        bias_correction: bool = False,
    ) -> None:
        check_adam(lr, betas, weight_decay, eps=eps)
        check_option(
            "min_coeff", min_coeff, lambda x: 0 <= x <= max_coeff, f"a number from 0 to max_coeff, {max_coeff}"
        )
        kept = {"min_coeff": min_coeff, "max_coeff": max_coeff, "bias_correction": bias_correction}
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, **kept})

    def _update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state |= {"step": 0, "momentum": torch.zeros_like(p), "variance": torch.zeros_like(p)}
        state["step"] += 1
        m, v, (b1, b2) = state["momentum"], state["variance"], group["betas"]
        m.lerp_(g, 1 - b1)
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        root, size = v.sqrt(), 1.0
        if group["bias_correction"]:
            root, size = root / math.sqrt(1 - b2 ** state["step"]), 1 / (1 - b1 ** state["step"])
        direction = size * m / (root + group["eps"]) + group["weight_decay"] * p
        p.add_(direction, alpha=-group["lr"] * trust_ratio(p, direction, group["min_coeff"], group["max_coeff"]))


def trust_ratio(x: Tensor, direction: Tensor, min_coeff: float, max_coeff: float) -> float:
    """clamp(||x|| / ||direction||, min_coeff, max_coeff), and 1 where either norm is 0."""
    weight, step = float(x.float().norm()), float(direction.float().norm())
    return min(max(weight / step, min_coeff), max_coeff) if weight > 0 and step > 0 else 1.0
