"""1-bit Adam: after a warm-up the variance is frozen, and only signs of the momentum travel."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import Parameter

from commopt.aggregate import Aggregator, Mean, State, TwoWayMean, clip_joint_norm_
from commopt.bucket import Bucket
from commopt.compress.sign import scaled_sign
from commopt.errors import AttachError, CheckpointError, ConfigError, check_option
from commopt.groups.base import Group

_STABLE_RATIO = 0.96


class OnebitAdam(torch.optim.Optimizer, Aggregator):
    """Adam whose momentum is averaged with one bit per element each way once its variance has settled.

    Tang et al. 2021, arXiv:2102.02888, Algorithm 1. Steps 1 to freeze_step are Adam on the exact mean gradient:
        m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  x <- x - lr (m / (sqrt(v) + eps) + weight_decay x)
    then v stays, and with g_i the local gradient and C scaled signs with error feedback on both sides:
        m_i = b1 m + (1 - b1) g_i;  m <- C(mean C(m_i));  x <- x - lr (m / (sqrt(v) + eps) + weight_decay x)
    Differs from the paper's code: bias correction is on by default, as in torch.optim.Adam; at the freeze v keeps the
    correction that it has, and m's goes on, so that no step jumps. Coordinates whose variance is zero at the freeze, which a sign
    would move by lr * scale / eps, are masked: their momentum stays zero. One rank alone does not compress.
    Sends after the freeze 2(N-1)/N x (1/8 + 4/block_size) bytes per parameter and step.
    State: m, v, 4 bytes per parameter of worker residual and 4/N of server residual.

    freeze_step: the last step with the exact mean, best 15 to 25 % of all and not before the learning rate's own
        warm-up ends; or "auto": when |v|_1 has changed by less than 4 % over 1/(1 - b2) steps, and the rate no longer rises.
    scale, block_size: as in `ef_sign`.
    momentum_mask: {parameter name: tensor of its shape}; momentum is multiplied by it after the freeze, for coordinates
        that get gradients only later (positions beyond the sequence length).
    max_norm, grad_scaler: see `Aggregator`. In the warm-up the norm is that of the mean gradient.
    """

    name = "onebit_adam"
    needs_float32 = True
    _step_supports_amp_scaling = True  # GradScaler.step then leaves unscaling to us

    def __init__(
        self,
        named_params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        freeze_step: int | str = "auto",
        bias_correction: bool = True,
        scale: str = "l1",
        block_size: int = 2048,
        momentum_mask: Mapping[str, Tensor] | None = None,
        max_norm: float | None = None,
        grad_scaler: Any = None,
    ) -> None:
        check_option("lr", lr, lambda x: x >= 0, "a number of at least 0")
        check_option(
            "betas",
            betas,
            lambda x: len(x) == 2 and all(0 <= b < 1 for b in x),
            "two numbers in [0, 1), as in [0.9, 0.999]",
        )
        check_option("eps", eps, lambda x: x > 0, "a number above 0")
        check_option("weight_decay", weight_decay, lambda x: x >= 0, "a number of at least 0")
        whole = "a whole number from 1, or 'auto'"
        check_option("freeze_step", freeze_step, lambda x: x == "auto" or (isinstance(x, int) and x >= 1), whole)
        if not isinstance(bias_correction, bool):
            raise ConfigError(f"bias_correction: {bias_correction!r} is out of range; write true or false")
        check_option(
            "momentum_mask", momentum_mask or {}, _is_masks, "{parameter name: tensor of its shape}, in Python"
        )
        Aggregator.__init__(self, max_norm=max_norm, grad_scaler=grad_scaler)
        self._mean = Mean()
        self._two_way = TwoWayMean(scaled_sign(scale, block_size))
        self.freeze_step, self.bias_correction = freeze_step, bias_correction
        self.momentum_mask = dict(momentum_mask or {})
        self._mask: Tensor | None = None
        self._variance_norms: deque[float] = deque()
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "step": 0,
            "frozen": False,
        }
        torch.optim.Optimizer.__init__(self, list(named_params), defaults)
        if any("param_names" not in group for group in self.param_groups):
            raise ConfigError(
                "onebit_adam keys its state by name: pass model.named_parameters(), not model.parameters()"
            )

    @property
    def is_frozen(self) -> bool:
        """Whether the variance is frozen, so that momentum travels as signs."""
        return bool(self.param_groups[0]["frozen"])

    @property
    def warmup_steps(self) -> int:
        return self.freeze_step if isinstance(self.freeze_step, int) else 0

    @property
    def is_steady(self) -> bool:
        return self.is_frozen

    @property
    def applied_steps(self) -> int:
        """Updates applied so far; a step in which every bucket was void is none."""
        return int(self.param_groups[0]["step"])

    def bind(self, named_parameters: Sequence[tuple[str, Tensor]], group: Group) -> None:
        super().bind(named_parameters, group)
        self._mean.bind(named_parameters, group)
        self._two_way.bind(named_parameters, group)
        device = named_parameters[0][1].device
        self._momentum = torch.zeros(self.index.total, device=device)
        self._variance = torch.zeros(self.index.total, device=device)
        self._parameters = dict(named_parameters)
        for name, mask in self.momentum_mask.items():
            if name not in self._parameters:
                raise AttachError(f"momentum_mask: the model has no trainable parameter {name!r}")
            shape = self._parameters[name].shape
            given = tuple(torch.as_tensor(mask).shape)
            if len(given) > len(shape) or any(n not in (1, m) for n, m in zip(given[::-1], shape[::-1], strict=False)):
                raise AttachError(f"momentum_mask: {name!r} is of shape {tuple(shape)}, its mask of {given}")
        self._link_state()

    def _link_state(self) -> None:
        """Make state[p] views of the flat tensors, with the values that are there already."""
        self._group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        for name, p in self._parameters.items():
            old = self.state.get(p, {})
            views = {
                "momentum": self.index.view(self._momentum, name).view(p.shape),
                "variance": self.index.view(self._variance, name).view(p.shape),
            }
            for key, view in views.items():
                if key in old:
                    view.copy_(old[key])
            self.state[p] = {
                "step": int(old.get("step", 0)),
                "variance_step": int(old.get("variance_step", 0)),
                **views,
            }
        if self.is_frozen:
            self._make_mask()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        exact = {k: dict(entry) for k, entry in state_dict["state"].items()}
        super().load_state_dict(state_dict)
        ids = [k for group in state_dict["param_groups"] for k in group["params"]]
        for k, p in zip(ids, (p for group in self.param_groups for p in group["params"]), strict=True):
            if k in exact:
                self.state[p] = exact[
                    k
                ]  # torch has cast it to the parameter's dtype; momentum and variance are float32
        if hasattr(self, "_momentum"):
            self._link_state()

    def aggregate(self, bucket: Bucket, group: Group) -> None:
        if not self.is_frozen:
            self._mean.aggregate(bucket, group)
            if bucket.void is None:
                self._absorb_gradient(bucket)
            return
        for name, g in bucket.views():
            b1 = self._options(name)["betas"][0]
            m = self.index.view(self._momentum, name)
            torch.lerp(m, g, 1 - b1, out=g)  # m_i = b1 m + (1 - b1) g_i
        self._two_way.aggregate(bucket, group)
        if bucket.void is not None:
            return
        for name, m in bucket.views():
            if self._mask is not None:
                m.mul_(self.index.view(self._mask, name))
            self.index.view(self._momentum, name).copy_(m)

    def exchange(self, buckets: Sequence[Bucket], group: Group) -> None:
        if self.is_frozen or self.max_norm is None:
            super().exchange(buckets, group)
            return
        for bucket in buckets:
            group.traffic.bucket = bucket.label
            self._mean.aggregate(bucket, group)
        whole = [bucket for bucket in buckets if bucket.void is None]
        clip_joint_norm_(whole, self.max_norm)
        for bucket in whole:
            self._absorb_gradient(bucket)

    def _absorb_gradient(self, bucket: Bucket) -> None:
        for name, g in bucket.views():
            b1, b2 = self._options(name)["betas"]
            m, v = self.index.view(self._momentum, name), self.index.view(self._variance, name)
            m.lerp_(g, 1 - b1)  # m <- b1 m + (1 - b1) g
            v.mul_(b2).addcmul_(g, g, value=1 - b2)  # v <- b2 v + (1 - b2) g^2

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Apply what the last exchange left in the momentum. Parameters without a gradient are left alone."""
        if closure is not None:
            raise ValueError("onebit_adam exchanges in backward and takes no closure; call backward, then step()")
        is_applied = False
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
                    is_applied = True
        if is_applied:
            for group in self.param_groups:
                group["step"] += 1
            if not self.is_frozen and self._is_settled():
                self._freeze()
        return None

    def _update(self, p: Parameter, group: dict[str, Any]) -> None:
        state, (b1, b2) = self.state[p], group["betas"]
        state["step"] += 1
        state["variance_step"] += not self.is_frozen
        root = state["variance"].sqrt()
        step_size = group["lr"]
        if self.bias_correction:
            root /= math.sqrt(1 - b2 ** state["variance_step"]) if state["variance_step"] else 1.0
            step_size /= 1 - b1 ** state["step"]
        root += group["eps"]
        if group["weight_decay"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])
        if p.dtype == torch.float32:
            p.addcdiv_(state["momentum"], root, value=-step_size)  # x <- x - lr m / (sqrt(v) + eps)
        else:
            p.copy_(p.float().addcdiv_(state["momentum"], root, value=-step_size))

    def _is_settled(self) -> bool:
        """Whether the warm-up ends after this step; the same on all ranks, since it reads only what they share."""
        if self.freeze_step != "auto":
            return self.applied_steps >= int(self.freeze_step)
        group = self.param_groups[0]
        b2, rate = group["betas"][1], float(group["lr"])
        norm = float(self._variance.sum(dtype=torch.float64))
        norm /= 1 - b2**self.applied_steps if self.bias_correction else 1.0
        self._variance_norms.append(norm)
        is_rising = rate > group.get("last_lr", rate)
        group["last_lr"] = rate
        window = max(1, round(1 / (1 - b2)))
        if len(self._variance_norms) <= window:
            return False
        earlier = self._variance_norms.popleft()
        return not is_rising and min(earlier, norm) >= _STABLE_RATIO * max(earlier, norm) > 0

    def _freeze(self) -> None:
        for group in self.param_groups:
            group["frozen"] = True
        self._variance_norms.clear()
        self._make_mask()

    def _make_mask(self) -> None:
        mask = self._variance.ne(0)
        for name, given in self.momentum_mask.items():
            own = torch.as_tensor(given, device=mask.device).ne(0).expand(self._parameters[name].shape)
            self.index.view(mask, name).logical_and_(own.reshape(-1))
        self._mask = None if bool(mask.all()) else mask

    def _options(self, name: str) -> dict[str, Any]:
        return self._group_of[id(self._parameters[name])]

    @property
    def state_form(self) -> str:
        return self._two_way.state_form

    def state_views(self, name: str) -> list[Tensor]:
        own = [self.index.view(self._momentum, name), self.index.view(self._variance, name)]
        return own + self._two_way.state_views(name)

    def comm_state(self) -> State:
        state = self._two_way.comm_state()
        state["shared"]["variance_norms"] = torch.tensor(list(self._variance_norms), dtype=torch.float64)
        return state

    def load_comm_state(self, state: State) -> None:
        self._two_way.load_comm_state(state)
        self._load_norms(state)

    def load_resharded(self, states: Iterable[State]) -> None:
        every = list(states)
        self._two_way.load_resharded(every)
        self._load_norms(every[0])

    def _load_norms(self, state: State) -> None:
        if "variance_norms" not in state["shared"]:
            raise CheckpointError("variance_norms is missing; was the checkpoint saved by onebit_adam?")
        self._variance_norms = deque(state["shared"]["variance_norms"].tolist())


def _is_masks(masks: Any) -> bool:
    return isinstance(masks, Mapping) and all(isinstance(mask, Tensor) for mask in masks.values())
