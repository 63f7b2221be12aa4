"""Error feedback around any compressor, with an all-gather."""

from commopt.compress.options import Codec, ErrorFeedbackOptions
from commopt.exchange.gather import GatherMean
from commopt.method import GradientMethod, options


@options
class EFOptions(ErrorFeedbackOptions):
    compressor: Codec = "sign"  # type: ignore[assignment]  # a name, until it is validated


class EF(GradientMethod, GatherMean):
    """Send each rank's compressed gradient to all ranks, and add what was left out to the next step's message.

    Seide et al. 2014; Stich et al. 2018, arXiv:1809.07599; Karimireddy et al. 2019, arXiv:1901.09847, Algorithm 2:
        p_i = g_i + e_i;  q_i = C(p_i);  e_i <- p_i - q_i;  g = mean q_i
    In the papers, p_i is lr g_i + e_i. Here the learning rate is applied outside, so that any optimizer fits. A
    residual that was collected at a high rate is then applied at the current one. If the rate falls from a to b, the
    parameters miss (a - b) e_i of what the papers' form would still apply. If it rises, they get more. A schedule in
    small steps loses little.
    Sends (N-1) x C bytes per parameter and step, where C is the compressor's bytes per parameter: 1/8 + 4/2048 for
    signs.
    State: 4 bytes per parameter, a half or a quarter of it with residual_bits 16 or 8.
    Use it with sparse codecs, or on few ranks. What it sends grows with their number, but the answer is not compressed
    a second time.
    Not for signs or int8 on many ranks: `two_way` sends less from 3 ranks on.

    compressor: a name ("sign", "top_k", "int8", ...), or {"compressor": name, option: value}; `ef(sign)` names it in a
        configuration.
    error_feedback, residual_bits, residual_decay, reset_every, dense_1d, seed: see `two_way`.
    """

    name = "ef"
    positional = ("compressor",)
    Options = EFOptions
    options: EFOptions

    def set_up(self) -> None:
        o = self.options
        GatherMean.__init__(self, o.compressor, o.kept(), dense_1d=o.dense_1d, seed=o.seed)
