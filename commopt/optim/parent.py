"""What the optimizers here share: a step over all parameters that have a gradient."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from commopt.errors import check_option


class Parent(torch.optim.Optimizer):
    """What these optimizers share: a step over all parameters that have a gradient."""

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, self.state[p], group)
        return loss

    @abstractmethod
    def _update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Move one parameter."""


def check_adam(lr: float, betas: Sequence[float], weight_decay: float, **above_0: float) -> None:
    """Raise ConfigError for a value out of range; above_0: further options, which must be positive."""
    check_option("lr", lr, lambda x: x >= 0, "a number of at least 0")
    wanted = "two numbers in [0, 1), as in [0.9, 0.99]"
    check_option("betas", betas, lambda x: len(x) == 2 and all(0 <= b < 1 for b in x), wanted)
    check_option("weight_decay", weight_decay, lambda x: x >= 0, "a number of at least 0")
    for option, value in above_0.items():
        check_option(option, value, lambda x: x > 0, "a number above 0")
