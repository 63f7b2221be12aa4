"""The training that a framework's is compared with: the same batches under DDP, in a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from rig import flat, loss_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from commopt import attach


def train_by_ddp(
    model: nn.Module,
    method: Any,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    every: int = 1,
    clip: float = 0.0,
    scaler: torch.amp.GradScaler | None = None,
    dtype: torch.dtype | None = None,
    schedule: Callable[[], Any] = lambda: None,
    **options: Any,
) -> tuple[Tensor, float]:
    """Parameters, and bytes sent. every: batches in a step; dtype: of autocast; schedule: called after each step."""
    wrapped = DistributedDataParallel(model)
    run = attach(wrapped, method, optimizer, grad_scaler=scaler, **options)
    scaling = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for k, (x, y) in enumerate(batches, 1):
        wrapped.require_backward_grad_sync = is_last = k % every == 0
        with torch.autocast("cpu", dtype, enabled=dtype is not None, cache_enabled=False):
            loss = loss_of(wrapped(x), y) / every
        scaling.scale(loss).backward()
        if is_last:
            if clip:
                scaling.unscale_(run.optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaling.step(run.optimizer)
            scaling.update()
            schedule()
            run.optimizer.zero_grad()
    run.close()
    return flat(model), run.traffic.payload_bytes
