"""The uncompressed baseline."""

from __future__ import annotations

from typing import Any

from commopt.exchange.mean import Mean


class Dense(Mean):
    """Average gradients in their own dtype by a ring all-reduce: what DDP does, counted and paced like every other method.

    PyTorch's DistributedDataParallel, Li et al. 2020, arXiv:2006.15704; the ring: Patarasuk and Yuan 2009.
        y = mean g_i
    Sends 2(N-1)/N x 4 bytes per float32 parameter and step.
    State: none.
    Use it as the baseline, and wherever the link is not what a step waits for.
    Not for links on which gradients take longer than the arithmetic.

    max_norm: clip the mean gradient to this global L2 norm. grad_scaler: the `torch.amp.GradScaler` of the loss, if there is one.
    """

    name = "dense"

    def __init__(self, *, max_norm: float | None = None, grad_scaler: Any = None) -> None:
        super().__init__(max_norm=max_norm, grad_scaler=grad_scaler)
