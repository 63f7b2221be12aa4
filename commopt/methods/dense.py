"""The uncompressed baseline."""

from __future__ import annotations

from typing import Any

from commopt.aggregate import Mean


class Dense(Mean):
    """Average gradients in their own dtype by a ring all-reduce: what DDP does, counted and paced like every other method.

    Sends 2(N-1)/N x 4 bytes per float32 parameter and step. State: none.
    """

    name = "dense"

    def __init__(self, *, max_norm: float | None = None, grad_scaler: Any = None) -> None:
        super().__init__(max_norm=max_norm, grad_scaler=grad_scaler)
