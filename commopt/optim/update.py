"""Update methods: optimizers that exchange what their own update is made of, instead of gradients."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.nn import Parameter

from commopt.errors import AttachError, CheckpointError, ConfigError, check_option
from commopt.exchange.mean import Aggregator, State
from commopt.groups.base import Group

_log = logging.getLogger(__name__)
_STABLE_RATIO = 0.96


class UpdateMethod(torch.optim.Optimizer, Aggregator):
    """An optimizer whose `aggregate` exchanges what its update is made of, and whose `step` only applies it.

    A subclass names its tensors of state in `arenas`; each is one flat float32 tensor of all parameters in registration order,
    `self.arena[key]`, of which `self.state[p][key]` is a view of p's shape, so that `state_dict` has it. `counters` are whole
    numbers in `self.state[p]` that start at 0, `numbers` others that start at the value given. It implements `aggregate`, or
    `receive`, and `update`.

    named_params: `model.named_parameters()`, or parameter groups of such pairs: state is keyed by name.
    """

    arenas: ClassVar[tuple[str, ...]] = ()
    counters: ClassVar[tuple[str, ...]] = ("step",)
    numbers: ClassVar[Mapping[str, float]] = {}
    needs_float32 = True
    is_attached = False
    _step_supports_amp_scaling = True  # GradScaler.step then leaves unscaling to us

    def __init__(
        self,
        named_params: Iterable[Any],
        defaults: Mapping[str, Any],
        *,
        max_norm: float | None = None,
        grad_scaler: Any = None,
    ) -> None:
        check_option("lr", defaults["lr"], lambda x: x >= 0, "a number of at least 0")
        weight_decay = defaults.get("weight_decay", 0.0)
        check_option("weight_decay", weight_decay, lambda x: x >= 0, "a number of at least 0")
        Aggregator.__init__(self, max_norm=max_norm, grad_scaler=grad_scaler)
        self.arena: dict[str, Tensor] = {}
        torch.optim.Optimizer.__init__(self, list(named_params), {**defaults, "step": 0})
        if any("param_names" not in group for group in self.param_groups):
            raise ConfigError(
                f"{self.name} keys its state by name: pass model.named_parameters(), not model.parameters()"
            )

    @property
    def applied_steps(self) -> int:
        """Updates applied so far; a step in which every bucket was void is none."""
        return int(self.param_groups[0]["step"])

    def bind(self, named_parameters: Sequence[tuple[str, Tensor]], group: Group) -> None:
        super().bind(named_parameters, group)
        device = named_parameters[0][1].device
        self.arena = {key: torch.zeros(self.index.total, device=device) for key in self.arenas}
        self.parameters: dict[str, Any] = dict(named_parameters)
        self.is_attached = True
        self._link_state()

    def part(self, key: str, name: str) -> Tensor:
        """(n,) view of an arena: the part of the parameter `name`."""
        return self.index.view(self.arena[key], name)

    def options(self, name: str) -> dict[str, Any]:
        """The parameter group that holds `name`: its lr, betas and so on, as schedulers have left them."""
        return self._group_of[id(self.parameters[name])]

    def _link_state(self) -> None:
        """Make state[p] views of the arenas, with the values that are there already."""
        self._group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        for name, p in self.parameters.items():
            old = self.state.get(p, {})
            views = {key: self.part(key, name).view(p.shape) for key in self.arenas}
            for key, view in views.items():
                if key in old:
                    view.copy_(old[key])
            counters = {key: int(old.get(key, 0)) for key in self.counters}
            numbers = {key: float(old.get(key, first)) for key, first in self.numbers.items()}
            self.state[p] = {**counters, **numbers, **views}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        exact = {k: dict(entry) for k, entry in state_dict["state"].items()}
        super().load_state_dict(state_dict)
        ids = [k for group in state_dict["param_groups"] for k in group["params"]]
        for k, p in zip(ids, (p for group in self.param_groups for p in group["params"]), strict=True):
            if k in exact:
                self.state[p] = exact[k]  # torch has cast it to the parameter's dtype; ours is float32
        if hasattr(self, "parameters"):  # it is bound
            self._link_state()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Apply what the last exchange has left in the state. Parameters without a gradient are left alone."""
        if closure is not None:
            raise ValueError(f"{self.name} exchanges in backward and takes no closure; call backward, then step()")
        if not self.is_attached:
            raise AttachError(
                f"{self.name}: step() before commopt.attach, or after detach(): nothing is exchanged, and replicas would drift apart"
            )
        is_applied = False
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.count(self.state[p])
                    self.update(p, self.state[p], group)
                    is_applied = True
        if is_applied:
            for group in self.param_groups:
                group["step"] += 1
            self.after_step()
        return None

    def count(self, state: dict[str, Any]) -> None:
        """Raise the counters of a parameter that is about to move."""
        for key in self.counters:
            state[key] += 1

    @abstractmethod
    def update(self, p: Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Move one parameter; the counters have been raised."""

    def after_step(self) -> None:
        """What is decided once all parameters have moved, from what all ranks share."""

    def state_views(self, name: str) -> list[Tensor]:
        return [*super().state_views(name), *(self.part(key, name) for key in self.arenas)]


def move_(p: Tensor, direction: Tensor, step_size: float) -> None:
    """p <- p - step_size * direction, computed in float32 and rounded once."""
    if p.dtype == torch.float32:
        p.add_(direction.view(p.shape), alpha=-step_size)
    else:
        p.copy_(p.float().add_(direction.view(p.shape), alpha=-step_size))


def check_betas(betas: Any) -> None:
    """Raise ConfigError unless betas are two numbers in [0, 1)."""
    wanted = "two numbers in [0, 1), as in [0.9, 0.999]"
    check_option("betas", betas, lambda x: len(x) == 2 and all(0 <= b < 1 for b in x), wanted)


class FrozenVariance(UpdateMethod):
    """An Adam-like method that stops adapting its variance at a freeze, and from then on compresses what it exchanges.

    freeze_step: the last step of the warm-up; or "auto": when |v|_1 has changed by less than 4 % over 1/(1 - b2) steps, and
        the rate no longer rises (Tang et al. 2021, arXiv:2102.02888, section 7.1).
    momentum_mask: {parameter name: tensor of its shape}; see `mask`.
    max_ratio: after the freeze no step is larger than this times the rate, see `bounded`; None for no bound.

    At the freeze, coordinates whose variance is zero are masked as well, since a compressed momentum is never zero there and
    would move them by lr * scale / eps.
    """

    arenas: ClassVar[tuple[str, ...]] = ("momentum", "variance")
    counters: ClassVar[tuple[str, ...]] = ("step",)

    def __init__(
        self,
        named_params: Iterable[Any],
        defaults: Mapping[str, Any],
        *,
        freeze_step: int | str,
        momentum_mask: Mapping[str, Tensor] | None = None,
        max_ratio: float | None = 3.0,
        freeze_option: str = "freeze_step",
        max_norm: float | None = None,
        grad_scaler: Any = None,
    ) -> None:
        check_betas(defaults["betas"])
        check_option("eps", defaults["eps"], lambda x: x > 0, "a number above 0")
        whole = "a whole number from 1, or 'auto'"
        check_option(freeze_option, freeze_step, lambda x: x == "auto" or (isinstance(x, int) and x >= 1), whole)
        masks = "{parameter name: tensor of its shape}, in Python"
        check_option("momentum_mask", momentum_mask or {}, _is_masks, masks)
        above = "a number above 0, or null for no bound"
        check_option("max_ratio", 1 if max_ratio is None else max_ratio, lambda x: x > 0, above)
        self.freeze_step, self._freeze_option, self.max_ratio = freeze_step, freeze_option, max_ratio
        self.momentum_mask = dict(momentum_mask or {})
        self.mask: Tensor | None = None  # (n,) bool, where momentum may be other than zero; None for everywhere
        self._variance_norms: deque[float] = deque()
        defaults = {**defaults, "betas": tuple(defaults["betas"]), "frozen": False}
        super().__init__(named_params, defaults, max_norm=max_norm, grad_scaler=grad_scaler)

    @property
    def is_frozen(self) -> bool:
        """Whether the variance is frozen."""
        return bool(self.param_groups[0]["frozen"])

    @property
    def warmup_steps(self) -> int:
        return self.freeze_step if isinstance(self.freeze_step, int) else 0

    @property
    def is_steady(self) -> bool:
        return self.is_frozen

    def bind(self, named_parameters: Sequence[tuple[str, Tensor]], group: Group) -> None:
        shapes = {name: p.shape for name, p in named_parameters}
        for name, mask in self.momentum_mask.items():
            if name not in shapes:
                raise AttachError(f"momentum_mask: the model has no trainable parameter {name!r}")
            shape, given = shapes[name], tuple(torch.as_tensor(mask).shape)
            if len(given) > len(shape) or any(n not in (1, m) for n, m in zip(given[::-1], shape[::-1], strict=False)):
                raise AttachError(f"momentum_mask: {name!r} is of shape {tuple(shape)}, its mask of {given}")
        super().bind(named_parameters, group)

    def _link_state(self) -> None:
        super()._link_state()
        if self.is_frozen:
            self._make_mask()

    def after_step(self) -> None:
        if self.is_frozen:
            return
        is_rising = self._is_rate_rising()
        if self._is_settled(is_rising):
            if is_rising and self.rank == 0:
                _log.warning(
                    "%s: %s: %s is too early: the learning rate still rises, and the variance will not follow what comes",
                    self.name,
                    self._freeze_option,
                    self.freeze_step,
                )
            self.freeze()

    def freeze(self) -> None:
        """End the warm-up."""
        for group in self.param_groups:
            group["frozen"] = True
        self._variance_norms.clear()
        self._make_mask()

    def masked_(self, x: Tensor, name: str) -> Tensor:
        """x with zeros where the momentum of the parameter `name` is masked."""
        return x if self.mask is None else x.mul_(self.index.view(self.mask, name))

    def bounded(self, root: Tensor, momentum: Tensor, uncorrected: float = 1.0) -> Tensor:
        """root, raised where |momentum| / root would exceed `max_ratio`; the root lacks the factor 1 / uncorrected of its bias."""
        if self.max_ratio is None:
            return root
        return torch.maximum(root, momentum.abs() * (uncorrected / self.max_ratio))

    def variance_correction(self, group: Mapping[str, Any]) -> float:
        """1 - b2^t of the variance's own bias, 1.0 where the method corrects none."""
        return 1.0

    def _is_rate_rising(self) -> bool:
        group = self.param_groups[0]
        rate = float(group["lr"])
        is_rising = rate > float(group.get("last_lr", rate))
        group["last_lr"] = rate
        return is_rising

    def _is_settled(self, is_rising: bool) -> bool:
        """Whether the warm-up ends after this step; the same on all ranks, since it reads only what they share."""
        if self.freeze_step != "auto":
            return self.applied_steps >= int(self.freeze_step)
        group = self.param_groups[0]
        b2 = group["betas"][1]
        norm = float(self.arena["variance"].sum(dtype=torch.float64)) / self.variance_correction(group)
        self._variance_norms.append(norm)
        window = max(1, round(1 / (1 - b2)))
        if len(self._variance_norms) <= window:
            return False
        earlier = self._variance_norms.popleft()
        return not is_rising and min(earlier, norm) >= _STABLE_RATIO * max(earlier, norm) > 0

    def _make_mask(self) -> None:
        mask = self.arena["variance"].ne(0)
        for name, given in self.momentum_mask.items():
            own = torch.as_tensor(given, device=mask.device).ne(0).expand(self.parameters[name].shape)
            self.index.view(mask, name).logical_and_(own.reshape(-1))
        self.mask = None if bool(mask.all()) else mask

    def comm_state(self) -> State:
        state = super().comm_state()
        state["shared"]["variance_norms"] = torch.tensor(list(self._variance_norms), dtype=torch.float64)
        return state

    def load_comm_state(self, state: State) -> None:
        super().load_comm_state(state)
        self._load_norms(state)

    def load_resharded(self, states: Iterable[State]) -> None:
        every = list(states)
        super().load_resharded(every)
        self._load_norms(every[0])

    def _load_norms(self, state: State) -> None:
        if "variance_norms" not in state["shared"]:
            raise CheckpointError(f"variance_norms is missing; was the checkpoint saved by {self.name}?")
        self._variance_norms = deque(state["shared"]["variance_norms"].tolist())


def _is_masks(masks: Any) -> bool:
    return isinstance(masks, Mapping) and all(isinstance(mask, Tensor) for mask in masks.values())
