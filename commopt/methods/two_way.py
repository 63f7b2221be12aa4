"""Compression in both directions with any pair of codecs."""

from commopt.compress.options import Codec, ErrorFeedbackOptions
from commopt.exchange.two_way import TwoWayMean
from commopt.method import GradientMethod, options


@options
class TwoWayOptions(ErrorFeedbackOptions):
    worker: Codec = "int8"  # type: ignore[assignment]  # a name, until it is validated
    server: Codec | None = None


class TwoWay(GradientMethod, TwoWayMean):
    """Send compressed gradients to the rank that averages them, and its compressed answers to all, with error feedback on both sides.

    DoubleSqueeze, Tang et al. 2019, arXiv:1905.05957. `two_way(int8)` and `two_way(sign, int8)` name the codecs in a
    configuration.
        q_i = C(g_i + e_i);  e_i <- g_i + e_i - q_i;  y = S(mean q_i + s);  s <- mean q_i + s - y
    Sends (N-1)/N x (worker + server) bytes per parameter and step.
    State: 4 + 4/N bytes per parameter; a half or a quarter of it with residual_bits 16 or 8.
    Use it with int8 as the safe step beyond fp16, with 4bit or fp8 on slower links, and to try codecs.
    Not for 1 bit with SGD at momentum 0.9; see `ef_sign`.

    worker: what ranks send: a compressor's name ("sign", "int8", "4bit", "fp8", ...), or {"compressor": name, option:
        value}.
    server: what the averaging rank answers with; the same as `worker` if left out.
    error_feedback: keep what a message left out, and add it to the next one (default). Without it, only unbiased
        codecs average out. With it, coarse ones (qsgd, ternary, 2bit) are scaled to the nearest multiple of their
        codes, as their variance would make the residual grow.
    residual_bits: 32, 16 (bfloat16) or 8 bits for each element of the residuals (LoCo, arXiv:2407.04480).
    residual_decay: the residual's factor from step to step. reset_every: forget the residuals after this many steps.
    dense_1d: average parameters with fewer than two dimensions (biases, norms) exactly.
    seed: of stochastic rounding.
    """

    name = "two_way"
    positional = ("worker", "server")
    Options = TwoWayOptions
    options: TwoWayOptions

    def set_up(self) -> None:
        o = self.options
        TwoWayMean.__init__(self, o.worker, o.kept(), server=o.server, dense_1d=o.dense_1d, seed=o.seed)
