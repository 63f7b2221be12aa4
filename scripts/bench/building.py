"""The one place where the benchmarks build methods and attach them, and where they find the model that they train."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from commopt.errors import ConfigError
from commopt.frameworks import plain
from commopt.groups import Group
from commopt.methods import with_optimizer

TRAIN = Path(__file__).parents[2] / "launch" / "train.py"


@functools.cache
def training_program() -> Any:
    """launch/train.py as a module."""
    spec = importlib.util.spec_from_file_location("train", TRAIN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(settings: Mapping[str, Any], model: nn.Module) -> tuple[Any, torch.optim.Optimizer]:
    """The method that a cell's settings name, and the optimizer that steps. Raises ConfigError if it refuses them."""
    return with_optimizer(settings["method"], model, options=settings["options"], optimizer=settings["optimizer"])


def why_not(settings: Mapping[str, Any]) -> str | None:
    """Why a cell cannot be trained: there is no such method, or it refuses its options. None if it can."""
    try:
        build(settings, nn.Linear(2, 2))
    except ConfigError as error:
        return str(error).splitlines()[0]
    return None


def attach(
    settings: Mapping[str, Any], model: nn.Module, group: Group, **options: bool
) -> tuple[Any, torch.optim.Optimizer, Any]:
    """The method, the optimizer that steps, and their attachment to an unwrapped model."""
    method, optimizer = build(settings, model)
    applies = None if isinstance(method, torch.optim.Optimizer) else optimizer
    return method, optimizer, plain.attach(model, method, applies, group, **options)
