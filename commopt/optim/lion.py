"""Lion, which torch does not have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from commopt.optim.parent import Parent, check_adam


class Lion(Parent):
    """Chen et al. 2023, arXiv:2302.06675: x <- x - lr (sign(b1 m + (1 - b1) g) + weight_decay x);  m <- b2 m + (1 - b2) g.

    sign(0) is 0, as in the paper. State: m.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: Sequence[float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        check_adam(lr, betas, weight_decay)
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    def _update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        m, (b1, b2) = state["momentum"], group["betas"]
        direction = torch.lerp(m, g, 1 - b1).sign_()
        m.lerp_(g, 1 - b2)
        p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
