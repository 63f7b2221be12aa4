"""An update method in the place of the optimizer that a framework, or its user, has made already."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from commopt.choice import Choice, make, read_choice
from commopt.errors import AttachError
from commopt.exchange.mean import Aggregator


def stand_in(
    choice: Choice,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedulers: list[Any],
    where: str = "prepare()",
    **options: Any,
) -> Any:
    """The chosen update method, made to take this optimizer's place; nothing is changed yet.

    where: what optimizer and schedulers are given to, for errors. options: beside those of the choice.
    Raises ConfigError for a kind of optimizer that the method cannot stand in for, and AttachError where settings of the optimizer
    or its schedulers would be lost.
    """
    name, chosen = read_choice(choice)
    kind = type(optimizer).__name__
    if isinstance(optimizer, Aggregator):
        raise AttachError(f"the optimizer is {optimizer.name} already; pass it as the method, or leave it out")
    method, _ = make(choice, model, optimizer, **options)  # the kind first: Adagrad has state before any step
    if optimizer.state:
        raise AttachError(f"{name} cannot take the place of an {kind} that has made steps: attach before the first one")
    moved = [one for scheduler in schedulers for one in _nested(scheduler) if one.optimizer is optimizer]
    if hasattr(optimizer.step, "_wrapped_by_lr_sched") and not moved:
        raise AttachError(
            f"a learning-rate scheduler was made for the {kind} whose place {name} takes, and would go on without effect: give it to "
            f"{where} too, make it after attach, or build the method and give it to {where}"
        )
    for one in moved:
        for key, is_set in (("lr", True), ("betas", getattr(one, "cycle_momentum", False))):
            if is_set and key in chosen:
                raise AttachError(
                    f"{key}: {chosen[key]!r} would be undone by the {type(one).__name__} that was made for the {kind}: leave it out of "
                    f"the options of {name}, and give it to the {kind}"
                )
    return method


def _nested(scheduler: Any) -> Iterator[Any]:
    """A scheduler and those that it is made of, as far as they act on an optimizer."""
    if hasattr(scheduler, "optimizer"):
        yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _nested(inner)


def move_schedulers(
    schedulers: list[Any], old: torch.optim.Optimizer, new: torch.optim.Optimizer
) -> Callable[[], None]:
    """Let learning-rate schedulers act on another optimizer, with what they keep in its groups; returns what moves them back.

    Raises AttachError, before anything is changed, for one that cycles a momentum which the other optimizer does not have.
    """
    moved = [one for scheduler in schedulers for one in _nested(scheduler) if one.optimizer is old]
    for one in moved:
        if getattr(one, "cycle_momentum", False) and "betas" not in new.param_groups[0]:
            raise AttachError(
                f"{type(one).__name__}: {type(new).__name__} has no momentum to cycle; cycle_momentum=False"
            )
    for before, group in zip(old.param_groups, new.param_groups, strict=True):
        group.update({k: x for k, x in before.items() if k not in group and k not in old.defaults})
    if moved and not hasattr(new.step, "_wrapped_by_lr_sched"):
        step = new.step

        @functools.wraps(step)
        def tracked(*args: Any, **kwargs: Any) -> Any:
            new._opt_called = True  # type: ignore[attr-defined]  # as schedulers do, to warn of one that steps first
            return step(*args, **kwargs)

        tracked._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        new.step = tracked  # type: ignore[method-assign]
    for one in moved:
        one.optimizer = new

    def back() -> None:
        for one in moved:
            one.optimizer = old

    return back


def refuse_steps(optimizer: torch.optim.Optimizer, name: str, instead: str = "step the prepared optimizer") -> Any:
    """A handle of what makes an optimizer that was replaced raise AttachError at its next step."""

    def refuse(*_: Any) -> None:
        raise AttachError(f"{name} has taken the place of this {type(optimizer).__name__}: {instead}")

    return optimizer.register_step_pre_hook(refuse)
