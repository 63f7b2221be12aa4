"""NoLoCo: replicas average with a random partner every N steps; no step waits for all of them."""

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from commopt.errors import ConfigError
from commopt.gossip.loop import Exchanged, MessageOptions, OuterMethod, Round, mean_of
from commopt.method import options
from commopt.options import Flag, Fraction, Number, Positive, Share, Whole
from commopt.wire.draws import group_of
from commopt.wire.payload import Payload
from commopt.wire.state import State


@options
class NoLoCoOptions(MessageOptions):
    lr: Positive = 0.7
    momentum: Fraction = 0.5
    gamma: Number | None = None
    group_size: Annotated[Whole, Field(ge=2)] = 2
    two_tensors: Flag = False
    slow_share: Share = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        gamma, ratio = self.lr if self.gamma is None else self.gamma, self.group_size / (2 * (self.group_size - 1))
        low, high = math.sqrt(ratio) * self.momentum, math.sqrt(ratio * (2 + self.momentum**2))  # equation 74
        if not low < gamma < high:
            raise ConfigError(
                f"gamma: {gamma} lets replicas drift apart: sqrt(n / (2 (n - 1))) momentum < gamma < sqrt(n / (2 (n - 1)) (2 + "
                f"momentum^2)) is {low:.3g} < gamma < {high:.3g} for momentum {self.momentum} and group_size n = {self.group_size} "
                "(arXiv:2506.10911, eq. 74)"
            )


class NoLoCo(OuterMethod):
    """Average with a random partner every `every` steps, and move by a momentum of the result.

    Kolehmainen et al. 2025, arXiv:2506.10911, equations 1 to 3. Equation 2 has the wrong sign in its second term for
    the printed Delta = theta - phi. Its own appendix (eq. 32) and the released code have a plus, as here. It is
    heavy-ball momentum.
        delta <- momentum delta + lr mean_j(theta_j - phi_j) + gamma (mean_j phi_j - phi)
        phi <- phi + delta;  theta <- phi
    With gamma = lr, the default, only lr mean_j theta_j - lr phi is needed. theta alone is then sent, which halves the
    bytes. Every rank draws pairs from (seed, round), over all configured ranks, so ranks do not have to agree on who
    is up.
    Sends 4/every bytes a parameter and step to one partner, 8/every with another gamma; 4 (group_size - 1)/every in
    larger groups.
    State: slow weights 4, momentum 4 (and a residual of 4 with a compressed message).
    Use it if machines are far apart, differ in speed, or come and go: each rank only waits for its partner.
    Not for links that carry a compressed exchange in every step: the replicas differ, and end as an ensemble unless
    averaged.

    lr, momentum: of the outer step.
    gamma: the pull of the slow weights towards each other; lr if None.
    group_size: ranks that average together; a group with a dead rank continues without it.
    two_tensors: send the slow weights apart from the deltas even if gamma = lr, right after the last round, so that
        only the deltas are late.
    slow_share: the share of the slow weights that is sent uncompressed with each compressed message, another part each
        round. Compression suits deltas but not slow weights. A smaller share saves bytes, and leaves replicas further
        apart.
    """

    name = "noloco"
    Options = NoLoCoOptions
    options: NoLoCoOptions
    states: ClassVar[tuple[State, ...]] = (State("slow"), State("velocity"))

    def set_up(self) -> None:
        super().set_up()
        o, is_compressed = self.options, self.message.compressor is not None
        self.gamma = o.lr if o.gamma is None else o.gamma
        self.turns = max(1, round(1 / o.slow_share)) if is_compressed else 1  # rounds until all slow weights are sent
        self.sends_slow = o.two_tensors or self.gamma != o.lr or is_compressed

    def bound(self) -> None:
        size, ranks = self.options.group_size, self.peers.size
        if 1 < ranks < size:
            raise ConfigError(f"group_size: {size} is more than the {ranks} ranks there are")

    def begin(self, x: Tensor) -> None:
        self.state["slow"].copy_(x)

    def ready(self, number: int) -> None:
        self._send_slow(number)

    def group(self, number: int) -> tuple[int, ...]:
        """The ranks that average in a round, including this one; this rank alone if it sits out."""
        return group_of(self.peers.rank, self.peers.size_at(number), self.options.group_size, self.seed, number)

    def exchange(self, x: Tensor, round: Round) -> Exchanged:
        others = [peer for peer in self.group(round.number) if peer != self.peers.rank]
        what = x - self.state["slow"] if self.sends_slow else x
        payload = self.message.pack(what, round.number)
        received = self.swap(others, round.number, payload)
        own = self.message.unpack(payload, round.number) if received else None  # as the partner does
        if own is None:
            own = what
            self.message.take_back(what, payload, round.number)  # else the rest goes into the next message
        members = tuple(sorted([self.peers.rank, *received]))
        values = {"mean": mean_of({**received, self.peers.rank: own})}
        if self.sends_slow and received:
            values |= self._slow_mean(round.number, list(received))
        return Exchanged(members, is_missed=len(received) < len(others), values=values)

    def alone(self, x: Tensor, round: Round, exchanged: Exchanged) -> Exchanged:
        own = x - self.state["slow"] if self.sends_slow else x
        return Exchanged((self.peers.rank,), is_missed=True, values={"mean": own})

    def apply(self, x: Tensor, round: Round, exchanged: Exchanged) -> Tensor:
        mean, slow, velocity = exchanged.values["mean"], self.state["slow"], self.state["velocity"]
        moved = mean if self.sends_slow else mean - slow  # which makes for all of eq. 2, with gamma = lr
        velocity.mul_(self.options.momentum).add_(moved, alpha=self.options.lr)  # eq. 2, its first two terms
        if "slow mean" in exchanged.values:
            part = self._slow_part(round.number)
            velocity[part].add_(exchanged.values["slow mean"] - slow[part], alpha=self.gamma)  # its third
        slow.add_(velocity)  # eq. 3
        self._send_slow(round.number + 1)
        return slow

    def bytes_per_parameter(self, ranks: int) -> float:
        if ranks == 1:
            return 0.0
        others = min(self.options.group_size, ranks) - 1
        slow = 4 / self.turns if self.sends_slow else 0.0
        return others * (self.message.bytes_per_element() + slow) / self.every

    def _slow_part(self, number: int) -> slice:
        turn, total = number % self.turns, self.index.total  # uncompressed: not cut between blocks
        return slice(total * turn // self.turns, total * (turn + 1) // self.turns)

    def _send_slow(self, number: int) -> None:
        """Send the slow weights for the next round as soon as they are known."""
        if self.sends_slow:
            payload = Payload.of(self.state["slow"][self._slow_part(number)])
            for peer in self.group(number):
                if peer != self.peers.rank:
                    self.peers.send(peer, "noloco slow", number, payload, expires_s=max(self.timeout_s, 60.0))

    def _slow_mean(self, number: int, members: Sequence[int]) -> dict[str, Tensor]:
        """The mean of the slow weights of those whose deltas came; they were sent long before, so a short wait is enough."""
        part = self._slow_part(number)
        slow = {self.peers.rank: self.state["slow"][part]}
        for peer in members:
            letter = self.peers.receive(peer, "noloco slow", number, 1.0)
            tensors = None if letter is None else letter.payload.opened((torch.float32, part.stop - part.start))
            if tensors is not None:
                slow[peer] = tensors[0]
        return {"slow mean": mean_of(slow)}
