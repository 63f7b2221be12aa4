"""Twenty steps of every method: losses and a hash of the parameters, on simulated ranks and over Gloo."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pool import Pool
from presets import ADAM, PRESETS, Preset, sgd
from rig import flat, loss_of, make_batch, make_model, train_step

from commopt.groups import SimWorld, TorchGroup

STEPS = 20
RECORDED = Path(__file__).with_name("recorded.json")
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


def train(group: Any, case: int) -> tuple[list[str], str]:
    """(losses as hexadecimal, SHA-256 of the parameters) of this rank."""
    preset = CASES[case]
    model = make_model()
    run = preset.attach(model, group, max_norm=MAX_NORM.get(case))
    run.join()
    losses = [train_step(model, run.optimizer, group.rank, step).hex() for step in range(STEPS)]
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


def label(case: int) -> str:
    return f"{CASES[case]}{f' max_norm {MAX_NORM[case]}' if case in MAX_NORM else ''}"


def plain_digest() -> str:
    """The hash of plain torch's parameters after the steps of `dense` on three ranks; it depends on CPU and torch only."""
    model = make_model()
    optimizer = CASES[0].optimizer(model)
    for step in range(STEPS):
        mean = [torch.zeros_like(p) for p in model.parameters()]
        for rank in range(3):
            x, y = make_batch(rank, step)
            optimizer.zero_grad()
            loss_of(model(x), y).backward()
            for total, p in zip(mean, model.parameters(), strict=True):
                total += p.grad / 3  # type: ignore[operator]
        for p, total in zip(model.parameters(), mean, strict=True):
            p.grad = total
        optimizer.step()
    return hashlib.sha256(flat(model).numpy().tobytes()).hexdigest()[:32]


def summary(ranks: list[tuple[list[str], str]]) -> list[list[Any]]:
    """By rank: the first and the last loss, and the first half of the hash."""
    return [[float.fromhex(losses[0]), float.fromhex(losses[-1]), digest[:32]] for losses, digest in ranks]


def main() -> None:
    """Record again after a change that is meant to change results: `python tests/recording.py`."""
    torch.set_num_threads(1)
    pool, cases = Pool(), {}
    for case in range(len(CASES)):
        simulated = SimWorld[Any](3).run(lambda group, case=case: train(group, case))  # type: ignore[misc]
        gloo = pool.run(2, on_gloo, case)
        cases[label(case)] = {"simulated": summary(simulated), "gloo": summary(gloo)}
    pool.close()
    write({"torch": torch.__version__, "cases": cases})


def write(recorded: dict[str, Any]) -> None:
    """One line for each case."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in recorded.pop("cases").items()]
    head = "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in recorded.items())
    RECORDED.write_text("{\n" + head + '"cases": {\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    sys.modules["recording"] = sys.modules["__main__"]  # functions travel to the pool by their module's name
    main()
