"""The algorithms, one file each, by the names that users write in YAML."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch

from commopt.aggregate import Aggregator
from commopt.errors import ConfigError, did_you_mean
from commopt.methods.dense import Dense
from commopt.methods.ef_sign import EFSign
from commopt.methods.fp16 import FP16
from commopt.methods.onebit_adam import OnebitAdam

__all__ = [
    "FP16",
    "METHODS",
    "OPTIMIZERS",
    "Dense",
    "EFSign",
    "OnebitAdam",
    "build",
    "check_options",
    "is_update_method",
    "with_optimizer",
]

METHODS: Mapping[str, type[Aggregator]] = {method.name: method for method in (Dense, FP16, EFSign, OnebitAdam)}


OPTIMIZERS: Mapping[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def is_update_method(name: str) -> bool:
    """Whether this method is an optimizer itself, instead of replacing the gradient that another one gets."""
    return issubclass(_find(name), torch.optim.Optimizer)


def check_options(name: str, options: Iterable[str]) -> None:
    """Raise ConfigError for a method, or an option of it, that does not exist."""
    known = _options(_find(name))
    for option in options:
        if option not in known:
            raise ConfigError(f"method {name}: unknown option {option!r}{did_you_mean(option, known)}")


def build(name: str, named_params: Iterable[Any] | None = None, **options: Any) -> Aggregator:
    """Make a method by name; `integrations.*.attach` then puts it into a training script.

    named_params: `model.named_parameters()`, or parameter groups whose "params" are such pairs; update methods (1-bit Adam)
    need it, gradient methods (EF-sign) go with an optimizer of yours and take none.
    Raises ConfigError for an unknown name or option, or a value out of range.
    """
    check_options(name, options)
    method: Any = _find(name)
    arguments = []
    if is_update_method(name):
        if named_params is None:
            raise ConfigError(f"method {name} is an optimizer: build({name!r}, model.named_parameters(), ...)")
        arguments = [named_params]
    try:
        made: Aggregator = method(*arguments, **options)
    except ConfigError as error:
        raise ConfigError(f"method {name}: {error}") from None
    return made


def with_optimizer(
    name: str, model: torch.nn.Module, *, options: Mapping[str, Any], optimizer: Mapping[str, Any]
) -> tuple[Aggregator, torch.optim.Optimizer]:
    """The method and the optimizer that steps, from a run's YAML; an update method is both.

    optimizer: {"name": "adam", "adamw" or "sgd", and that optimizer's arguments}. An update method takes lr, betas, eps and
    weight_decay from it, unless `options` say otherwise. Raises ConfigError as `build` does, and for a bad optimizer.
    """
    arguments = {key: value for key, value in optimizer.items() if key != "name"}
    if is_update_method(name):
        method = build(name, model.named_parameters(), **{**arguments, **options})
        return method, cast(torch.optim.Optimizer, method)
    kind = optimizer.get("name", "adam")
    if kind not in OPTIMIZERS:
        raise ConfigError(f"optimizer: name: unknown optimizer {kind!r}{did_you_mean(str(kind), OPTIMIZERS)}")
    known = [key for key in inspect.signature(OPTIMIZERS[kind].__init__).parameters if key not in ("self", "params")]
    for key in arguments:
        if key not in known:
            raise ConfigError(f"optimizer: {key}: unknown argument of {kind}{did_you_mean(key, known)}")
    method = build(name, **options)
    try:
        return method, OPTIMIZERS[kind](model.parameters(), **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer: {kind} does not take {arguments}: {error}") from None


def _find(name: str) -> type[Aggregator]:
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}{did_you_mean(name, METHODS)}")
    return METHODS[name]


def _options(method: type[Aggregator]) -> list[str]:
    signature = inspect.signature(method.__init__)
    return [p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
