"""The exact mean."""

from __future__ import annotations

import torch

from commopt.exchange.base import Exchange, first_bad
from commopt.groups.base import Group
from commopt.wire.bucket import Bucket


class Mean(Exchange):
    """The exact mean by a ring all-reduce in the bucket's dtype, or in `wire_dtype`.

    With a half precision `wire_dtype` values are divided by N, cast, summed in that dtype and cast back, as PyTorch's
    fp16_compress_hook does. Payload: 2(N-1)/N elements.
    """

    is_linear = True
    needs_float32 = False
    wire_dtype: torch.dtype | None = None

    def exchange(self, bucket: Bucket, group: Group) -> None:
        mean = (bucket.flat / group.size).to(self.wire_dtype or bucket.flat.dtype)
        if mean.numel():
            group.all_reduce(mean)
        if not self.is_void(bucket, first_bad(self.index, bucket.with_flat(mean)), group):
            bucket.flat.copy_(mean)

    def bytes_per_parameter(self, ranks: int) -> float:
        return 2 * (ranks - 1) / ranks * (self.wire_dtype or torch.float32).itemsize
