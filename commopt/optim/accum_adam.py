"""AccumAdam, an Adam for replicas that average parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from commopt.errors import check_flag, check_option
from commopt.optim.parent import Parent, check_adam


class AccumAdam(Parent):
    """Adam whose moments take in the mean gradient of `accum_iter` steps at once, while every step still moves by its own gradient.

        A <- A + g / s;  m' = b1 m + (1 - b1) g;  v' = b2 v + (1 - b2) g^2;  k = ceil(t / s)
        x <- x - lr (m' / (1 - b1^k)) / (sqrt(v' / (1 - b2^k)) + eps)
        every s steps:  m <- b1 m + (1 - b1) A;  v <- b2 v + (1 - b2) A^2;  A <- 0
    Wang et al. 2024, arXiv:2410.11998: less noise in the variance, for replicas that average parameters and not gradients; s grows
    with their number. s = 1 is Adam. weight_decay is decoupled, x <- (1 - lr weight_decay) x first, as in AdamW, and acts on tensors
    of two or more dimensions only, unless decay_1d: the released code decays biases and norms, and no weights. State: m, v, A, t.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        accum_iter: int = 4,
        decay_1d: bool = False,
    ) -> None:
        check_adam(lr, betas, weight_decay, eps=eps)
        check_option("accum_iter", accum_iter, lambda s: isinstance(s, int) and s >= 1, "a whole number from 1")
        check_flag("decay_1d", decay_1d)
        kept = {"weight_decay": weight_decay, "accum_iter": accum_iter, "decay_1d": decay_1d}
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, **kept})

    def _update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state |= {"step": 0} | {name: torch.zeros_like(p) for name in ("momentum", "variance", "accumulated")}
        state["step"] += 1
        m, v, mean = state["momentum"], state["variance"], state["accumulated"]
        (b1, b2), s, k = group["betas"], group["accum_iter"], math.ceil(state["step"] / group["accum_iter"])
        if p.ndim >= 2 or group["decay_1d"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])
        mean.add_(g, alpha=1 / s)
        direction = torch.lerp(m, g, 1 - b1).div_(1 - b1**k)
        root = (b2 * v).addcmul_(g, g, value=1 - b2).div_(1 - b2**k).sqrt_()
        p.addcdiv_(direction, root.add_(group["eps"]), value=-group["lr"])
        if state["step"] % s == 0:
            m.lerp_(mean, 1 - b1)
            v.mul_(b2).addcmul_(mean, mean, value=1 - b2)
            mean.zero_()
