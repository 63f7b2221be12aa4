"""The noun: a method replaces the mean over machines; its options, its state and what it exchanges."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from commopt import kernels
from commopt.errors import ConfigError
from commopt.exchange.base import Exchange
from commopt.groups.base import Group
from commopt.options import NoOptions, make_options, option_names, options
from commopt.wire.bucket import Bucket, alike
from commopt.wire.state import State, Stateful

__all__ = ["EveryStep", "GradientMethod", "Kind", "Method", "NoOptions", "options"]

Tensors: TypeAlias = list[Tensor] | tuple[Tensor, ...]  # which torch's operations on many tensors take
Kind = Literal["gradient", "update", "outer"]
_ELSEWHERE = {
    **dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "set it on the optimizer that you pass to attach"),
    **{key: f"write commopt.attach(..., {key}=...)" for key in ("max_norm", "grad_scaler")},
}


class Method(Stateful, ABC):
    """An algorithm, made from its options: `TwoWay(worker="int8")`. It belongs to one model once it is attached.

    A subclass has a `name`, an `Options` dataclass, and declares its state. Raises ConfigError for an unknown option, or a value
    out of range.

    kind: "gradient" replaces the gradients that an optimizer gets, in every step; "update" computes the optimizer's own update too;
        "outer" averages parameters once in many steps. positional: the options that `name(a, b)` stands for.
    warmup_option: what a message about a warm-up that is too long says to lower. stands_for: the optimizers whose place it can take.
    may_be_clipped: scaling what backward has left, as clip_grad_norm_ does, is sound: it is a gradient, and no state relies on all of it
        being applied. needs_float32: works on float32 only. takes_max_norm: goes with `attach(..., max_norm=...)`. needs_whole: takes norms
        of whole parameters.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    Options: ClassVar[type[Any]] = NoOptions
    options: Any
    positional: ClassVar[tuple[str, ...]] = ()
    warmup_option: ClassVar[str] = ""
    stands_for: ClassVar[tuple[str, ...]] = ()
    planned: int | None = None  # steps of the whole run, if they are known
    may_be_clipped = True
    needs_float32 = False
    takes_max_norm = True
    needs_whole = False

    def __init__(self, **given: Any) -> None:
        self.given = given  # as they were written, for records
        try:
            for key in given:
                if key in _ELSEWHERE and key not in option_names(type(self).Options):
                    raise ConfigError(f"{key}: is not an option of this method; {_ELSEWHERE[key]}")
            self.options = make_options(type(self).Options, given)
            self.set_up()
        except ConfigError as error:
            raise ConfigError(f"method {self.name}: {error}") from None

    def set_up(self) -> None:
        """Make what the options ask for; called once they have been checked. Raises ConfigError if they contradict each other."""

    def follow(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, Parameter]) -> None:
        """Take hyper-parameters from this optimizer's groups from now on, if the method uses any; called before `bind`."""

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise AttachError for an optimizer that would undo what the method does, as a second momentum would."""

    @property
    def warmup_steps(self) -> int:
        """Steps before `is_steady`, as far as they are known beforehand."""
        return 0

    @property
    def is_steady(self) -> bool:
        """Whether steps are what they will be from now on: no warm-up phase is left."""
        return True

    @property
    @abstractmethod
    def state_form(self) -> str:
        """What the layout of the saved state depends on beside the model; a checkpoint of another form is refused."""

    @abstractmethod
    def bytes_per_parameter(self, ranks: int) -> float:
        """What one rank sends per parameter and optimizer step once `is_steady`, for large matrices."""


class EveryStep(Exchange, Method):
    """A method that exchanges in every step: gradients, or what an update is made of."""

    clips_alone: ClassVar[bool] = False  # to max_norm sqrt(N), by its own norm, before an inexact exchange

    def __init__(self, **given: Any) -> None:
        Method.__init__(self, **given)

    def declare(self) -> list[State]:
        return [State("exchanges", of="parameter", dtype=torch.int64), *super().declare()]

    def receive(self, bucket: Bucket) -> None:
        """Take a good bucket's result into the state that the step reads."""

    def parts_of(self, key: str, names: Iterable[str]) -> list[Tensor]:
        """`part` of each parameter."""
        return [self.part(key, name) for name in names]

    def blend_(self, key: str, bucket: Bucket, weight: Callable[[str], float], out: Tensor | None = None) -> None:
        """out <- s + weight (x - s), with s this rank's part of the state `key`, and x the bucket, which `out` is if None."""
        one, starts = self._declared[key], dict(zip(bucket.names, bucket.starts, strict=True))
        share = None if self._is_cut(one) else self.share
        for w, names in alike(bucket.names, weight).items():
            places = self._layout(one).places(tuple(names), tuple(starts[name] for name in names), share)
            kernel = kernels.of("apply", bucket.flat.device)
            kernel.blend_(self.state[key], bucket.flat, bucket.flat if out is None else out, places, w)

    @property
    def is_steady(self) -> bool:
        return not self.warmup_steps or int(self.exchanges.max()) >= self.warmup_steps

    @property
    def is_exact(self) -> bool:
        """Whether the next exchange yields the mean of the gradients themselves, so that clipping it clips their norm."""
        return False

    @property
    def is_local(self) -> bool:
        """Whether the next step exchanges nothing: a local step."""
        return False

    @property
    def is_synchronised(self) -> bool:
        """Whether replicas hold the same parameters after the last step; false between the exchanges of local steps."""
        return True

    @property
    def can_be_cut(self) -> bool:
        """Whether a machine's ranks can share out what is exchanged."""
        return not self.merges_buckets

    @property
    def is_repeatable(self) -> bool:
        """Whether an exchange that no step applies does no harm: nothing is kept of it."""
        kept = {name for tensors in self.saved().values() for name, x in tensors.items() if x.numel()}
        return self.is_linear or kept <= {"exchanges", "factors"}

    def stepped(
        self, largest: Callable[[Sequence[float]], list[float]], steps: int, waited_s: float
    ) -> dict[str, Any] | None:
        """Called on all ranks when the optimizer has stepped; returns the fields of an event, if it has chosen how to go on.

        largest: the largest over all ranks of each of some numbers; all ranks call it, or none. steps: the optimizer's steps so far.
        waited_s: the seconds that this rank has waited for exchanges so far.
        """
        return None

    def synchronise(self, group: Group) -> None:
        """Make replicas equal now, if local steps have moved them apart; all ranks call it, between steps."""


class GradientMethod(EveryStep):
    """A method that replaces the gradients of the optimizer it is given. Implement `exchange`, or inherit it from an Exchange."""

    kind: ClassVar[Kind] = "gradient"
