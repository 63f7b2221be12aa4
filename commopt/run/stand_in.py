"""The optimizer that steps in place of the user's when a method computes the update itself."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, overload

import torch
from torch.nn import Parameter

from commopt.errors import AttachError
from commopt.optim.update import UpdateMethod


class StandIn(torch.optim.Optimizer):
    """Steps by an update method, with the parameter groups of the optimizer that it replaces.

    The groups are shared, not copied, so that learning-rate schedules for either optimizer work, and so does code that sets a rate
    in either. `state[p]` holds the part of the method's state that all ranks share, so that `state_dict` has it.
    """

    _step_supports_amp_scaling = True  # GradScaler.step then leaves unscaling to us
    is_attached = False

    def __init__(self, method: UpdateMethod, replaced: torch.optim.Optimizer) -> None:
        self.method, self.replaced = method, replaced
        # hooks and profiling, as in torch
        self.__setstate__({"defaults": replaced.defaults, "state": defaultdict(dict)})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.replaced.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.replaced.param_groups = groups

    def take_place(self, parameters: Mapping[str, Parameter]) -> list[Any]:
        """Show the method's state, and make the replaced optimizer refuse to step; returns handles that undo this."""
        self.is_attached, self.parameters = True, dict(parameters)
        self._take({name: self.replaced.state[p] for name, p in parameters.items() if self.replaced.state.get(p)})
        self.replaced.state.clear()
        name, kind = self.method.name, type(self.replaced).__name__

        def refuse(instead: str, *_: Any) -> None:
            raise AttachError(f"{name} has taken the place of this {kind}: {instead} run.optimizer")

        return [
            self.replaced.register_step_pre_hook(partial(refuse, "step")),
            self.replaced.register_load_state_dict_pre_hook(partial(refuse, "load into")),
            self,
        ]

    def remove(self) -> None:
        """Refuse to step from now on."""
        self.is_attached = False

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Apply the state that the last exchange left. Parameters without a gradient keep their values. The run refuses a closure."""
        if not self.is_attached:
            raise AttachError(
                f"{self.method.name}: step() after close(): nothing is exchanged, and replicas would drift apart; attach again"
            )
        self.replaced._opt_called = True  # type: ignore[attr-defined]  # by which a schedule knows that steps are made
        self.method.step()
        return None

    def state_dict(self) -> dict[str, Any]:
        self._show_state()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over state and hyper-parameters, or go on from those of the replaced kind; the groups stay those of the replaced optimizer.

        Raises ValueError as torch does, and before anything is changed.
        """
        groups, saved = self.param_groups, state_dict["param_groups"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved]:
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
            )
        keys = {
            id(p): k for a, b in zip(groups, saved, strict=True) for p, k in zip(a["params"], b["params"], strict=True)
        }
        state = {name: state_dict["state"].get(keys[id(p)]) for name, p in self.parameters.items()}
        self._take({name: entry for name, entry in state.items() if entry})
        for group, other in zip(groups, saved, strict=True):
            group.update({key: x for key, x in other.items() if key not in ("params", "param_names")})
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _take(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        self.method.load_entries(entries)
        self.method.restored()
        self._show_state()

    def _show_state(self) -> None:
        for name, p in self.parameters.items():
            self.state[p] = self.method.shown(name)
