"""Signum: each rank sends the sign of its momentum, and the majority decides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from commopt.errors import AttachError, check_option
from commopt.exchange.mean import State, load_mean, load_tensor
from commopt.exchange.vote import SignVote
from commopt.groups.base import Group
from commopt.wire.bucket import Bucket

_FIX = "signum is made for torch.optim.SGD(parameters, lr=1e-4) without momentum, which is signum's own option"


class Signum(SignVote):
    """Send the sign of each rank's momentum, one bit per element, and get the majority's sign back.

    Bernstein et al. 2019, arXiv:1810.05291, Algorithm 1 (Signum with majority vote); with momentum=0 it is
    signSGD with majority vote, arXiv:1802.04434, Algorithm 3:
        m_i <- b m_i + (1 - b) g_i;  D = sign(sum sign(m_i));  x <- x - lr (D + weight_decay x)
    of which the last is up to the optimizer: SGD without momentum, whose weight_decay is the paper's. Differs from the paper, where
    sign(0) is left open: a tie, and an m_i that is zero, take coins that make no element drift (see `SignVote`).
    One rank alone takes its own sign, of which sign(0) = 0. There is no error feedback: where ranks' gradients disagree, or
    are heavy-tailed, the majority need not be the sign of the mean.
    Sends (N-1)/N x 2/8 bytes per parameter and step.
    State: m, 4 bytes per parameter; none with momentum=0.
    Use it as the baseline of sign methods, or where state is scarce (momentum=0).
    Not for Adam or Lion (a sign of a sign), or for a learning rate of SGD's size: every element moves by lr in every step.

    momentum: b. seed: of the coins. max_norm, grad_scaler: see `Aggregator`.
    """

    name = "signum"

    def __init__(
        self, *, momentum: float = 0.9, seed: int = 0, max_norm: float | None = None, grad_scaler: Any = None
    ) -> None:
        super().__init__(vote="majority", seed=seed, max_norm=max_norm, grad_scaler=grad_scaler)
        check_option("momentum", momentum, lambda x: 0 <= x < 1, "a number from 0, below 1")
        self.b = momentum

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        kind = type(optimizer).__name__
        for group in optimizer.param_groups:
            if group.get("momentum"):
                raise AttachError(f"{kind} with momentum {group['momentum']} would smooth signs: {_FIX}")
            for key in ("betas", "eps", "etas"):  # Adam and its kin; Lion; Rprop
                if key in group:
                    raise AttachError(f"{kind} scales what it gets by itself, and a sign has no size: {_FIX}")

    def bind(self, named_parameters: Sequence[tuple[str, Tensor]], group: Group) -> None:
        super().bind(named_parameters, group)
        self.momentum = torch.zeros(self.index.total if self.b else 0, device=named_parameters[0][1].device)

    def aggregate(self, bucket: Bucket, group: Group) -> None:
        if not self.b:
            return super().aggregate(bucket, group)
        new = bucket.with_flat(torch.empty_like(bucket.flat))
        for (name, g), (_, m) in zip(bucket.views(), new.views(), strict=True):
            torch.lerp(self.index.view(self.momentum, name), g, 1 - self.b, out=m)  # b m + (1 - b) g
        if self.vote(new.flat, bucket.flat, bucket, group):
            for name, m in new.views():
                self.index.view(self.momentum, name).copy_(m)
        return None

    @property
    def state_form(self) -> str:
        return "" if self.b else "no momentum"

    def state_views(self, name: str) -> list[Tensor]:
        return [*super().state_views(name), *([self.index.view(self.momentum, name)] if self.b else [])]

    def comm_state(self) -> State:
        state = super().comm_state()
        if self.b:
            state["local"]["momentum"] = self.momentum
        return state

    def load_comm_state(self, state: State) -> None:
        super().load_comm_state(state)
        if self.b:
            load_tensor(self.momentum, state["local"], "momentum")

    def load_resharded(self, states: Iterable[State]) -> None:
        """Every new rank takes the mean of the old ranks' momenta."""
        every = list(states)
        super().load_resharded(every)
        if self.b:
            load_mean(self.momentum, every, "momentum")
