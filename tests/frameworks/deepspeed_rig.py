"""DeepSpeed engines, and the plain training that they are compared with."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from rig import flat, loss_of, make_batch, make_model, start
from torch import Tensor, nn

from commopt.groups import Group

ADAM = {"optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}}}
SGD = {"optimizer": {"type": "SGD", "params": {"lr": 0.05}}}


def legacy(kind: str, **params: Any) -> dict[str, Any]:
    """A configuration with one of DeepSpeed's old optimizers."""
    return {"optimizer": {"type": kind, "params": {"lr": 0.01, **params}}}


def make_engine(own: Mapping[str, Any], *, ours: bool = True, model: nn.Module | None = None, **arguments: Any) -> Any:
    """An engine around the model of the rig, by our `initialize` or by DeepSpeed's own."""
    import deepspeed

    from commopt.deepspeed import initialize

    make: Any = initialize if ours else deepspeed.initialize
    model = model or make_model()
    config = {"train_micro_batch_size_per_gpu": 8, "gradient_clipping": 0.0, **own}
    arguments.setdefault("model_parameters", list(model.parameters()))
    return make(model=model, config=config, **arguments)[0]


@contextmanager
def log() -> Iterator[list[str]]:
    """What this rank is told by commopt."""
    told: list[str] = []
    ours, handler = logging.getLogger("commopt"), logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    ours.addHandler(handler)
    try:
        yield told
    finally:
        ours.removeHandler(handler)


def train(engine: Any, steps: int, *, first: int = 0, poison: Mapping[int, float] | None = None) -> None:
    """Steps from `first` on, each on this rank's own batch; poison: {step: by which rank 1's loss is multiplied}."""
    dtype, rank = next(engine.module.parameters()).dtype, dist.get_rank()
    micro_batches = engine.gradient_accumulation_steps()
    for step in range(first * micro_batches, (first + steps) * micro_batches):
        x, y = make_batch(rank, step)
        loss = loss_of(engine(x.to(dtype)).float(), y)
        if poison and rank == 1 and step in poison:
            loss = loss * poison[step]
        engine.backward(loss)
        engine.step()


def engine_run(own: Mapping[str, Any], steps: int, ours: bool = True) -> Tensor:
    engine = make_engine(own, ours=ours)
    train(engine, steps)
    return flat(engine.module).float()


def plain_run(
    group: Group,
    method: str,
    options: Mapping[str, Any],
    steps: int,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    clip: float = 0.0,
    micro_batches: int = 1,
) -> Tensor:
    """The same training by the plain integration: of float32 masters, whose copies in `dtype` make the gradients."""
    masters, model = make_model(), make_model().to(dtype)
    with torch.no_grad():
        for low, p in zip(model.parameters(), masters.parameters(), strict=True):
            p.copy_(low)
    run = start(masters, method, group, **options)
    for step in range(steps):
        for micro in range(micro_batches):
            x, y = make_batch(group.rank, step * micro_batches + micro)
            (loss_of(model(x.to(dtype)).float(), y) / micro_batches * scale).backward()
        for low, p in zip(model.parameters(), masters.parameters(), strict=True):
            assert low.grad is not None
            p.grad, low.grad = low.grad.float() / scale, None
        if clip:
            run.exchange_gradients()
            torch.nn.utils.clip_grad_norm_(masters.parameters(), clip)
        run.optimizer.step()
        with torch.no_grad():
            for low, p in zip(model.parameters(), masters.parameters(), strict=True):
                low.copy_(p)
    return flat(model).float()
