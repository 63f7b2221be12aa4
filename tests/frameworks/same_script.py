"""One text per framework; only the method's name differs. Two ranks, started by torchrun; rank 0 writes losses as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import commopt

STEPS = 24


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.layers(x), labels)}


def batch(step: int, rank: int) -> dict[str, Tensor]:
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(2 * step + rank))
    return {"x": x, "labels": x[:, :4].argmax(dim=1)}


def loop(method: str, model: nn.Module) -> commopt.Run:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = commopt.attach(model, method, optimizer)
    run.join()
    for step in run.range(STEPS):
        loss = model(**batch(step, run.rank))["loss"]
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
    run.finish()
    return run


def plain(method: str) -> tuple[nn.Module, commopt.Run]:
    model = Model()
    return model, loop(method, model)


def ddp(method: str) -> tuple[nn.Module, commopt.Run]:
    model = Model()
    return model, loop(method, DistributedDataParallel(model))


def accelerate(method: str) -> tuple[nn.Module, commopt.Run]:
    accelerator: Any = Accelerator(cpu=True)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    prepared = commopt.wrap(accelerator.prepare_model(model, evaluation_mode=True), method)
    optimizer = accelerator.prepare(optimizer)
    run = commopt.attach(prepared, method, optimizer)
    run.join()
    for step in run.range(STEPS):
        accelerator.backward(prepared(**batch(step, accelerator.process_index))["loss"])
        optimizer.step()
        optimizer.zero_grad()
    run.finish()
    return model, run


def trainer(method: str) -> tuple[nn.Module, commopt.Run]:
    model = Model()
    batches = [batch(step, 0) for step in range(8)]
    rows = [{key: x[k] for key, x in one.items()} for one in batches for k in range(32)]
    settings: dict[str, Any] = {"max_steps": STEPS, "per_device_train_batch_size": 16, "learning_rate": 1e-2}
    quiet: dict[str, Any] = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(sys.argv[1], average_tokens_across_devices=False, **settings, **quiet)
    trainer = Trainer(model, arguments, train_dataset=rows)
    run = commopt.attach(trainer, method)
    trainer.train()
    return model, run


def main() -> None:
    losses: dict[str, tuple[float, float]] = {}
    torch.distributed.init_process_group("gloo")
    for name in ("ef_sign", "onebit_adam", "powersgd", "dgc", "diloco", "noloco"):
        for train in (plain, ddp, accelerate, trainer):
            if train is ddp and name in ("diloco", "noloco"):
                continue
            model, run = train(name)
            with torch.no_grad():
                ends = [float(one(**batch(10_000, 0))["loss"]) for one in (Model(), model)]
            assert run.traffic.payload_bytes
            run.close()
            losses[f"{train.__name__} {name}"] = (ends[0], ends[1])
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1], "losses.json").write_text(json.dumps(losses))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
