"""A small model, its data, and one training loop for all integrations; functions that the pool's ranks run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from pool import twin_of
from presets import ADAM, Preset, sgd
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from commopt import Method, Run, attach, build
from commopt.groups import Group, TorchGroup
from commopt.methods import METHODS as METHODS_BY_NAME
from commopt.optim import make_optimizer
from commopt.optim.update import UpdateMethod

FREEZE = 3
loss_of: Callable[..., Any] = nn.functional.mse_loss
METHODS = {
    "dense": Preset("dense"),
    "fp16": Preset("fp16"),
    "ef_sign l1": Preset("ef_sign", {"scale": "l1", "block_size": 64}),
    "ef_sign l2": Preset("ef_sign", {"scale": "l2"}),
    "two_way int8": Preset("two_way", {"worker": "int8", "residual_bits": 8}),
    "dgc": Preset("dgc", {"density": 0.1, "warmup_steps": 2}, sgd(0.05)),
    "distributed_lion": Preset("distributed_lion", {}, {"name": "lion", "lr": 0.003}),
    "onebit_adam l1": Preset("onebit_adam", {"scale": "l1", "block_size": 64, "freeze_step": FREEZE}, ADAM),
    "onebit_adam l2": Preset("onebit_adam", {"scale": "l2", "freeze_step": FREEZE}, ADAM),
}
UPDATE = [name for name in METHODS if name.startswith("onebit_adam")]


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Six parameters; the same on every rank."""
    model = nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 4))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model.to(dtype)


def normal(n: int, seed: int) -> Tensor:
    """(n,) draws from the normal distribution."""
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def sgd_of(model: nn.Module, lr: float = 0.05, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def make_batch(rank: int, step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x, y = torch.randn(8, 12, generator=generator), torch.randn(8, 4, generator=generator)
    return x.to(dtype), y.to(dtype)


def mean_norm(ranks: int, step: int) -> float:
    """What clip_grad_norm_ returns for the mean of the ranks' gradients, before any training."""
    model = make_model()
    for rank in range(ranks):
        x, y = make_batch(rank, step)
        (loss_of(model(x), y) / ranks).backward()
    return float(nn.utils.clip_grad_norm_(model.parameters(), 1.0))


def make_method(case: str, model: nn.Module) -> tuple[Method, torch.optim.Optimizer]:
    """The method, and the optimizer to attach it with."""
    return METHODS[case].method(), METHODS[case].optimizer(model)


def start(
    model: nn.Module,
    method: Any,
    group: Any = None,
    *,
    optimizer: torch.optim.Optimizer | Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Attach a method; options are those of `attach`, of the optimizer it stands in for (lr, betas ...), or its own.

    optimizer: itself or its block; if None, the one an update method stands in for, or SGD with a rate of 0.05.
    """
    given = {key: options.pop(key) for key in ("max_norm", "grad_scaler", "overlap") if key in options}
    kind = METHODS_BY_NAME[method.partition("(")[0]] if isinstance(method, str) else type(method)
    if not isinstance(optimizer, torch.optim.Optimizer):
        block = dict(optimizer or default_block(kind))
        takes = kind.takes if issubclass(kind, UpdateMethod) else ("lr",)
        block |= {key: options.pop(key) for key in takes if key in options}
        optimizer = make_optimizer(block, model.parameters())
    made = build(method, **options) if isinstance(method, str) else method
    return attach(model, made, optimizer, group=group, **given)


def default_block(kind: type[Method]) -> dict[str, Any]:
    """An optimizer for a method of this kind."""
    if not issubclass(kind, UpdateMethod):
        return sgd(0.05)
    name = kind.stands_for[-1] if kind.stands_for[0] != "LAMB" else "LAMB"
    return {"name": name.lower(), **({"weight_decay": 0.0} if name == "AdamW" else {})}


def _start_case(model: nn.Module, case: str, group: Group, options: dict[str, Any]) -> Any:
    name, preset, block = METHODS[case]
    return start(model, name, group, optimizer=block, **{**preset, **options})


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


def state_of(run: Run) -> list[Tensor]:
    """Everything that an exchange may change on this rank."""
    kept = [view for name in run.parameters for view in run.method.state_views(name)]
    states = run.optimizer.state.values()
    return kept + [x for state in states for x in state.values() if isinstance(x, Tensor) and x.dim()]


@contextmanager
def attached(
    group: Group, case: str, *, dtype: torch.dtype = torch.float32, bucket_bytes: int = 25 << 20, **options: Any
) -> Iterator[tuple[nn.Sequential, torch.optim.Optimizer, Any]]:
    """(model, optimizer that steps, run) for a plain script."""
    model = make_model(dtype)
    run: Any = _start_case(model, case, group, options)
    run.bucket_bytes = bucket_bytes
    yield model, run.optimizer, run
    run.close()


@contextmanager
def wrapped(
    process_group: dist.ProcessGroup,
    case: str,
    *,
    model: nn.Module | None = None,
    bucket_cap_mb: float = 25.0,
    find_unused_parameters: bool = False,
    gradient_as_bucket_view: bool = False,
    **options: Any,
) -> Iterator[tuple[DistributedDataParallel, torch.optim.Optimizer, Any]]:
    """(DDP model, optimizer that steps, run)."""
    made = DistributedDataParallel(
        make_model() if model is None else model,
        process_group=process_group,
        bucket_cap_mb=bucket_cap_mb,
        find_unused_parameters=find_unused_parameters,
        gradient_as_bucket_view=gradient_as_bucket_view,
    )
    run = _start_case(made, case, TorchGroup(twin_of(process_group)), options)
    try:
        yield made, run.optimizer, run
    finally:
        run.close()


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int) -> float:
    """One step on the rank's batch of that number; returns the loss."""
    x, y = make_batch(rank, step, next(model.parameters()).dtype)
    loss = loss_of(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def scaled_step(scaler: torch.amp.GradScaler, model: nn.Module, run: Run, step: int, factor: float = 1.0) -> None:
    """One step as a user writes it with a GradScaler; factor: of the loss."""
    x, y = make_batch(run.rank, step)
    run.optimizer.zero_grad()
    scaled: Any = scaler.scale(loss_of(model(x), y) * factor)
    scaled.backward()
    scaler.step(run.optimizer)
    scaler.update()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        train_step(model, optimizer, rank, step)


def run_plain(group: Group, case: str, steps: int, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    with attached(group, case, dtype=dtype, **options) as (model, optimizer, _):
        train(model, optimizer, group.rank, steps)
        return flat(model)


def on_gloo(process_group: dist.ProcessGroup, work: Callable[..., Any], *arguments: Any) -> Any:
    """What a rank of the pool returns for work(group, *arguments)."""
    return work(TorchGroup(process_group), *arguments)


def run_ddp(process_group: dist.ProcessGroup, case: str, steps: int, options: dict[str, Any]) -> Tensor:
    dtype = options.pop("dtype", torch.float32)
    with wrapped(process_group, case, model=make_model(dtype), **options) as (model, optimizer, run):
        train(model, optimizer, dist.get_rank(process_group), steps)
        assert run.replicas_are_equal()
        return flat(model.module)
