"""Update methods: they exchange what an optimizer's update is made of, and compute that update themselves."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from commopt.errors import AttachError
from commopt.method import EveryStep, Kind, Tensors
from commopt.wire.bucket import Bucket, alike
from commopt.wire.shards import local
from commopt.wire.state import State

_THEIR_NAMES = {"exp_avg": "momentum", "exp_avg_sq": "variance"}  # of torch's Adam, and of other Lions and LAMBs


class UpdateMethod(EveryStep):
    """Stands in for an optimizer: `exchange` takes in gradients, and `update` moves parameters by what came of them.

    State of elements is one flat float32 tensor of all parameters, of which `part` has views; state per parameter a number each,
    which `numbers` reads and `set_numbers` writes.

    takes: what it reads from the parameter groups of the optimizers that it `stands_for`, in which schedulers change it.
    moments: the states that it has in common with them, and goes on from.
    """

    kind: ClassVar[Kind] = "update"
    may_be_clipped = False
    takes: ClassVar[tuple[str, ...]] = ("lr", "betas", "eps", "weight_decay")
    moments: ClassVar[tuple[str, ...]] = ()
    counters: ClassVar[tuple[str, ...]] = ("step",)  # whole numbers that every update of a parameter raises

    def declare(self) -> list[State]:
        counters = [State(key, of="parameter", dtype=torch.int64) for key in self.counters]
        return [State("steps", of="run", dtype=torch.int64), *counters, *super().declare()]

    def follow(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, Parameter]) -> None:
        """Take hyper-parameters from this optimizer's groups from now on; called before `bind`."""
        self.optimizer, self.parameters = optimizer, dict(parameters)
        self._name_of = {id(p): name for name, p in parameters.items()}
        self._group_of = {id(p): k for k, group in enumerate(optimizer.param_groups) for p in group["params"]}

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        kind = type(optimizer).__name__
        if not any(base.__name__ in self.stands_for for base in type(optimizer).__mro__):
            here = next((name for name in self.stands_for if name in ("LAMB", "Lion")), None)
            example = f"commopt.optim.{here}" if here else f"torch.optim.{self.stands_for[-1]}"
            raise AttachError(
                f"{self.name} stands in for {' or '.join(self.stands_for)}, not for {kind}: pass "
                f"{example}(model.parameters(), ...)"
            )
        for group in optimizer.param_groups:
            for key in ("amsgrad", "maximize", "momentum", "dampening", "nesterov"):
                if group.get(key):
                    raise AttachError(f"{self.name}: {key}={group[key]!r} of {kind} has no counterpart; leave it out")
            if group.get("decoupled_weight_decay") is False and group.get("weight_decay"):
                raise AttachError(
                    f"{self.name}: weight_decay={group['weight_decay']!r} of {kind} goes into the gradient; {self.name} "
                    "subtracts it from the parameters, as AdamW does: use AdamW"
                )

    def settings(self, name: str) -> dict[str, Any]:
        """The parameter group that holds `name`, without its parameters: lr, betas and so on, as schedulers have left them."""
        return settings_of(self.optimizer.param_groups[self._group_of[id(self.parameters[name])]])

    def betas(self, name: str) -> tuple[float, float]:
        """b1 and b2 of a parameter, as of now."""
        b1, b2 = self.optimizer.param_groups[self._group_of[id(self.parameters[name])]]["betas"]
        return float(b1), float(b2)

    def by_betas(self, names: Sequence[str]) -> dict[tuple[float, float], list[str]]:
        """Names by the betas of their parameters, as of now."""
        groups = self.optimizer.param_groups
        return {self.betas(names[0]): list(names)} if len(groups) == 1 and names else alike(names, self.betas)

    def held(self, name: str) -> Tensor:
        """What this rank has of a parameter: all of it, or its shard."""
        return local(self.parameters[name])

    @property
    def applied_steps(self) -> int:
        """Updates applied so far; a step in which every bucket was void is not one."""
        return int(self.state["steps"])

    def entry(self, name: str) -> dict[str, Any]:
        """What the method keeps for one parameter: views of its shape, or that of this rank's shard, and numbers."""
        k, shape = self.index.position[name], self.held(name).shape
        entry: dict[str, Any] = {}
        for key, one in self._declared.items():
            if one.of == "element" and (self.share is None or not self._is_cut(one)):
                entry[key] = self.part(key, name).view(shape)
            elif one.of == "parameter" and key != "exchanges":
                entry[key] = self.state[key][k].item()
        return entry

    def keep(self, name: str, entry: Mapping[str, Any]) -> None:
        """Take numbers back that an update has changed."""
        k = self.index.position[name]
        for key, one in self._declared.items():
            if one.of == "parameter" and key in entry:
                self.state[key][k] = entry[key]

    def shown(self, name: str) -> dict[str, Any]:
        """What an optimizer's `state` has of a parameter: all that is equal on all ranks; views, and numbers."""
        entry = {key: x for key, x in self.entry(name).items() if self._declared[key].held == "shared"}
        run = (key for key, one in self._declared.items() if one.of == "run" and one.numel == 1)
        return {**{key: self.state[key].item() for key in run}, **entry}

    def load_entries(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over what `shown` gave, by parameter, or go on from another optimizer's state.

        Raises ValueError, before anything is changed, if it is neither.
        """
        if any(not self.shown(name).keys() <= entry.keys() for name, entry in entries.items()):
            self.go_on_from(entries)
            return
        for name, entry in entries.items():
            for key, x in self.shown(name).items():
                if isinstance(x, Tensor):
                    x.copy_(entry[key])
                elif self._declared[key].of == "run":
                    self.state[key].fill_(entry[key])
            self.keep(name, entry)

    @torch.no_grad()
    def go_on_from(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        """Start with the moments of another optimizer, by parameter; its steps count as steps of a warm-up."""
        every = {name: self.translated(entry) for name, entry in entries.items() if entry}
        self.reset()
        for name, entry in every.items():
            for key in self.moments:
                x, is_cut = local(entry[key]).reshape(-1), self._is_cut(self._declared[key])
                self.part(key, name).copy_(self.share.of(x, name) if self.share is not None and is_cut else x)
            steps = int(entry.get("step", 0))
            self.keep(name, dict.fromkeys(self.counters, steps))
            self.state["steps"].clamp_(min=steps)

    def translated(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Another optimizer's state of a parameter, by our names. Raises ValueError unless the method has a place for all of it."""
        named = {_THEIR_NAMES.get(key, key): x for key, x in entry.items()}
        if named.keys() - {"step"} != set(self.moments) or ("step" in self.counters and "step" not in named):
            wanted = ", ".join((*self.moments, *self.counters[:1])) or "nothing"
            raise ValueError(
                f"{self.name} cannot go on from a state of {', '.join(entry)}: it takes over {wanted}, as {' or '.join(self.stands_for)} "
                "has it; load only the model, and begin with a new state"
            )
        return named

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient by what the last exchange has left in the state."""
        is_applied = False
        for group in self.optimizer.param_groups:
            # without a name, this rank has no shard of it
            given = [self._name_of.get(id(p)) for p in group["params"] if p.grad is not None]
            if names := [name for name in given if name is not None]:
                self.count(names)
                self.update(names, settings_of(group))
                is_applied = True
        if is_applied:
            self.state["steps"] += 1
            self.after_step()

    def count(self, names: Sequence[str]) -> None:
        """Raise the counters of parameters that are about to move."""
        for key in self.counters:
            self.state[key][self._positions(names)] += 1

    def numbers(self, key: str, names: Sequence[str]) -> dict[str, Any]:
        """What the state `key`, of one number per parameter, holds for some of them."""
        return dict(zip(names, self.state[key][self._positions(names)].tolist(), strict=True))

    def set_numbers(self, key: str, values: Mapping[str, Any]) -> None:
        """Overwrite the numbers of parameters, by name, in the state `key`."""
        self.state[key][self._positions(values)] = torch.tensor(list(values.values()), dtype=self.state[key].dtype)

    def _positions(self, names: Iterable[str]) -> list[int]:
        return [self.index.position[name] for name in names]

    @abstractmethod
    def update(self, names: Sequence[str], group: Mapping[str, Any]) -> None:
        """Move parameters of one group, whose counters have been raised. group: its settings, as of this step."""

    def after_step(self) -> None:
        """What is decided once all parameters have moved, from what all ranks share."""


class DirectionMethod(UpdateMethod):
    """Steps along a direction D that the exchange makes of each rank's own momentum: x <- x - lr (D + weight_decay x)."""

    counters = ()
    direction_dtype: ClassVar[torch.dtype] = torch.float32
    states: ClassVar[tuple[State, ...]] = (State("momentum", held="rank", on_resize="mean"),)

    def set_up(self) -> None:
        self.directions: dict[tuple[str, ...], Bucket] = {}  # by the names in each bucket, from an exchange to its step

    def receive(self, bucket: Bucket) -> None:
        self.directions[bucket.names] = bucket.with_flat(bucket.flat.to(self.direction_dtype, copy=True))

    def update(self, names: Sequence[str], group: Mapping[str, Any]) -> None:
        found = dict(
            view for bucket in self.directions.values() for view in bucket.with_flat(bucket.flat.float()).views()
        )
        ps = [self.held(name) for name in names]
        if group["weight_decay"]:
            torch._foreach_mul_(ps, 1 - group["lr"] * group["weight_decay"])
        move_(ps, [found[name].view(p.shape) for name, p in zip(names, ps, strict=True)], group["lr"])

    def after_step(self) -> None:
        for bucket in self.directions.values():
            keep_until_used(bucket.flat)
        self.directions.clear()


def keep_until_used(x: Tensor) -> None:
    """Tell a GPU's allocator that the current stream uses memory which an exchange may have allocated on another stream."""
    if x.is_cuda:
        x.record_stream(torch.cuda.current_stream(x.device))


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group as numbers: learning rates may be tensors."""
    return {
        key: float(x) if isinstance(x, Tensor) else x
        for key, x in group.items()
        if key not in ("params", "param_names")
    }


def move_(ps: Tensors, directions: Tensors, step_size: float) -> None:
    """p <- p - step_size * direction for each, computed in float32 and rounded once."""
    xs = ps if all(p.dtype == torch.float32 for p in ps) else [torch.empty_like(p, dtype=torch.float32) for p in ps]
    if xs is not ps:
        torch._foreach_copy_(xs, ps)
    torch._foreach_add_(xs, directions, alpha=-step_size)
    if xs is not ps:
        torch._foreach_copy_(ps, xs)
