"""1-bit Adam: after a warm-up the variance is frozen, and only signs of the momentum are sent."""

from collections.abc import Mapping, Sequence
from typing import Any

from commopt.kernels.reference.apply import Move
from commopt.method import options
from commopt.optim.frozen import FreezeStep, FrozenOptions, FrozenVariance
from commopt.options import Flag


@options
class OnebitAdamOptions(FrozenOptions):
    freeze_step: FreezeStep = "auto"
    bias_correction: Flag = True


class OnebitAdam(FrozenVariance):
    """Adam whose momentum is averaged with one bit per element each way once its variance has settled.

    Tang et al. 2021, arXiv:2102.02888, Algorithm 1. Steps 1 to freeze_step are Adam on the exact mean gradient:
        m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  x <- x - lr (m / (sqrt(v) + eps) + weight_decay x)
    then v stays, and with g_i the local gradient and C scaled signs with error feedback on both sides:
        m_i = b1 m + (1 - b1) g_i;  m <- C(mean C(m_i));  x <- x - lr (m / (sqrt(v) + eps) + weight_decay x)
    Differs from the paper's code: bias correction is on by default, as in torch.optim.Adam. At the freeze, v keeps its
    current correction, and m's continues, so that no step jumps. A sign would move coordinates whose variance is zero
    at the freeze by lr * scale / eps. They are masked: their momentum stays zero. If the variance is so small that a
    sign would move a coordinate by more than max_ratio * lr (for example in dead units of a ReLU), sqrt(v) + eps is
    raised to |m| / max_ratio. One rank alone does not compress.
    Sends 2(N-1)/N x (1/8 + 4/block_size) bytes per parameter and step after the freeze, and as `dense` before it.
    State: 12 + 4/N bytes per parameter: m, v, the worker's and the server's residual.
    Use it in place of Adam on slow links: it sends 1 bit per element each way, and reaches Adam's loss once the
    variance has settled.
    Not for short fine-tuning runs, whose warm-up would be most of the run; `distributed_lion` needs none.

    freeze_step: the last step with the exact mean, best 15 to 25 % of all and not before the learning rate's own
        warm-up ends; or "auto": when |v|_1 has changed by less than 4 % over 1/(1 - b2) steps, and the rate no longer
        rises, and at the latest after a quarter of the steps that `run.range` is given.
    scale, block_size, residual_bits: as in `ef_sign`; "rms" by default.
    prescale: with scale="model", bring all parameters to one magnitude before they are compressed, by factors taken
        from the momentum at the freeze (1-bit LAMB, arXiv:2104.06069).
    max_ratio: as above; Adam's own steps stay below 7.3 lr at the default betas. None for the paper's form, without a
        bound.
    momentum_mask: {parameter name: tensor of its shape}; momentum is multiplied by it after the freeze, for
        coordinates that get gradients only later (positions beyond the sequence length).
    """

    name = "onebit_adam"
    Options = OnebitAdamOptions
    options: OnebitAdamOptions
    stands_for = ("Adam", "AdamW")

    def update(self, names: Sequence[str], group: Mapping[str, Any]) -> None:
        step, variance_step = self.numbers("step", names), self.numbers("variance_step", names)
        kept = 1 - group["lr"] * group["weight_decay"]

        def how(name: str) -> Move:
            lacking = 1 - group["betas"][0] ** step[name] if self.options.bias_correction else 1.0
            return Move(self.root_of(variance_step[name], group), group["lr"] / lacking, kept, rounds=True)

        self.move_({name: how(name) for name in names})  # x <- x - lr (m / (sqrt(v) + eps) + weight_decay x)
