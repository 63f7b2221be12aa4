"""Gradients in half precision on the wire."""

from __future__ import annotations

from typing import Any

import torch

from commopt.errors import ConfigError, did_you_mean
from commopt.exchange.mean import Mean

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class FP16(Mean):
    """Average gradients by a ring all-reduce in half precision: divide by N, cast, sum, cast back.

    As PyTorch's fp16_compress_hook, whose bfloat16 form is refused off CUDA; this one is not:
        y = cast(sum of cast(g_i / N))
    A gradient beyond the dtype's range voids its bucket in that step.
    Sends 2(N-1)/N x 2 bytes per parameter and step.
    State: none.
    Use it first: it halves the bytes, and the loss does not notice.
    Not for more than a factor of two, nor in float16 for gradients below 6e-8, which become zero; bfloat16 keeps those.

    dtype: "float16" or "bfloat16".
    """

    name = "fp16"

    def __init__(self, *, dtype: str = "float16", max_norm: float | None = None, grad_scaler: Any = None) -> None:
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ConfigError(f"dtype: {dtype!r} is no half precision{did_you_mean(str(dtype), _DTYPES)}")
        super().__init__(wire_dtype=_DTYPES[dtype], max_norm=max_norm, grad_scaler=grad_scaler)
