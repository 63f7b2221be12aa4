"""Gradients in half precision on the wire."""

from typing import Literal

import torch

from commopt.exchange.mean import Mean
from commopt.method import GradientMethod, NoOptions, options


@options
class FP16Options(NoOptions):
    dtype: Literal["float16", "bfloat16"] = "float16"


class FP16(GradientMethod, Mean):
    """Average gradients by a ring all-reduce in half precision: divide by N, cast, sum, cast back.

    This is PyTorch's fp16_compress_hook. PyTorch refuses the bfloat16 form off CUDA; commopt does not:
        y = cast(sum of cast(g_i / N))
    A gradient beyond the dtype's range voids its bucket in that step.
    Sends 2(N-1)/N x 2 bytes per parameter and step.
    State: none.
    Use it first: it halves the bytes, with no measurable effect on the loss.
    Not for more than a factor of two. Not in float16 for gradients below 6e-8, which become zero; bfloat16 keeps
    those.

    dtype: "float16" or "bfloat16".
    """

    name = "fp16"
    Options = FP16Options
    options: FP16Options
    is_exact = True

    def set_up(self) -> None:
        self.wire_dtype = getattr(torch, self.options.dtype)
