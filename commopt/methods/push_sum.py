"""Stochastic Gradient Push: one message in one direction per round; the receiver does not answer."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from commopt.gossip.loop import Exchanged, OuterMethod, OuterOptions, Round
from commopt.gossip.topology import directed_exponential
from commopt.groups.peers import KEPT, Letter
from commopt.method import options
from commopt.options import Count
from commopt.wire.payload import Payload
from commopt.wire.state import State

_LEAST_WEIGHT = 2.0**-10  # a rank that nothing reaches stops giving its weight away


@options
class PushSumOptions(OuterOptions):
    every: Count = 1


class PushSum(OuterMethod):
    """Send half of the parameters and weight to the next rank of a directed exponential graph, and add what arrives.

    Assran et al. 2019, arXiv:1811.10792, Algorithm 1; push-sum is Kempe et al. 2003. With numerators w_i z_i and
    weights w_i:
        z_i <- (w_i z_i / 2 + sum of what arrived of w_j z_j / 2) / (w_i / 2 + sum of their w_j / 2)
    The model holds z, at which gradients are taken; (w / 2, z) is sent. Rank i sends to i + 2^k mod N, k = 0, 1, ...,
    ceil(log2 N) - 1 in turn. In each round every rank sends one message and receives one. Without loss all weights
    stay 1, as in the paper. If they do not, an inner step moves z directly, while the paper's step moves it by 1/w as
    much, so that a rank with little weight would jump. delay: 0 is the paper's synchronous SGP; 1 and more is its
    overlapped OSGP. Messages to a rank that is known to be down stay with the sender. Late messages are added when
    they arrive. Weights, including those in transit, therefore sum to N. This does not hold in three cases: a rank
    dies with what it has or is being sent, a message is not delivered in time, or a sender has more than 8 unread
    messages. Numerator and weight are then both lost, so replicas still agree, but on another weighted mean. A rank
    that comes back starts with weight 1. Checkpoints do not contain messages in transit.
    Sends 4/every bytes a parameter and step to one rank.
    State: the weight.
    Use it if messages come late or go one way only. Ranks do not wait for an answer, and late messages are not lost.
    Not for links that need compressed messages: use choco.
    """

    name = "push_sum"
    Options = PushSumOptions
    options: PushSumOptions
    states: ClassVar[tuple[State, ...]] = (
        State("weight", of="run", held="rank", on_resize="reset", dtype=torch.float64, initial=1.0),
    )

    def set_up(self) -> None:
        super().set_up()
        self.max_lag = max(3, math.ceil(50 / self.every))

    def bound(self) -> None:
        self.early: list[tuple[int, Letter]] = []  # what came before its round

    def begin(self, x: Tensor) -> None:
        self.state["weight"].fill_(1)

    def exchange(self, x: Tensor, round: Round) -> Exchanged:
        number, me = round.number, self.peers.rank
        ranks = self.peers.size_at(number)
        to = directed_exponential(ranks, number, me)
        source = next(r for r in range(ranks) if directed_exponential(ranks, number, r) == me)
        weight = float(self.state["weight"])
        if self.peers.is_up(to) and weight > _LEAST_WEIGHT:
            weight /= 2
            share = torch.tensor([weight], dtype=torch.float64)
            payload = Payload.of(share, x)
            self.peers.send(to, self.name, number, payload, expires_s=max(60.0, self.timeout_s))
        arrived, is_missed = self._arrived(number, source)
        total, mixed, members = weight, x.double() * weight, {me}
        for sender, letter in arrived:
            share, theirs = letter.payload.tensors
            total += float(share)
            mixed.add_(theirs.double(), alpha=float(share))
            members.add(sender)
        values = {"mixed": mixed.div_(total).float(), "weight": torch.tensor([total], dtype=torch.float64)}
        return Exchanged(tuple(sorted(members)), is_missed, values)

    def alone(self, x: Tensor, round: Round, exchanged: Exchanged) -> Exchanged:
        return exchanged  # each share has a weight of its own, and what has arrived must not be lost

    def apply(self, x: Tensor, round: Round, exchanged: Exchanged) -> Tensor:
        self.state["weight"].copy_(exchanged.values["weight"])
        return super().apply(x, round, exchanged)

    def bytes_per_parameter(self, ranks: int) -> float:
        return 4 / self.every if ranks > 1 else 0.0

    def _arrived(self, number: int, source: int) -> tuple[list[tuple[int, Letter]], bool]:
        """What has arrived of this round and earlier ones, in a fixed order, and whether this round's message is missing."""
        end_s = self.peers.seconds + self.timeout_s
        while True:
            self.early += [one for one in self.peers.drain(self.name) if self._fits(one[1])]
            is_missed = all((sender, letter.sequence) != (source, number) for sender, letter in self.early)
            left_s = end_s - self.peers.seconds
            # no message has the number -1: this only waits for one, and `drain` takes it
            if not is_missed or not self.peers.receive(source, self.name, -1, max(0.0, left_s), or_newer=True):
                break
        due = [one for one in self.early if one[1].sequence <= number]
        early = sorted((one for one in self.early if one[1].sequence > number), key=lambda one: one[1].sequence)
        self.early = early[: (KEPT + self.max_lag) * self.peers.size]
        return sorted(due, key=lambda one: (one[0], one[1].sequence)), is_missed

    def _fits(self, letter: Letter) -> bool:
        tensors = letter.payload.opened((torch.float64, 1), (torch.float32, self.index.total))
        return tensors is not None and 0 < float(tensors[0]) <= self.peers.size  # all weights together are that
