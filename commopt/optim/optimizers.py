"""Adam and Lion in the forms that torch does not have, and what the optimizers here share."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from commopt.errors import check_flag, check_option


class PerParameterOptimizer(torch.optim.Optimizer):
    """A step over all parameters that have a gradient."""

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
    def _update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None: ...


class AdamLike(PerParameterOptimizer):
    """An optimizer with two betas and weight decay. Raises ConfigError for a value out of range; `eps` and `alpha` must be positive."""

    def __init__(
        self, params: Iterable[Any], lr: float, betas: Sequence[float], weight_decay: float, **own: Any
    ) -> None:
        check_option("lr", lr, lambda x: x >= 0, "a number of at least 0")
        wanted = "two numbers in [0, 1), as in [0.9, 0.99]"
        check_option("betas", betas, lambda x: len(x) == 2 and all(0 <= b < 1 for b in x), wanted)
        check_option("weight_decay", weight_decay, lambda x: x >= 0, "a number of at least 0")
        for option in {"eps", "alpha"} & set(own):
            check_option(option, own[option], lambda x: x >= 1.2e-38, "a number above 0")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay, **own})


class AccumAdam(AdamLike):
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
        check_option("accum_iter", accum_iter, lambda s: isinstance(s, int) and s >= 1, "a whole number from 1")
        check_flag("decay_1d", decay_1d)
        super().__init__(params, lr, betas, weight_decay, eps=eps, accum_iter=accum_iter, decay_1d=decay_1d)

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


class LAMB(AdamLike):
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
        wanted = f"a number from 0 to max_coeff, {max_coeff}"
        check_option("min_coeff", min_coeff, lambda x: 0 <= x <= max_coeff, wanted)
        own = {"min_coeff": min_coeff, "max_coeff": max_coeff, "bias_correction": bias_correction}
        super().__init__(params, lr, betas, weight_decay, eps=eps, **own)

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


class Lion(AdamLike):
    """Chen et al. 2023, arXiv:2302.06675: x <- x - lr (sign(b1 m + (1 - b1) g) + weight_decay x);  m <- b2 m + (1 - b2) g.

    sign(0) is 0, as in the paper. State: m.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-4, betas: Sequence[float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, lr, betas, weight_decay)

    def _update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        m, (b1, b2) = state["momentum"], group["betas"]
        direction = torch.lerp(m, g, 1 - b1).sign_()
        m.lerp_(g, 1 - b2)
        p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])


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
