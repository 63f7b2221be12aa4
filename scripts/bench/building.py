"""The one place where the benchmarks build methods and attach them, and where they find the model that they train."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import commopt
from commopt.errors import AttachError, ConfigError
from commopt.groups import Group
from commopt.optim import OPTIMIZERS, make_optimizer
from commopt.optim.update import UpdateMethod
from commopt.run.run import Run

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


def build(settings: Mapping[str, Any], model: nn.Module) -> tuple[commopt.Method, torch.optim.Optimizer]:
    """The method that a cell's settings name, and its optimizer. Raises ConfigError if they do not fit together."""
    options = {key: value for key, value in settings["options"].items() if key != "max_norm"}  # which `attach` takes
    method = commopt.build(settings["method"], **options)
    optimizer = make_optimizer(fitting(method, settings["optimizer"]), model.parameters())
    try:
        method.check_optimizer(optimizer)
    except AttachError as error:
        raise ConfigError(f"optimizer: {error}") from None
    return method, optimizer


def fitting(method: commopt.Method, optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """A cell's optimizer; for an update method one that it can stand in for, with the same learning rate."""
    if isinstance(method, UpdateMethod) and OPTIMIZERS[optimizer["name"]].__name__ not in method.stands_for:
        return {**optimizer, "name": method.stands_for[0].lower()}
    return dict(optimizer)


def why_not(settings: Mapping[str, Any]) -> str | None:
    """Why a cell cannot be trained: there is no such method, or it refuses its options. None if it can."""
    try:
        build(settings, nn.Linear(2, 2))
    except ConfigError as error:
        return str(error).splitlines()[0]
    return None


def attach(settings: Mapping[str, Any], model: nn.Module, group: Group, max_norm: float | None = None) -> Run:
    """Attach the method of a cell's settings to an unwrapped model. max_norm: if the settings' options have none."""
    method, optimizer = build(settings, model)
    max_norm = settings["options"].get("max_norm", max_norm)
    return commopt.attach(model, method, optimizer, group=group, max_norm=max_norm)
