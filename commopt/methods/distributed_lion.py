"""Distributed Lion: ranks keep their own momentum and exchange one bit per element, the sign of their update."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from commopt.exchange.mean import State, load_mean, load_tensor
from commopt.exchange.vote import SignVote
from commopt.groups.base import Group
from commopt.optim.update import UpdateMethod, check_betas, move_
from commopt.wire.bucket import Bucket


class DistributedLion(UpdateMethod):
    """Send the sign of each rank's Lion update, one bit per element, and get their average or majority back.

    Liu et al. 2024, arXiv:2404.00438, Algorithm 1:
        d_i = sign(b1 m_i + (1 - b1) g_i);  m_i <- b2 m_i + (1 - b2) g_i
        D = (1/N) sum d_i  (average)   or   sign(sum d_i)  (majority)
        x <- x - lr (D + weight_decay x)
    The momentum stays on its rank. Differs from the paper's code: one bit travels as one bit; a tie, and a d_i that is
    zero, take coins that make no element drift (see `SignVote`), where the code always takes -1. One rank alone
    is Lion, with sign(0) = 0. An element without any gradient moves by lr at most, back and forth.
    A change of the number of ranks gives every rank the mean of the momenta. Each rank's own is in `comm_state`, not in `state_dict`.
    Sends (N-1)/N x (1 + ceil(log2(N+1)))/8 bytes per parameter and step, with vote="majority" (N-1)/N x 2/8.
    State: m, 4 bytes per parameter, and from backward to step another 4 for D.
    Use it where Lion trains well and links are slow: from the first step on, without a warm-up.
    Not for a job that changes its number of ranks often.

    vote: "average", whose steps shrink where ranks disagree, so that its best rate may be above Lion's; or "majority".
    betas: of the update and of the momentum. seed: of the coins. max_norm, grad_scaler: see `Aggregator`.
    """

    name = "distributed_lion"
    positional = ("vote",)
    arenas: ClassVar[tuple[str, ...]] = ()  # state_dict, the same on all ranks, has no place for momentum
    counters: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        named_params: Iterable[Any],
        *,
        lr: float = 1e-4,
        betas: Sequence[float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        vote: str = "average",
        seed: int = 0,
        max_norm: float | None = None,
        grad_scaler: Any = None,
    ) -> None:
        check_betas(betas)
        self._votes = SignVote(vote=vote, seed=seed)
        self.made_of = (self._votes,)
        self._directions: dict[str, Tensor] = {}  # from an exchange to its step
        defaults = {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay}
        super().__init__(named_params, defaults, max_norm=max_norm, grad_scaler=grad_scaler)

    def bind(self, named_parameters: Sequence[tuple[str, Tensor]], group: Group) -> None:
        super().bind(named_parameters, group)
        self.arena["momentum"] = torch.zeros(self.index.total, device=named_parameters[0][1].device)
        self._name_of = {id(p): name for name, p in named_parameters}

    @property
    def momentum(self) -> Tensor:
        """(n,) f32: this rank's momentum, of all parameters in registration order."""
        return self.arena["momentum"]

    def aggregate(self, bucket: Bucket, group: Group) -> None:
        update = bucket.with_flat(torch.empty_like(bucket.flat))
        for (name, g), (_, c) in zip(bucket.views(), update.views(), strict=True):
            b1, _ = self.options(name)["betas"]
            torch.lerp(self.part("momentum", name), g, 1 - b1, out=c)  # b1 m + (1 - b1) g
        if not self._votes.vote(update.flat, update.flat, bucket, group):
            return
        for name, g in bucket.views():
            _, b2 = self.options(name)["betas"]
            self.part("momentum", name).lerp_(g, 1 - b2)  # m <- b2 m + (1 - b2) g
        bucket.flat.copy_(update.flat)
        self._directions.update(update.views())

    def update(self, p: Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        p.mul_(1 - group["lr"] * group["weight_decay"])
        move_(p, self._directions[self._name_of[id(p)]], group["lr"])

    def after_step(self) -> None:
        self._directions.clear()

    def bytes_per_parameter(self, ranks: int) -> float:
        return self._votes.bytes_per_parameter(ranks)

    def state_views(self, name: str) -> list[Tensor]:
        return [*super().state_views(name), self.part("momentum", name)]

    def comm_state(self) -> State:
        state = super().comm_state()
        state["local"]["momentum"] = self.momentum
        return state

    def load_comm_state(self, state: State) -> None:
        super().load_comm_state(state)
        load_tensor(self.momentum, state["local"], "momentum")

    def load_resharded(self, states: Iterable[State]) -> None:
        """Every new rank takes the mean of the old ranks' momenta."""
        every = list(states)
        super().load_resharded(every)
        load_mean(self.momentum, every, "momentum")
