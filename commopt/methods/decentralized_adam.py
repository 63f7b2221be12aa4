"""Decentralized Adam: a rank averages with one or a few others in every step, while it computes the next gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from commopt.errors import ConfigError
from commopt.gossip.copies import PublicCopies, consensus_step, without_feedback
from commopt.gossip.loop import Exchanged, MessageOptions, OuterMethod, Round
from commopt.gossip.topology import Topology, TopologyName, make_topology
from commopt.groups.peers import Peers
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
    by its own norm. If a rank is missing, each peer keeps its share. A message of a later round than the current one
    is used, and one of an earlier round is not. The mean over ranks is then no longer kept exactly.
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
    Options = DecentralizedAdamOptions
    options: DecentralizedAdamOptions

    def set_up(self) -> None:
        super().set_up()
        self.copies = None if self.options.message is None else PublicCopies(self.message)
        factor = self.options.adaptive_factor
        if factor is None:
            factor = 1.0 if self.copies is None else consensus_step(self.message, self.copies.delta)
        if self.copies is not None:
            self.parts = (self.message, self.copies)
        self.adaptive_factor = factor
        self.max_lag = max(3, math.ceil(50 / self.every))

    def message_option(self) -> Any:
        return without_feedback(self.options.message)

    def lay_out(self, peers: Peers) -> None:
        self.graph = make_topology(self.options.topology, peers.size, self.options.slots)
        if self.copies is not None:
            self.copies.bind(self.index, neighbours(self.graph, peers.rank))

    def begin(self, x: Tensor) -> None:
        if self.copies is not None:
            self.copies.begin(x)

    def weights(self, number: int) -> dict[int, float]:
        """What each other member of this round's edge counts here; empty if this rank sits the round out."""
        edge = self.graph.edge(number, self.peers.rank)
        if edge is None:
            return {}
        return {peer: self.adaptive_factor * edge.share for peer in edge.members if peer != self.peers.rank}

    def exchange(self, x: Tensor, round: Round) -> Exchanged:
        weights = self.weights(round.number)
        if self.copies is not None:
            return self.copies.mix(self.peers, self.name, x, round.number, weights, self.timeout_s)
        payload = Payload.of(x)
        for peer in weights:
            self.peers.send(peer, self.name, round.number, payload, expires_s=self.timeout_s)
        present = self.collect(weights, round.number)
        own = 1 - sum(weights[peer] for peer in present)
        members = tuple(sorted([self.peers.rank, *present]))
        mixed = torch.zeros_like(x)
        for rank in members:  # in rank order, so that equal shares give equal bits
            mixed.add_(x if rank == self.peers.rank else present[rank], alpha=weights.get(rank, own))
        return Exchanged(members, len(present) < len(weights), {"mixed": mixed})

    def apply(self, x: Tensor, round: Round, exchanged: Exchanged) -> Tensor:
        return x if len(exchanged.members) == 1 else exchanged.values["mixed"]

    def bytes_per_parameter(self, ranks: int) -> float:
        graph = make_topology(self.options.topology, ranks, self.options.slots)
        sent = [len(edge.members) * (len(edge.members) - 1) for edges in graph.rounds for edge in edges]
        return self.message.bytes_per_element() * sum(sent) / ranks / len(graph.rounds) / self.every

    @property
    def state_form(self) -> str:
        return f"{super().state_form}, topology {self.options.topology}, slots {self.options.slots}"


def neighbours(graph: Topology, rank: int) -> set[int]:
    """The ranks that a rank exchanges with in any round."""
    edges = (graph.edge(number, rank) for number in range(len(graph.rounds)))
    return {peer for edge in edges if edge is not None for peer in edge.members} - {rank}
