"""SAVIC, an Adam whose local steps have the same scale on all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from commopt.optim.adam import AdamLike


class SAVIC(AdamLike):
    """Adam whose local steps have the same scale on all ranks: that of the last average.

        m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  x <- x - lr (m / (1 - b1^t)) / max(D, alpha)
        at each average, of x and v over the ranks:  D <- sqrt(v / (1 - b2^t))
    After Chezhegov et al. 2024, arXiv:2406.00846: local steps with a scaling that changes at synchronisation only, bounded from below
    by alpha. Its local steps have no momentum (b1 = 0), and its D takes in the gradient of that moment; here v takes in those of all
    local steps, as in local AdaAlter (Xie et al. 2019, arXiv:1911.09030), which holds its denominator likewise. Until the first average
    D is this rank's own, as in Adam, which this is with methods other than local_sgd. weight_decay is decoupled.
    State: exp_avg, exp_avg_sq, scale.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        alpha: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, betas, weight_decay, alpha=alpha, has_scale=False)

    def take_scale(self) -> None:
        """Step by the averaged v from now on."""
        for group in self.param_groups:
            group["has_scale"] = True
            for p in group["params"]:
                if self.state[p]:
                    self._set_scale(self.state[p], group)

    def _update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state |= {"step": 0} | {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq", "scale")}
        state["step"] += 1
        b1, b2 = group["betas"]
        state["exp_avg"].lerp_(g, 1 - b1)
        state["exp_avg_sq"].mul_(b2).addcmul_(g, g, value=1 - b2)
        if not group["has_scale"]:
            self._set_scale(state, group)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        size = group["lr"] / (1 - b1 ** state["step"])
        p.addcdiv_(state["exp_avg"], state["scale"].clamp(min=group["alpha"]), value=-size)

    def _set_scale(self, state: dict[str, Any], group: dict[str, Any]) -> None:
        root = (1 - group["betas"][1] ** state["step"]) ** 0.5
        # compressed averages may be below 0
        torch.div(state["exp_avg_sq"].clamp(min=0).sqrt_(), root, out=state["scale"])
