"""EF-signSGD with compression in both directions."""

from __future__ import annotations

from typing import Any

import torch

from commopt.compress.sign import check_prescale, equalising_factors, scaled_sign
from commopt.exchange.compressed import TwoWayMean
from commopt.exchange.mean import Mean
from commopt.groups.base import Group
from commopt.wire.bucket import Bucket


class EFSign(TwoWayMean):
    """Send one bit per gradient element each way, and what that left out with the next step's.

    Karimireddy et al. 2019, arXiv:1901.09847 (error feedback for signs), with the server side of DoubleSqueeze, arXiv:1905.05957:
        q_i = C(g_i + e_i);  e_i <- g_i + e_i - q_i;  y = C(mean q_i + s);  s <- mean q_i + s - y
    The learning rate stays outside: the residual of a high rate is replayed at the current one.
    Sends 2(N-1)/N x (1/8 + 4/block_size) bytes per parameter and step.
    State: 4 + 4/N bytes per parameter; a half or a quarter of it with residual_bits 16 or 8.
    Use it with SGD at a low momentum (0.3, say), where 1 bit per gradient element is needed from the first step on.
    Not for SGD with momentum 0.9: residuals delay gradients by some steps, and momentum amplifies that into oscillation.

    scale: "l1", the mean magnitude of each block (default); "l2", one scale per tensor as DeepSpeed has it; or "model", one for
        all parameters, whose buckets then travel as one after backward (overlap=False).
    block_size: elements per scale, a multiple of 8; of no effect with another scale than "l1".
    prescale: with scale="model", bring all parameters to one magnitude before they are compressed, by factors taken from the
        first step's exact mean (1-bit LAMB, arXiv:2104.06069).
    residual_bits, residual_decay: see `two_way`.
    """

    name = "ef_sign"
    warmup_option = "prescale"

    def __init__(
        self,
        *,
        scale: str = "l1",
        block_size: int = 2048,
        prescale: bool = False,
        residual_bits: int = 32,
        residual_decay: float = 1.0,
        max_norm: float | None = None,
        grad_scaler: Any = None,
    ) -> None:
        check_prescale(prescale, scale)
        self.prescale, self._exactly = prescale, Mean()
        self.made_of = (self._exactly,)
        super().__init__(
            scaled_sign(scale, block_size),
            residual_bits=residual_bits,
            residual_decay=residual_decay,
            max_norm=max_norm,
            grad_scaler=grad_scaler,
        )

    @property
    def is_exact(self) -> bool:
        return self.prescale and self.factors is None

    @property
    def is_steady(self) -> bool:
        return not self.is_exact

    @property
    def warmup_steps(self) -> int:
        return int(self.prescale)

    def aggregate(self, bucket: Bucket, group: Group) -> None:
        if not self.is_exact:
            return super().aggregate(bucket, group)
        self._exactly.aggregate(bucket, group)
        if bucket.void is None:
            mean = torch.zeros(self.index.total, device=self.device)
            for name, x in bucket.views():
                self.index.view(mean, name).copy_(x)
            self.factors = equalising_factors(mean, self.index)
        return None
