"""EF-signSGD with compression in both directions."""

import torch

from commopt.compress.feedback import Kept
from commopt.compress.options import SignOptions
from commopt.compress.sign import equalising_factors
from commopt.exchange.two_way import TwoWayMean
from commopt.groups.base import Group
from commopt.method import GradientMethod, options
from commopt.options import Share
from commopt.wire.bucket import Bucket


@options
class EFSignOptions(SignOptions):
    residual_decay: Share = 1.0


class EFSign(GradientMethod, TwoWayMean):
    """Send one bit per gradient element each way, and add what was left out to the next step's message.

    Karimireddy et al. 2019, arXiv:1901.09847 (error feedback for signs), with the server side of DoubleSqueeze,
    arXiv:1905.05957:
        q_i = C(g_i + e_i);  e_i <- g_i + e_i - q_i;  y = C(mean q_i + s);  s <- mean q_i + s - y
    The learning rate is applied outside: a residual that was collected at a high rate is applied at the current one.
    Sends 2(N-1)/N x (1/8 + 4/block_size) bytes per parameter and step.
    State: 4 + 4/N bytes per parameter; a half or a quarter of it with residual_bits 16 or 8.
    Use it with SGD at a low momentum (such as 0.3), if you need 1 bit per gradient element from the first step on.
    Not for SGD with momentum 0.9: residuals delay gradients by some steps, and momentum amplifies that into
    oscillation.

    scale: "l1", the mean magnitude of each block (default); "rms", its root mean square; "l2", that of each tensor, as
        in DeepSpeed; or "model", that of all parameters. With "model", all buckets are exchanged together after
        backward (overlap=False).
    block_size: elements per scale, a multiple of 8; only used with "l1" and "rms".
    prescale: with scale="model", bring all parameters to one magnitude before they are compressed, by factors taken
        from the first step's exact mean (1-bit LAMB, arXiv:2104.06069).
    residual_bits, residual_decay: see `two_way`.
    """

    name = "ef_sign"
    Options = EFSignOptions
    options: EFSignOptions
    warmup_option = "prescale"
    warmup_steps = 0

    def set_up(self) -> None:
        o = self.options
        TwoWayMean.__init__(self, o.compressor(), Kept(o.residual_bits, o.residual_decay))
        self.warmup_steps = int(o.prescale)

    @property
    def is_exact(self) -> bool:
        return self.options.prescale and self.factors is None

    def exchange(self, bucket: Bucket, group: Group) -> None:
        if not self.is_exact:
            super().exchange(bucket, group)
        elif self.average_(bucket, group):
            mean = torch.zeros(self.index.total, device=self.device, dtype=torch.float32)
            for name, x in bucket.views():
                self.index.view(mean, name).copy_(x)
            self.factors = equalising_factors(mean, self.index)
