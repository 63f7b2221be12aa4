"""Twenty steps of every method: losses and a hash of the parameters, on simulated ranks and on Gloo's."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from presets import ADAM, PRESETS, SGD, Preset, sgd
from rig import flat, loss_of, make_batch, make_model

import commopt
from commopt.groups import TorchGroup

STEPS = 20
MORE = [
    Preset("onebit_adam", {"freeze_step": 4, "scale": "model", "prescale": True}, ADAM),
    Preset("two_way", {"worker": "4bit", "residual_bits": 8, "dense_1d": True}),
    Preset("dgc", {"density": 0.1, "nesterov": True}, sgd(0.05)),
    Preset("ef_sign"),
]
MAX_NORM = {len(PRESETS) + 2: 1.0, len(PRESETS) + 3: 0.5}  # by case
OUTER = [
    Preset("noloco", {"every": 4}),
    Preset("diloco", {"every": 4, "fragments": 2}),
    Preset("diloco", {"every": 4, "delay": 2, "message": {"compressor": "int8"}}),
    Preset("local_sgd", {"every": 4}),
    Preset("decentralized_adam", {"every": 1, "delay": 0, "topology": "complete"}),
    Preset("choco", {"every": 2}),
    Preset("push_sum", {"every": 2}),
]
CASES = [*PRESETS, *MORE, *OUTER]
assert all(preset.optimizer_block == SGD for preset in OUTER)


def train(group: Any, case: int) -> tuple[list[str], str]:
    """(losses as hexadecimal, SHA-256 of the parameters) of this rank."""
    preset = CASES[case]
    model = make_model()
    run = commopt.attach(model, preset.method(), preset.optimizer(model), group=group, max_norm=MAX_NORM.get(case))
    run.join()
    losses = []
    for step in range(STEPS):
        x, y = make_batch(group.rank, step)
        loss = loss_of(model(x), y)
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        losses.append(loss.item().hex())
    if run.method.kind == "outer":
        run.finish()
    digest = hashlib.sha256(flat(model).numpy().tobytes()).hexdigest()
    if isinstance(group, TorchGroup):
        dist.barrier(group.process_group)
    run.close()
    return losses, digest


def on_gloo(process_group: dist.ProcessGroup, case: int) -> tuple[list[str], str]:
    torch.set_num_threads(1)
    return train(TorchGroup(process_group), case)
