"""What every framework's attach does first: the method, the optimizer, all checks, and the ranks' agreement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.nn import Module

from commopt.choice import Choice
from commopt.errors import AttachError, ConfigError, check_option
from commopt.groups import Group, Peers
from commopt.method import EveryStep, Method
from commopt.methods import resolve
from commopt.optim.update import UpdateMethod
from commopt.run.agree import Configuration, agree, check_group, configuration_of, meeting_group
from commopt.run.checks import check_parameters, check_steps, check_wrapping
from commopt.run.every_step import Prepared
from commopt.run.refusals import refuse
from commopt.run.stand_in import StandIn

Facts: TypeAlias = Callable[[Method], Mapping[str, object]]


@dataclass(frozen=True)
class Request:
    """What `attach` was asked for."""

    method: Method | type[Method] | Choice
    optimizer: torch.optim.Optimizer | None = None
    group: Group | Peers | None = None
    max_norm: float | None = None
    grad_scaler: torch.amp.GradScaler | None = None
    overlap: bool | None = None


@dataclass(frozen=True)
class Checked:
    """What came of a request: nothing has been changed yet."""

    method: Method
    optimizer: torch.optim.Optimizer
    request: Request
    configuration: Configuration

    def prepared(self) -> Prepared:
        """For a method that exchanges in every step."""
        assert isinstance(self.method, EveryStep)
        return Prepared(self.method, self.optimizer, self.request.max_norm, self.request.grad_scaler)


def check_request(
    framework: str,
    model: Module,
    request: Request,
    meeting: Group,
    facts: Facts,
    *,
    look: Callable[[Method, torch.optim.Optimizer], None] | None = None,
    configuration: Callable[[], Mapping[str, Any]] = dict,
    may_be_wrapped: bool = False,
) -> Checked:
    """Resolve and check everything, on every rank; what fails on one fails on all.

    model: whose parameters are trained. facts: what the framework knows, for `refuse`. look: further checks of its own.
    configuration: what else ranks must have in common. Raises ConfigError and AttachError.
    """

    def check() -> tuple[Checked, Configuration]:
        method = resolve(request.method)
        check_group(request.group)
        refuse({**_general_facts(method, request, model), **facts(method)}, method.name, method.kind)
        if not may_be_wrapped:
            check_wrapping(model)
        optimizer = _stepping(method, request.optimizer)
        named = check_parameters(model, method, optimizer)
        if look is not None:
            look(method, optimizer)
        options = {"max_norm": request.max_norm, "overlap": request.overlap, **configuration()}
        told = configuration_of(framework, method, named, optimizer, model, **options)
        return Checked(method, optimizer, request, told), told

    return agree(meeting, check)


def agree_on_method(request: Request, facts: Mapping[str, object]) -> Method:
    """The method, if nothing that it is used with is refused on any rank."""

    def check() -> tuple[Method, Configuration]:
        method = resolve(request.method)
        refuse(facts, method.name, method.kind)
        return method, {"method": {"name": method.name}}

    return agree(meeting_group(request.group), check)


def _general_facts(method: Method, request: Request, model: Module) -> dict[str, object]:
    if request.max_norm is not None:
        check_option("max_norm", request.max_norm, lambda x: x > 0, "a number above 0, or leave it out")
    if request.grad_scaler is not None and not hasattr(request.grad_scaler, "get_scale"):
        raise ConfigError(
            f"grad_scaler: {type(request.grad_scaler).__name__} has no get_scale(); pass the torch.amp.GradScaler itself"
        )
    if request.overlap not in (None, True, False):
        raise ConfigError(f"overlap: {request.overlap!r} is out of range; write True, False, or leave it out")
    compiled = [base.__name__ for base in type(getattr(model, "_orig_mod", None)).__mro__]
    return {
        "max_norm of a private method": request.max_norm is not None and not method.takes_max_norm,
        "outer method and max_norm with a scaler": request.grad_scaler is not None,
        "peers for a synchronous method": isinstance(request.group, Peers),
        "compiled ddp": "DistributedDataParallel" in compiled,
        "compiled fsdp": "FSDPModule" in compiled,
    }


def _stepping(method: Method, optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that will step. Raises AttachError if it is missing, or does not go with the method."""
    if isinstance(optimizer, StandIn):
        raise AttachError(
            f"the optimizer is {optimizer.method.name}'s already: pass the {type(optimizer.replaced).__name__} that it stands in for"
        )
    check_steps(optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer):
        given = "it is missing" if optimizer is None else f"got {type(optimizer).__name__}"
        raise AttachError(
            f"{method.name}: pass the optimizer of your training ({given}): attach(model, {method.name!r}, optimizer)"
        )
    method.check_optimizer(optimizer)
    if not isinstance(method, UpdateMethod):
        return optimizer
    if optimizer.state:
        kind = type(optimizer).__name__
        raise AttachError(f"{method.name} cannot take the place of {kind} after steps: attach before the first one")
    return StandIn(method, optimizer)
