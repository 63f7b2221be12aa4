"""Optimizers that torch does not have, and what methods that compute an update themselves share."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from commopt.errors import ConfigError, check_finite, did_you_mean
from commopt.optim.optimizers import LAMB, SAVIC, AccumAdam, Lion

__all__ = ["LAMB", "OPTIMIZERS", "SAVIC", "AccumAdam", "Lion", "make_optimizer"]

# the names that configurations have for optimizers
OPTIMIZERS: Mapping[str, Any] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "accum_adam": AccumAdam,
    "savic": SAVIC,
    "sgd": torch.optim.SGD,
    "lion": Lion,
    "lamb": LAMB,
}


def make_optimizer(given: Mapping[str, Any], parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """The optimizer that a configuration names: {"name": "sgd", "lr": 0.1}, Adam without a name. Raises ConfigError."""
    arguments = {key: value for key, value in given.items() if key != "name"}
    name = given.get("name", "adam")
    if not isinstance(name, str) or name not in OPTIMIZERS:
        raise ConfigError(f"optimizer: name: unknown optimizer {name!r}{did_you_mean(str(name), OPTIMIZERS)}")
    kind = OPTIMIZERS[name]
    known = [key for key in inspect.signature(kind.__init__).parameters if key not in ("self", "params")]
    for key in arguments:
        if key not in known:
            raise ConfigError(f"optimizer: {key}: unknown argument of {name}{did_you_mean(str(key), known)}")
        check_finite(f"optimizer: {key}", arguments[key])
    parameters = list(parameters)
    try:
        made: torch.optim.Optimizer = kind(parameters, **arguments)
    except Exception as error:  # torch raises what comes up, as an IndexError for betas: [0.9]
        raise ConfigError(f"optimizer: {_refused(kind, parameters, arguments, error)}") from None
    return made


def _refused(kind: Any, parameters: list[Any], arguments: Mapping[str, Any], error: Exception) -> str:
    """Why an optimizer raised `error`, and on which arguments: those that it can be made without, or else all of them."""

    def is_made_without(*left_out: str) -> bool:
        try:
            kind(parameters, **{key: value for key, value in arguments.items() if key not in left_out})
        except Exception:
            return False
        return True

    why = (str(error) or type(error).__name__).splitlines()[0]
    culprits = [key for key in arguments if is_made_without(key)] or list(arguments)
    values = ", ".join(f"{arguments[key]!r:.60}" for key in culprits)
    return f"{', '.join(culprits)}: {values} is refused by {kind.__name__}: {why}; write another value, or leave it out"
