"""Signum: each rank sends the sign of its momentum, and the majority decides."""

import torch

from commopt.errors import AttachError
from commopt.exchange.vote import SignVote
from commopt.groups.base import Group
from commopt.method import GradientMethod, NoOptions, options
from commopt.options import Fraction, Whole
from commopt.wire.bucket import Bucket
from commopt.wire.state import State

_FIX = "use signum with torch.optim.SGD(parameters, lr=1e-4) without momentum, which is an option of signum"


@options
class SignumOptions(NoOptions):
    momentum: Fraction = 0.9
    seed: Whole = 0


class Signum(GradientMethod, SignVote):
    """Send the sign of each rank's momentum, one bit per element, and get the majority's sign back.

    Bernstein et al. 2019, arXiv:1810.05291, Algorithm 1 (Signum with majority vote). With momentum=0 it is signSGD
    with majority vote, arXiv:1802.04434, Algorithm 3:
        m_i <- b m_i + (1 - b) g_i;  D = sign(sum sign(m_i));  x <- x - lr (D + weight_decay x)
    The last equation is the optimizer's: use SGD without momentum, whose weight_decay is the paper's. The paper leaves
    sign(0) open. Here coins decide a tie and an m_i that is zero, so that no element drifts (see `SignVote`). One rank
    alone takes its own sign, with sign(0) = 0. There is no error feedback. If ranks' gradients disagree, or are
    heavy-tailed, the majority need not be the sign of the mean.
    Sends (N-1)/N x 2/8 bytes per parameter and step.
    State: m, 4 bytes per parameter; none with momentum=0.
    Use it as the baseline of sign methods, or if memory for state is scarce (momentum=0).
    Not for Adam or Lion (a sign of a sign), or for a learning rate of SGD's size: every element moves by lr in every
    step.

    momentum: b. seed: of the coins.
    """

    name = "signum"
    Options = SignumOptions
    options: SignumOptions
    is_repeatable = False  # the first exchange's signs would drown a second gradient
    state_form = ""
    may_be_clipped = False  # the norm of signs says nothing of the gradient

    def set_up(self) -> None:
        SignVote.__init__(self, is_majority=True, seed=self.options.seed)
        self.state_form = "" if self.options.momentum else "no momentum"

    def declare(self) -> list[State]:
        own = [State("momentum", held="rank", on_resize="mean")] if self.options.momentum else []
        return [*own, *super().declare()]

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        kind = type(optimizer).__name__
        for group in optimizer.param_groups:
            if group.get("momentum"):
                raise AttachError(f"{kind} with momentum {group['momentum']} would smooth signs: {_FIX}")
            for key in ("betas", "eps", "etas"):  # Adam and its variants; Lion; Rprop
                if key in group:
                    raise AttachError(f"{kind} scales what it gets, and a sign has no magnitude: {_FIX}")

    def exchange(self, bucket: Bucket, group: Group) -> None:
        b = self.options.momentum
        if not b:
            return super().exchange(bucket, group)
        if group.size == 1:
            new = bucket.with_flat(torch.empty_like(bucket.flat))
            self.blend_("momentum", bucket, lambda _: 1 - b, out=new.flat)  # b m + (1 - b) g
            if self.vote(new.flat, bucket.flat, bucket, group):
                torch._foreach_copy_(self.parts_of("momentum", bucket.names), [m for _, m in new.views()])
            return None
        momentum = (self.state["momentum"], 1 - b)
        answers = self.poll(bucket.flat, bucket, group, momentum)  # on b m + (1 - b) g
        if answers is not None:
            self.read_(answers, bucket, bucket.flat, followed=momentum)
        return None
