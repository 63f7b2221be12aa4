"""Local SGD: every rank trains by itself, and now and then all take the mean of their parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from commopt.errors import AttachError, check_option
from commopt.gossip.loop import Exchanged, Round
from commopt.groups.peers import Peers
from commopt.methods.diloco import DiLoCo
from commopt.optim.parents import Parent, check_adam


class LocalSGD(DiLoCo):
    """Average the parameters every `every` steps; local Adam where the inner optimizer is Adam.

    Stich 2018, arXiv:1805.09767; McMahan et al. 2016, arXiv:1602.05629 (FedAvg). As DiLoCo with SGD of rate 1 as its outer optimizer:
        theta_i <- mean over those present of theta_j
    The variants of local adaptive methods differ in what becomes of the inner optimizer's moments: kept by each rank (the default);
    averaged with the parameters, as in Chen et al. 2020, arXiv:2009.06675 (`average_state: [exp_avg_sq]`); or averaged, and held between
    two averages as the scale that all ranks step by (the same with the optimizer `savic`).
    Sends 8 (N-1)/N / every bytes a parameter and step, and as much for each state that is averaged.
    State: the parameters of the last average 4 (and residuals with a compressed message).
    Use it as the baseline that DiLoCo and NoLoCo are judged by, or for a few steps between averages.
    Not for many steps between averages: DiLoCo's outer momentum makes up for them.

    average_state: names of the inner optimizer's state that is averaged too, as torch calls it: exp_avg, exp_avg_sq.
    """

    name = "local_sgd"
    positional: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        *,
        every: int = 10,
        average_state: Sequence[str] = (),
        fragments: int = 1,
        participation: float = 1.0,
        delay: int = 0,
        timeout_s: float = 20.0,
        message: Any = None,
        final_average: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            every=every,
            outer="sgd",
            lr=1.0,
            fragments=fragments,
            participation=participation,
            delay=delay,
            timeout_s=timeout_s,
            message=message,
            final_average=final_average,
            seed=seed,
        )
        wanted = "a list of names, as in [exp_avg_sq]"
        check_option(
            "average_state",
            average_state,
            lambda x: not isinstance(x, str) and all(isinstance(key, str) and key for key in x),
            wanted,
        )
        self.averaged_state = tuple(average_state)

    def bind(self, named_parameters: Sequence[tuple[str, Tensor]], peers: Peers) -> None:
        super().bind(named_parameters, peers)
        self.has_averaged = torch.zeros(1, dtype=torch.int64)  # since the last step

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        super().check_optimizer(optimizer)
        if isinstance(optimizer, SAVIC) and (
            "exp_avg_sq" not in self.averaged_state or self.delay > 0 or self.fragments > 1
        ):
            raise AttachError(
                "savic steps by the averaged scale: write average_state: [exp_avg_sq], without delay and fragments, or use adam"
            )

    def apply(self, x: Tensor, round: Round, exchanged: Exchanged) -> Tensor:
        self.has_averaged.fill_(int("delta" in exchanged.values))
        return super().apply(x, round, exchanged)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        if bool(self.has_averaged) and isinstance(optimizer, SAVIC):
            optimizer.take_scale()
        self.has_averaged.zero_()

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "has averaged": self.has_averaged}

    def bytes_per_parameter(self, ranks: int) -> float:
        return super().bytes_per_parameter(ranks) * (1 + len(self.averaged_state))


class SAVIC(Parent):
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
        check_adam(lr, betas, weight_decay)
        check_option("alpha", alpha, lambda x: x > 0, "a number above 0")
        super().__init__(
            params,
            {"lr": lr, "betas": tuple(betas), "alpha": alpha, "weight_decay": weight_decay, "has_scale": False},
        )

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
        torch.div(
            state["exp_avg_sq"].clamp(min=0).sqrt_(), root, out=state["scale"]
        )  # compressed averages may be below 0
