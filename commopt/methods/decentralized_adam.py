"""Decentralized Adam: a rank averages with one or a few others in every step, while it computes the next gradient."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from commopt.errors import ConfigError
from commopt.gossip.copies import PublicCopies, consensus_step, without_feedback
from commopt.gossip.loop import Exchanged, MessageOptions, OuterMethod, Round
from commopt.gossip.topology import F64, TopologyName, make_topology, mixing_matrix
from commopt.method import options
from commopt.options import Count, Share, Whole
from commopt.wire.payload import Payload


@options
class DecentralizedAdamOptions(MessageOptions):
    every: Count = 1
    delay: Whole = 1
    topology: TopologyName = "one_peer_exp"
    slots: Count = 1
    adaptive_factor: Share | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slots != 1 and self.topology != "alternating_exp_ring":
            raise ConfigError(
                f"slots: has no effect with topology: {self.topology}; leave it out, or write alternating_exp_ring"
            )


class DecentralizedAdam(OuterMethod):
    """Mix parameters with those of this step's peers, and step by the local gradient, taken at the parameters before mixing.

    Wang et al. 2024, arXiv:2410.11998, with any optimizer: Adam, or its AccumAdam (`accum_adam`, also for weight decay
    of weights only).
        x_i <- x_i + a sum over those present of share (x_j - x_i) - lr Adam(g_i(x_i))
    A message is sent after a step and may arrive during the next forward and backward (`delay: 1`). The step made in
    the meantime stays as it is. This equals the equation, because Adam's step does not depend on x, except for weight
    decay, which uses the unmixed x. With `delay: 0`, each step waits, and the gradient is taken at the mixed x. With
    `max_norm` in `attach`, gradients are clipped by one norm over all parameters; the released code clips each bucket
    by its own norm. Rounds take the topology's edges in turn from the first one; the released code leaves the second
    one out once, at its start. If a rank is missing, each peer keeps its share. A message of a later round than the
    current one is used, and one of an earlier round is not. The mean over ranks is then no longer kept exactly.
    Sends 4/every bytes a parameter and step to each other member of its edge: 4 in pairs, 4 (N-1) with topology:
    complete.
    State: none (with a compressed message copies of 8 for each neighbour).
    Use it if a message to one peer overlaps with a step's compute, but an all-reduce over all ranks takes longer.
    Not for links that cannot carry 4 bytes a parameter in a step: use NoLoCo, or choco's compressed messages. complete
    is not an all-reduce: gradients are not averaged, and parameters mix one step late.

    topology: one_peer_exp, ring, alternating_exp_ring or complete. slots: ranks on a node, for alternating_exp_ring.
    adaptive_factor: a, from 0 to 1. With a compressed message, 1 is too much for most compressors, and the default is
        what choco calls gamma.
    """

    name = "decentralized_adam"
    Options: ClassVar[type[MessageOptions]] = DecentralizedAdamOptions
    step_option: ClassVar[str] = "adaptive_factor"
    graph_options: ClassVar[tuple[str, ...]] = ("topology", "slots")
    can_grow = False

    def set_up(self) -> None:
        super().set_up()
        self.copies = None if self.message.compressor is None else PublicCopies(self.message)
        given = getattr(self.options, self.step_option)
        if given is None:
            given = 1.0 if self.copies is None else consensus_step(self.message, self.copies.delta)
        self.step_size: float = given
        if self.copies is not None:
            self.parts = (self.message, self.copies)
        self.max_lag = max(3, math.ceil(50 / self.every))

    def message_option(self) -> Any:
        return without_feedback(self.options.message)

    def matrices(self, ranks: int) -> list[F64]:
        """(N, N) for each round in turn: the weights of all ranks' parameters in each rank's mean."""
        rounds = make_topology(self.options.topology, ranks, self.options.slots)
        return [mixing_matrix(groups, ranks) for groups in rounds]

    def bound(self) -> None:
        rows = [self.step_size * matrix[self.peers.rank] for matrix in self.matrices(self.peers.size)]
        self.weights = [{peer: float(row[peer]) for peer in self.peers.others if row[peer]} for row in rows]
        if self.copies is not None:
            self.copies.bind(self.index, {peer for weights in self.weights for peer in weights})

    def begin(self, x: Tensor) -> None:
        if self.copies is not None:
            self.copies.begin(x)

    def exchange(self, x: Tensor, round: Round) -> Exchanged:
        weights = self.weights[round.number % len(self.weights)]
        if self.copies is not None:
            return self.copies.mix(self.peers, self.name, x, round.number, weights, self.timeout_s)
        present = self.swap(weights, round.number, Payload.of(x))
        own = 1 - sum(weights[peer] for peer in present)
        members = tuple(sorted([self.peers.rank, *present]))
        mixed = torch.zeros_like(x)
        for rank in members:  # in rank order, so that equal shares give equal bits
            mixed.add_(x if rank == self.peers.rank else present[rank], alpha=weights.get(rank, own))
        return Exchanged(members, len(present) < len(weights), {"mixed": mixed})

    def bytes_per_parameter(self, ranks: int) -> float:
        matrices = self.matrices(ranks)
        messages = sum(float((matrix > 0).sum()) - ranks for matrix in matrices) / len(matrices)
        return self.message.bytes_per_element() * messages / ranks / self.every

    @property
    def state_form(self) -> str:
        return super().state_form + "".join(f", {key} {getattr(self.options, key)}" for key in self.graph_options)
