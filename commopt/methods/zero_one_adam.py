"""0/1 Adam: the variance is updated ever more rarely, and then the momentum is exchanged ever more rarely."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from commopt.compress.sign import check_prescale, equalising_factors, scaled_sign
from commopt.errors import GroupError, check_flag, check_option
from commopt.exchange.compressed import TwoWayMean
from commopt.exchange.mean import Mean, State, check_alone, clip_joint_norm_, load_tensor
from commopt.groups.base import Group
from commopt.optim.update import FrozenVariance
from commopt.wire.bucket import Bucket

_WHOLE = "a whole number from 1"


class ZeroOneAdam(FrozenVariance):
    """Adam that sends signs from early on: of gradients between rare exact ones, and then of the momentum of local steps.

    Lu et al. 2022, arXiv:2202.06009, Algorithm 1, as its released code has it. Phase A, steps t = 1 to var_freeze_step, with g_i
    the local gradient and C scaled signs with error feedback on both sides:
        t divides by k: g = mean g_i;  v <- b2 v + (1 - b2) g^2;  k doubles after every var_update_scaler of these
        else:           g = C(mean C(g_i))
        m <- b1 m + (1 - b1) g;  x <- x - lr (m / (sqrt(v) + eps) + weight_decay x)
    Then v stays and the residuals start anew. Phase B, with H = 1, doubled every local_step_scaler steps up to local_step_clipper:
        m_i <- b1 m_i + (1 - b1) g_i;  x_i <- x_i - lr (m_i / (sqrt(v) + eps) + weight_decay x_i);  R <- R + lr
        u_i <- u_i + lr (m_i - u_i) / R, the mean of m_i since the last exchange, each as long as it was stepped along
        t divides by H: m = C(mean C(u_i));  x = x' - R m / (sqrt(v) + eps), decayed like x_i;  x' <- x;  R <- 0
    Replicas are equal, bit for bit, after each exchange, and differ between them (`is_synchronised`); `synchronise(group)`
    exchanges at once: before an evaluation, at the end, and before a checkpoint whose model is used alone.
    Differs from the code: what is exchanged is the mean momentum u and not R u, so that the residuals keep their unit and no rate
    divides, not even 0; weight decay stays out of u; the common point x' is kept and not computed back; coordinates without
    variance are masked in both phases; bias correction is on by default, as in torch.optim.Adam, with v's own count of updates.
    A NaN at an exchange leaves the bucket out on all ranks: its parameters go on with their local steps until the next exchange.
    A NaN in a local step is seen by its own rank alone, which steps along its momentum as it was. One rank takes no local steps.
    Sends in phase B at last 2(N-1)/N x (1/8 + 4/block_size) / local_step_clipper bytes per parameter and step.
    State: m, v, u, x', 4 bytes per parameter of worker residual and 4/N of server residual.
    Use it for long trainings on slow networks, where latency counts as well: most steps of phase B send nothing.
    Not for short trainings (its schedules are made for 100,000 steps), or where replicas must be equal after every step.
    Coordinates that hardly ever get a gradient have a tiny v, and signs move them far, local steps farther; a larger eps, such
    as 1e-5, holds them.

    var_freeze_step: the last step of phase A; or "auto": when |v|_1 has changed by less than 4 % over 1/(1 - b2) steps, and the
        rate no longer rises; or None: phase A only.
    var_update_scaler: exact gradients until the steps between them double.
    local_step_scaler, local_step_clipper: steps until the interval of exchanges doubles, and the longest interval; 1 and H give a
        constant interval of H, but for the first steps.
    scale, block_size, residual_bits: as in `ef_sign`.
    prescale, momentum_mask: as in `onebit_adam`.
    max_norm, grad_scaler: see `Aggregator`. In local steps every rank clips its own norm.
    """

    name = "zero_one_adam"
    warmup_option = "var_freeze_step"
    arenas: ClassVar[tuple[str, ...]] = ("momentum", "variance", "mean_momentum", "common")
    counters: ClassVar[tuple[str, ...]] = ("step", "variance_step", "local_steps")
    numbers: ClassVar[Mapping[str, float]] = {"rate": 0.0, "kept": 1.0}  # R, and the factor of decay, since x'

    def __init__(
        self,
        named_params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        var_freeze_step: int | str | None = "auto",
        var_update_scaler: int = 16,
        local_step_scaler: int = 32678,
        local_step_clipper: int = 16,
        bias_correction: bool = True,
        scale: str = "l1",
        block_size: int = 2048,
        prescale: bool = False,
        residual_bits: int = 32,
        momentum_mask: Mapping[str, Tensor] | None = None,
        max_ratio: float | None = 3.0,
        max_norm: float | None = None,
        grad_scaler: Any = None,
    ) -> None:
        freezes = f"{_WHOLE}, 'auto', or None for never"
        check_option("var_freeze_step", var_freeze_step, lambda x: x in (None, "auto") or _is_whole(x), freezes)
        check_option("var_update_scaler", var_update_scaler, _is_whole, _WHOLE)
        check_option("local_step_scaler", local_step_scaler, _is_whole, _WHOLE)
        check_option("local_step_clipper", local_step_clipper, _is_whole, _WHOLE)
        check_flag("bias_correction", bias_correction)
        check_prescale(prescale, scale)
        self._mean = Mean()
        self._two_way = TwoWayMean(scaled_sign(scale, block_size), residual_bits=residual_bits)
        self.made_of = (self._mean, self._two_way)
        self.merges_buckets = self._two_way.merges_buckets
        self.var_freeze_step, self.var_update_scaler = var_freeze_step, var_update_scaler
        self.local_step_scaler, self.local_step_clipper = local_step_scaler, local_step_clipper
        self.bias_correction, self.prescale = bias_correction, prescale
        super().__init__(
            named_params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "variance_updates": 0,
                "frozen_at": 0,
            },
            freeze_step=sys.maxsize if var_freeze_step is None else var_freeze_step,
            momentum_mask=momentum_mask,
            max_ratio=max_ratio,
            freeze_option="var_freeze_step",
            max_norm=max_norm,
            grad_scaler=grad_scaler,
        )

    @property
    def variance_interval(self) -> int:
        """In phase A the steps from one exact gradient to the next."""
        return int(2 ** (self.param_groups[0]["variance_updates"] // self.var_update_scaler))

    @property
    def local_interval(self) -> int:
        """In phase B the steps from one exchange to the next."""
        done = self.applied_steps - self.param_groups[0]["frozen_at"]
        return min(self.local_step_clipper, int(2 ** min(done // self.local_step_scaler, 62)))

    @property
    def is_exact(self) -> bool:
        return not self.is_frozen and (self.applied_steps + 1) % self.variance_interval == 0

    @property
    def is_local(self) -> bool:
        return self.is_frozen and self.ranks > 1 and (self.applied_steps + 1) % self.local_interval != 0

    @property
    def is_synchronised(self) -> bool:
        return not any(state["local_steps"] for state in self.state.values())

    @property
    def warmup_steps(self) -> int:
        return self.var_update_scaler if self.var_freeze_step is None else super().warmup_steps

    @property
    def is_steady(self) -> bool:
        """Whether local steps have begun; in phase A, which never ends without a freeze, whether most steps send signs."""
        return self.variance_interval > 1 if self.var_freeze_step is None else self.is_frozen

    def exchange(self, buckets: Sequence[Bucket], group: Group) -> None:
        if not self.is_local:
            return super().exchange(buckets, group)
        if self.max_norm is not None:
            clip_joint_norm_(buckets, self.max_norm)
        for bucket in buckets:
            check_alone(self, bucket)
            if bucket.void is None:
                self.receive(bucket)
        return None

    def aggregate(self, bucket: Bucket, group: Group) -> None:
        if self.is_exact:
            return self._mean.aggregate(bucket, group)
        if self.is_frozen:
            for name, g in bucket.views():
                state, options = self.state[self.parameters[name]], self.options(name)
                torch.lerp(self.part("momentum", name), g, 1 - options["betas"][0], out=g)  # m_i
                weight = self._step(state, options, state["step"] + 1)[2]
                torch.lerp(self.part("mean_momentum", name), g, weight, out=g)  # u_i
        return self._two_way.aggregate(bucket, group)

    def receive(self, bucket: Bucket) -> None:
        for name, x in bucket.views():
            m, v = self.part("momentum", name), self.part("variance", name)
            b1, b2 = self.options(name)["betas"]
            if self.is_exact:
                v.mul_(b2).addcmul_(x, x, value=1 - b2)  # v <- b2 v + (1 - b2) g^2
            else:
                self.masked_(x, name)
            if self.is_frozen and not self.is_local:
                m.copy_(x)
            else:
                m.lerp_(x, 1 - b1)  # m <- b1 m + (1 - b1) g

    def _step(self, state: Mapping[str, Any], group: Mapping[str, Any], step: int) -> tuple[float, float, float]:
        """The rate of a step, the factor that decay leaves of x, and the step's weight in the mean momentum since x'."""
        rate = float(group["lr"])
        kept = 1 - rate * float(group["weight_decay"])
        if self.bias_correction:
            rate /= 1 - group["betas"][0] ** step
        total = state["rate"] * kept + rate
        return rate, kept, rate / total if total > 0 else 1.0

    def count(self, state: dict[str, Any]) -> None:
        state["step"] += 1
        state["variance_step"] += self.is_exact

    def update(self, p: Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        rate, kept, weight = self._step(state, group, state["step"])
        root = self._root(state, group)
        total, all_kept = state["rate"] * kept + rate, state["kept"] * kept
        if self.is_local:
            if not state["local_steps"]:
                state["common"].copy_(p)  # x' <- x
            state["mean_momentum"].lerp_(state["momentum"], weight)  # u_i <- u_i + lr (m_i - u_i) / R
            _move_(p, p, kept, state["momentum"], root, rate)
            state |= {"local_steps": state["local_steps"] + 1, "rate": total, "kept": all_kept}
        else:
            start = state["common"] if state["local_steps"] else p
            _move_(p, start, all_kept, state["momentum"], root, total)
            state |= {"local_steps": 0, "rate": 0.0, "kept": 1.0}

    def _root(self, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
        """sqrt(v) + eps, bounded once signs have come in"""
        root: Tensor = state["variance"].sqrt()
        lacking = math.sqrt(1 - group["betas"][1] ** state["variance_step"]) if state["variance_step"] else 1.0
        if self.bias_correction:
            root /= lacking
        root += group["eps"]
        if self.ranks > 1 and (self.is_frozen or self.variance_interval > 1):
            root = self.bounded(root, state["momentum"], 1.0 if self.bias_correction else lacking)
        return root

    @torch.no_grad()
    def synchronise(self, group: Group) -> None:
        apart = [name for name, p in self.parameters.items() if self.state[p]["local_steps"]]
        if not apart:
            return
        bucket = Bucket.of([(name, self.part("mean_momentum", name)) for name in apart], "local steps")
        group.traffic.bucket = bucket.label
        self._two_way.aggregate(bucket, group)
        if bucket.void is not None:
            raise GroupError(f"{bucket.void}: the momentum of its local steps has overflown; replicas stay apart")
        for name, x in bucket.views():
            p, options = self.parameters[name], self.options(name)
            state = self.state[p]
            self.part("momentum", name).copy_(self.masked_(x, name))
            _move_(p, state["common"], state["kept"], state["momentum"], self._root(state, options), state["rate"])
            state |= {"local_steps": 0, "rate": 0.0, "kept": 1.0}
        self.exchanges[[self.index.position[name] for name in apart]] += 1

    def after_step(self) -> None:
        if not self.is_frozen and self.applied_steps % self.variance_interval == 0:
            for group in self.param_groups:
                group["variance_updates"] += 1
            self._make_mask()
        super().after_step()

    def freeze(self) -> None:
        super().freeze()
        for group in self.param_groups:
            group["frozen_at"] = self.applied_steps
        self._two_way.worker.residual.zero_()  # of gradients; what follows is momentum
        self._two_way.server.residual.zero_()
        if self.prescale:
            self._two_way.factors = equalising_factors(self.arena["momentum"], self.index)

    def _link_state(self) -> None:
        self.mask = None
        super()._link_state()
        if self.param_groups[0]["variance_updates"]:
            self._make_mask()

    def variance_correction(self, group: Mapping[str, Any]) -> float:
        return 1 - float(group["betas"][1]) ** int(group["variance_updates"]) if self.bias_correction else 1.0

    def bytes_per_parameter(self, ranks: int) -> float:
        each = self._two_way.bytes_per_parameter(ranks)
        return each if self.var_freeze_step is None else each / self.local_step_clipper

    @property
    def state_form(self) -> str:
        return self._two_way.state_form

    def comm_state(self) -> State:
        state = super().comm_state()
        if not self.is_synchronised:
            state["local"] |= self._own()
        return state

    def load_comm_state(self, state: State) -> None:
        super().load_comm_state(state)
        if "parameters" in state["local"]:
            self._set_own(state["local"])

    def load_resharded(self, states: Iterable[State]) -> None:
        """As the parents do; between two exchanges every new rank goes on from the mean of the old ranks' local steps."""
        every = list(states)
        super().load_resharded(every)
        if "parameters" in every[0]["local"]:
            own = [state["local"] for state in every]
            self._set_own({key: torch.stack([x[key].double() for x in own]).mean(0).float() for key in self._own()})

    def _own(self) -> dict[str, Tensor]:
        """What the ranks have of their own between two exchanges, in float32."""
        parameters = torch.cat([p.detach().reshape(-1).float() for p in self.parameters.values()])
        return {
            "parameters": parameters,
            "momentum": self.arena["momentum"],
            "mean_momentum": self.arena["mean_momentum"],
        }

    @torch.no_grad()
    def _set_own(self, own: Mapping[str, Tensor]) -> None:
        parameters = torch.empty_like(self.arena["momentum"])
        load_tensor(parameters, own, "parameters")
        load_tensor(self.arena["momentum"], own, "momentum")
        load_tensor(self.arena["mean_momentum"], own, "mean_momentum")
        for name, p in self.parameters.items():
            p.copy_(self.index.view(parameters, name).view(p.shape))


def _move_(p: Tensor, start: Tensor, kept: float, momentum: Tensor, root: Tensor, rate: float) -> None:
    """p <- kept start - rate momentum / root, computed in float32 and rounded once."""
    x = p if p.dtype == torch.float32 else p.float()
    if start is not p:
        x.copy_(start)
    if kept != 1.0:
        x.mul_(kept)
    x.addcdiv_(momentum, root, value=-rate)
    if x is not p:
        p.copy_(x)


def _is_whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 1
