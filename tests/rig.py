"""A small model, its data, and one training loop for all integrations; what the ranks of the pool are sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from pool import twin_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from commopt import build


from commopt.groups import Group, TorchGroup

from typing import Any as Attachment

FREEZE = 3
loss_of: Callable[..., Any] = nn.functional.mse_loss
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "fp16": ("fp16", {}),
    "ef_sign l1": ("ef_sign", {"scale": "l1", "block_size": 64}),
    "ef_sign l2": ("ef_sign", {"scale": "l2"}),
    "two_way int8": ("two_way", {"worker": "int8", "residual_bits": 8}),
    "dgc": ("dgc", {"density": 0.1, "warmup_steps": 2}),
    "distributed_lion": ("distributed_lion", {"lr": 0.003}),
    "onebit_adam l1": ("onebit_adam", {"scale": "l1", "block_size": 64, "freeze_step": FREEZE, "lr": 0.01}),
    "onebit_adam l2": ("onebit_adam", {"scale": "l2", "freeze_step": FREEZE, "lr": 0.01}),
}
COMPRESSED = [name for name in METHODS if "l" in name.split()[-1] and " " in name]
UPDATE = [name for name in METHODS if name.startswith("onebit_adam")]


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Six parameters; the same on every rank."""
    model = nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 4))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model.to(dtype)


def make_batch(rank: int, step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x, y = torch.randn(8, 12, generator=generator), torch.randn(8, 4, generator=generator)
    return x.to(dtype), y.to(dtype)


def make_method(
    case: str, model: nn.Module, **options: Any
) -> tuple[Any, torch.optim.Optimizer | None, torch.optim.Optimizer]:
    """The method, the optimizer that attach is given, and the optimizer that steps."""
    name, preset = METHODS[case]
    if is_update_method(name):
        method: Any = build(name, model.named_parameters(), **{**preset, **options})
        return method, None, method
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.0 if name == "dgc" else 0.9)
    return build(name, **{**preset, **options}), sgd, sgd


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


def state_of(attachment: Attachment) -> list[Tensor]:
    """Everything that an exchange may change on this rank."""
    method: Any = attachment.method
    local = [view for name in attachment.parameters for view in method.state_views(name)]
    optimizer = attachment.optimizer.state.values()
    return local + [x for state in optimizer for x in state.values() if isinstance(x, Tensor) and x.dim()]


@contextmanager
def attached(group: Group, case: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> Iterator[Any]:
    """(model, optimizer, attachment) for a plain script."""
    bucket_bytes = options.pop("bucket_bytes", 25 << 20)
    model = make_model(dtype)
    method, optimizer, steps = make_method(case, model, **options)
    attachment = plain.attach(model, method, optimizer, group, bucket_bytes=bucket_bytes)
    yield model, steps, attachment
    attachment.detach()


@contextmanager
def wrapped(
    process_group: dist.ProcessGroup,
    case: str,
    *,
    model: nn.Module | None = None,
    overlap: bool = True,
    bucket_cap_mb: float = 25.0,
    find_unused_parameters: bool = False,
    gradient_as_bucket_view: bool = False,
    **options: Any,
) -> Iterator[Any]:
    """(DDP model, optimizer, attachment)."""
    made = DistributedDataParallel(
        make_model() if model is None else model,
        process_group=process_group,
        bucket_cap_mb=bucket_cap_mb,
        find_unused_parameters=find_unused_parameters,
        gradient_as_bucket_view=gradient_as_bucket_view,
    )
    method, optimizer, steps = make_method(case, made.module, **options)
    attachment = ddp.attach(made, method, optimizer, TorchGroup(twin_of(process_group)), overlap=overlap)
    try:
        yield made, steps, attachment
    finally:
        attachment.detach()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: int, first: int = 0) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(first, first + steps):
        x, y = make_batch(rank, step, dtype)
        loss = loss_of(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def run_plain(group: Group, case: str, steps: int, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    with attached(group, case, dtype=dtype, **options) as (model, optimizer, _):
        train(model, optimizer, group.rank, steps)
        return flat(model)


def run_plain_on_gloo(process_group: dist.ProcessGroup, case: str, steps: int, options: dict[str, Any]) -> Tensor:
    return run_plain(TorchGroup(process_group), case, steps, **options)


def run_ddp(process_group: dist.ProcessGroup, case: str, steps: int, options: dict[str, Any]) -> Tensor:
    dtype = options.pop("dtype", torch.float32)
    with wrapped(process_group, case, model=make_model(dtype), **options) as (model, optimizer, attachment):
        train(model, optimizer, dist.get_rank(process_group), steps)
        assert attachment.replicas_are_equal()
        return flat(model.module)
