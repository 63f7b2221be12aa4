"""Distributed Lion: ranks keep their own momentum and exchange one bit per element, the sign of their update."""

from typing import Literal

import torch
from torch import Tensor

from commopt.exchange.vote import SignVote
from commopt.groups.base import Group
from commopt.method import NoOptions, options
from commopt.optim.update import DirectionMethod
from commopt.options import Whole
from commopt.wire.bucket import Bucket


@options
class DistributedLionOptions(NoOptions):
    vote: Literal["average", "majority"] = "average"
    seed: Whole = 0


class DistributedLion(DirectionMethod):
    """Send the sign of each rank's Lion update, one bit per element, and get their average or majority back.

    Liu et al. 2024, arXiv:2404.00438, Algorithm 1:
        d_i = sign(b1 m_i + (1 - b1) g_i);  m_i <- b2 m_i + (1 - b2) g_i
        D = (1/N) sum d_i  (average)   or   sign(sum d_i)  (majority)
        x <- x - lr (D + weight_decay x)
    Each rank keeps its own momentum. b1 and b2 are the optimizer's betas. Differs from the paper's code: one bit is
    sent as one bit. Coins decide a tie and a d_i that is zero, so that no element drifts (see `SignVote`); the code
    always takes -1. One rank alone is Lion, with sign(0) = 0. An element without any gradient moves by lr at most,
    back and forth. If the number of ranks changes, every rank gets the mean of the momenta. Each rank's own momentum
    is in `saved()`, not in the optimizer's `state_dict`.
    Sends (N-1)/N x (1 + ceil(log2(N+1)))/8 bytes per parameter and step, with vote="majority" (N-1)/N x 2/8.
    State: m, 4 bytes per parameter, and from backward to step another 4 for D.
    Use it if Lion trains well and links are slow. It compresses from the first step on, without a warm-up.
    Not for a job that changes its number of ranks often.

    vote: "average", whose steps shrink if ranks disagree, so its best rate may be above Lion's; or "majority".
    seed: of the coins.
    """

    name = "distributed_lion"
    positional = ("vote",)
    Options = DistributedLionOptions
    options: DistributedLionOptions
    stands_for = ("Lion",)
    takes = ("lr", "betas", "weight_decay")
    moments = ("momentum",)

    def set_up(self) -> None:
        super().set_up()
        self._votes = SignVote(is_majority=self.options.vote == "majority", seed=self.options.seed)
        self.parts = (self._votes,)
        self._voted: dict[tuple[str, ...], Tensor] = {}  # D by the names in a bucket, until it is received

    def exchange(self, bucket: Bucket, group: Group) -> None:
        betas = self.by_betas(bucket.names)
        if group.size > 1 and len(betas) == 1:
            self._exchange_at_once(bucket, group, *next(iter(betas)))
            return
        update = torch.empty_like(bucket.flat)
        self.blend_("momentum", bucket, lambda name: 1 - self.betas(name)[0], out=update)  # b1 m + (1 - b1) g
        if self._votes.vote(update, update, bucket, group):
            views = dict(bucket.views())
            for (_, b2), names in betas.items():
                gs = [views[name] for name in names]
                torch._foreach_lerp_(self.parts_of("momentum", names), gs, 1 - b2)  # m <- b2 m + (1 - b2) g
            bucket.flat.copy_(update)

    def _exchange_at_once(self, bucket: Bucket, group: Group, b1: float, b2: float) -> None:
        """`exchange` where all parameters have the same betas: kernels blend while they pack, and write D for the step, too."""
        momentum = self.state["momentum"]
        answers = self._votes.poll(bucket.flat, bucket, group, (momentum, 1 - b1))
        if answers is not None:
            self._voted[bucket.names] = torch.empty_like(bucket.flat)
            # m <- b2 m + (1 - b2) g
            self._votes.read_(answers, bucket, bucket.flat, self._voted[bucket.names], (momentum, 1 - b2))

    def receive(self, bucket: Bucket) -> None:
        voted = self._voted.pop(bucket.names, None)
        if voted is None or self.share is not None:  # of which all shares have been put together
            super().receive(bucket)
        else:
            self.directions[bucket.names] = bucket.with_flat(voted)

    def bytes_per_parameter(self, ranks: int) -> float:
        return self._votes.bytes_per_parameter(ranks)
