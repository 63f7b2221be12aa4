"""The exact mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from commopt import kernels
from commopt.exchange.base import Exchange, first_bad
from commopt.groups.base import Group
from commopt.kernels.reference import cast as plain
from commopt.wire.bucket import Bucket


class Mean(Exchange):
    """The exact mean by a ring all-reduce in the bucket's dtype, or in `wire_dtype`.

    With a half precision `wire_dtype` values are divided by N, cast, summed in that dtype and cast back, as PyTorch's
    fp16_compress_hook does. Payload: 2(N-1)/N elements.
    """

    is_linear = True
    needs_float32 = False
    wire_dtype: torch.dtype | None = None

    def lay_out(self, named_parameters: Sequence[tuple[str, Tensor]], group: Group) -> None:
        super().lay_out(named_parameters, group)
        if self.wire_dtype and self.device.type == "cpu":  # else a step would wait for the kernel
            x = torch.ones(1, dtype=torch.float32)
            kernels.of("cast", self.device).divide_(x, 1, x.to(self.wire_dtype))

    def exchange(self, bucket: Bucket, group: Group) -> None:
        x, wire = bucket.flat, self.wire_dtype
        if wire in (None, x.dtype):
            self.average_(bucket, group)
            return
        mean = torch.empty_like(x, dtype=wire)
        kernel = kernels.of("cast", x.device) if x.device.type == "cpu" and x.dtype == torch.float32 else plain
        kernel.divide_(x, group.size, mean)
        if mean.numel():
            group.all_reduce(mean)
        x.copy_(mean)
        # a CPU adds up float32 faster, and a GPU reads half as many bytes
        self.is_void(bucket, first_bad(self.index, bucket if x.device.type == "cpu" else bucket.with_flat(mean)), group)

    def bytes_per_parameter(self, ranks: int) -> float:
        return 2 * (ranks - 1) / ranks * (self.wire_dtype or torch.float32).itemsize
