"""Adaptive outer optimizers: they move shared parameters by the mean of what replicas changed in a round, given as -gradient."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from commopt.errors import check_option
from commopt.optim.optimizers import PerParameterOptimizer


class _FedOpt(PerParameterOptimizer):
    """Reddi et al. 2020, arXiv:2003.00295, Algorithm 2, for D, the mean over replicas of their change, which is -p.grad.

        m <- b1 m + (1 - b1) D;  v <- as each class says;  x <- x + lr m / (sqrt(v) + tau)
    v starts at tau^2, the least that the paper allows, and nothing is corrected for bias. The smaller tau, the more adaptive.
    """

    def __init__(self, params: Iterable[Any], lr: float, tau: float, **betas: float) -> None:
        check_option("lr", lr, lambda x: x >= 0, "a number of at least 0")
        check_option("tau", tau, lambda x: x >= 1.1e-19, "a number above 0")  # its square, too
        for name, beta in betas.items():
            check_option(name, beta, lambda b: 0 <= b < 1, "a number in [0, 1), as in 0.9")
        super().__init__(params, {"lr": lr, "tau": tau, **betas})

    def _update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state |= {"momentum": torch.zeros_like(p), "variance": torch.full_like(p, group["tau"] ** 2)}
        m, v = state["momentum"], state["variance"]
        m.mul_(group["beta1"]).sub_(g, alpha=1 - group["beta1"])
        self._take_in_(v, g * g, group)
        p.addcdiv_(m, v.sqrt().add_(group["tau"]), value=group["lr"])

    @abstractmethod
    def _take_in_(self, v: Tensor, square: Tensor, group: dict[str, Any]) -> None:
        """Update v by D^2."""


class FedAdagrad(_FedOpt):
    """v <- v + D^2 (Reddi et al. 2020, arXiv:2003.00295, Algorithm 2). Without momentum, as the paper runs it. State: m, v."""

    def __init__(self, params: Iterable[Any], lr: float = 0.01, beta1: float = 0.0, tau: float = 1e-3) -> None:
        super().__init__(params, lr, tau, beta1=beta1)

    def _take_in_(self, v: Tensor, square: Tensor, group: dict[str, Any]) -> None:
        v.add_(square)


class FedAdam(_FedOpt):
    """v <- b2 v + (1 - b2) D^2 (Reddi et al. 2020, arXiv:2003.00295, Algorithm 2). State: m, v."""

    def __init__(
        self, params: Iterable[Any], lr: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
    ) -> None:
        super().__init__(params, lr, tau, beta1=beta1, beta2=beta2)

    def _take_in_(self, v: Tensor, square: Tensor, group: dict[str, Any]) -> None:
        v.mul_(group["beta2"]).add_(square, alpha=1 - group["beta2"])


class FedYogi(FedAdam):
    """v <- v - (1 - b2) D^2 sign(v - D^2) (Reddi et al. 2020, arXiv:2003.00295, Algorithm 2), so v grows as D^2 does. State: m, v."""

    def _take_in_(self, v: Tensor, square: Tensor, group: dict[str, Any]) -> None:
        v.addcmul_(square, (v - square).sign_(), value=-(1 - group["beta2"]))
