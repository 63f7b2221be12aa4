"""Every method with options that suit a short test, for the tests that run over all methods."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from commopt import Method, Run, attach, build
from commopt.optim import make_optimizer

SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9}


class Preset(NamedTuple):
    """A method, its options, and the optimizer that it is attached with."""

    name: str
    options: dict[str, Any] = {}  # noqa: RUF012
    optimizer_block: dict[str, Any] = SGD

    def method(self) -> Method:
        return build(self.name, **self.options)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return make_optimizer(self.optimizer_block, model.parameters())

    def attach(self, model: nn.Module, group: Any = None, **options: Any) -> Run:
        return attach(model, self.method(), self.optimizer(model), group=group, **options)

    def __str__(self) -> str:
        return f"{self.name} {self.options}" if self.options else self.name


def sgd(lr: float, momentum: float = 0.0) -> dict[str, Any]:
    return {"name": "sgd", "lr": lr, "momentum": momentum}


ADAM = {"name": "adam", "lr": 0.01}
# one of each method that exchanges in every step; a warm-up is so short that most of 12 steps come after it
PRESETS = [
    Preset("dense"),
    Preset("fp16"),
    Preset("ef_sign"),
    Preset("ef"),
    Preset("ef21", {}, sgd(0.3)),
    Preset("loco"),
    Preset("dice_sgd", {"noise_multiplier": 1e-3, "noise_seed": 1}),
    Preset("two_way"),
    Preset("qsgd"),
    Preset("natural"),
    Preset("terngrad"),
    Preset("top_k", {"density": 0.1}),
    Preset("random_k", {"density": 0.3}),
    Preset("threshold", {"threshold": 0.005}),
    Preset("dgc", {"density": 0.1, "warmup_steps": 2}, sgd(0.05)),
    Preset("powersgd", {"rank": 2}),
    Preset("onebit_adam", {"freeze_step": 4, "scale": "l1"}, ADAM),
    Preset("demo", {}, sgd(0.003)),
    Preset(
        "zero_one_adam",
        {"var_freeze_step": 4, "var_update_scaler": 2, "local_step_scaler": 2, "local_step_clipper": 4, "scale": "l1"},
        ADAM,
    ),
    Preset("onebit_lamb", {"freeze_step": 4, "scale": "l1"}, {"name": "lamb", "lr": 0.01}),
    Preset("distributed_lion", {}, {"name": "lion", "lr": 0.003}),
    Preset("signum", {}, sgd(0.003)),
    Preset("auto", {"measure": 20}),  # dense all the time, as what is measured is not known; see tests/told.py
]
