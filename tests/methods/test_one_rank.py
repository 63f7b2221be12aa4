"""One rank alone: a method is the optimizer that it goes with, or stands in for, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from presets import Preset, sgd
from synthetic import parameters

from commopt import attach
from commopt.groups import LocalGroup
from commopt.optim import make_optimizer

ADAM = {"name": "adam", "lr": 0.01, "foreach": False}
ADAMW = {**ADAM, "name": "adamw", "weight_decay": 0.1}
LAMB = {"name": "lamb", "lr": 0.01}
LION = {"name": "lion", "lr": 0.01, "weight_decay": 0.1}
PHASE_A = {"var_freeze_step": None, "var_update_scaler": 1000}
CASES = [
    *(Preset(name, {}, sgd(0.05, 0.9)) for name in ("ef", "loco", "powersgd")),
    Preset("ef21", {"eta": 1.0}, sgd(0.05, 0.9)),
    *(Preset("onebit_adam", {"freeze_step": 1000}, block) for block in (ADAM, ADAMW)),
    *(Preset("zero_one_adam", PHASE_A, block) for block in (ADAM, ADAMW)),
    Preset("onebit_lamb", {"freeze_step": 1000}, LAMB),
    Preset("onebit_lamb", {"freeze_step": 1000}, {**LAMB, "weight_decay": 0.1}),
    Preset("onebit_lamb", {"freeze_step": 1000}, {**LAMB, "bias_correction": True, "max_coeff": 0.3}),
    *(Preset("distributed_lion", {"vote": vote}, LION) for vote in ("average", "majority")),
]


def optimizer_of(block: dict[str, Any], model: Any) -> torch.optim.Optimizer:
    """With a second parameter group that has a rate, betas and decay of its own."""
    own = {"lr": block["lr"] / 10} | ({} if block["name"] == "sgd" else {"betas": (0.5, 0.9)})
    own |= {key: 3 * block[key] for key in ("weight_decay",) if key in block}
    first, *others = model.all
    return make_optimizer(block, [{"params": [first]}, {"params": others, **own}])


@pytest.mark.parametrize("preset", CASES, ids=lambda preset: f"{preset} {preset.optimizer_block}")
def test_one_rank_is_its_optimizer(preset: Preset) -> None:
    ours, theirs = (parameters((50, 60), (7,), (0,)) for _ in range(2))
    run = attach(ours, preset.method(), optimizer_of(preset.optimizer_block, ours), group=LocalGroup())
    optimizer = optimizer_of(preset.optimizer_block, theirs)
    for step in range(30):
        for model, one in ((ours, run.optimizer), (theirs, optimizer)):
            model.set_gradients(0, step)
            one.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.all, theirs.all, strict=True))
