"""Every method with options that suit a short test: what the tests that run over all methods use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from commopt.methods import build, is_update_method


@dataclass(frozen=True)
class Preset:
    """A method, its options, and for a gradient method the arguments of the SGD that applies its result."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    sgd: dict[str, Any] = field(default_factory=lambda: {"lr": 0.05, "momentum": 0.9})

    def method(self, model: nn.Module) -> Any:
        return build(self.name, model.named_parameters() if is_update_method(self.name) else None, **self.options)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), **self.sgd)

    def __str__(self) -> str:
        return f"{self.name} {self.options}" if self.options else self.name


# one of each method; a warm-up is so short that most of 12 steps come after it
PRESETS = [
    Preset("dense"),
    Preset("fp16"),
    Preset("ef_sign"),
    Preset("ef"),
    Preset("ef21", {}, {"lr": 0.3}),
    Preset("loco"),
    Preset("dice_sgd", {"noise_multiplier": 1e-3, "noise_seed": 1}),
    Preset("two_way"),
    Preset("qsgd"),
    Preset("natural"),
    Preset("terngrad"),
    Preset("top_k", {"density": 0.1}),
    Preset("random_k", {"density": 0.3}),
    Preset("threshold", {"threshold": 0.005}),
    Preset("dgc", {"density": 0.1, "warmup_steps": 2}, {"lr": 0.05}),
    Preset("powersgd", {"rank": 2}),
    Preset("onebit_adam", {"lr": 0.01, "freeze_step": 4}),
    Preset("demo", {"lr": 0.003}),
    Preset(
        "zero_one_adam",
        {"lr": 0.01, "var_freeze_step": 4, "var_update_scaler": 2, "local_step_scaler": 2, "local_step_clipper": 4},
    ),
    Preset("onebit_lamb", {"lr": 0.01, "freeze_step": 4}),
    Preset("distributed_lion", {"lr": 0.003}),
    Preset("signum", sgd={"lr": 0.003}),
]
