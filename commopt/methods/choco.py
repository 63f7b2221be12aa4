"""CHOCO-SGD: gossip over a fixed graph with compressed messages, at any compression rate."""

from typing import Any

import numpy as np

from commopt.errors import ConfigError
from commopt.gossip.loop import MessageOptions
from commopt.gossip.topology import F64, TopologyName, make_topology, mixing_matrix
from commopt.method import options
from commopt.methods.decentralized_adam import DecentralizedAdam
from commopt.options import Count, Share


@options
class ChocoOptions(MessageOptions):
    every: Count = 1
    topology: TopologyName = "ring"
    gamma: Share | None = None
    message: Any = "4bit"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.message is None:
            raise ConfigError("message: choco compresses its messages; name a compressor, or use decentralized_adam")


class Choco(DecentralizedAdam):
    """Move towards the public copies of the neighbours, which compressed messages keep near their parameters.

    Koloskova et al. 2019, arXiv:1902.00340, Algorithms 1 and 2 (CHOCO-Gossip and CHOCO-SGD), and 2020,
    arXiv:1907.09356; with any inner optimizer.
        q_i = C(x_i - x^_i);  x^_j <- x^_j + q_j for all neighbours j and oneself;  x_i <- x_i + gamma sum_j w_ij (x^_j - x^_i)
    w is the mean of the topology's mixing matrices over its rounds, and every round is with all neighbours, as in the
    paper: ring is 1/4 for each of two, complete 1/N, one_peer_exp the hypercube. An unbiased C is scaled to a
    contraction. Each pair of ranks has its own copies. If the messages of a pair no longer match its copies, after a
    loss or a restart, it sends its parameters once in full. Until then, and while a rank is missing, each rank keeps
    that rank's share.
    Sends the compressed message to each neighbour: 0.52/every bytes a parameter and step with 4bit, twice that in a
    ring.
    State: copies of 8 for each neighbour.
    Use it if a compressed message to a few neighbours overlaps with a step's compute, but the parameters themselves
    take longer.
    Not for topology: complete with many ranks, which takes (N-1) messages and copies of 8 (N-1) bytes a parameter.

    topology: ring, one_peer_exp or complete.
    gamma: the consensus step size, above 0 to 1. 1 suits exact messages, and with too large a value replicas drift
        apart. If None, it is delta / (4 - 3 delta), with delta the compressor's quality, 1 - ||x - C(x)||^2 / ||x||^2
        for a Gaussian x: 0.87 with 4bit, 0.3 with sign, 0.17 with top_k of 10 %.
    message: how C works; 4bit. sign takes a quarter of the bytes and many times the rounds.
    """

    name = "choco"
    Options = ChocoOptions
    step_option = "gamma"
    graph_options = ("topology",)

    def matrices(self, ranks: int) -> list[F64]:
        return [mean_mixing(self.options.topology, ranks)]


def mean_mixing(topology: str, ranks: int) -> F64:
    """(N, N): the mean over a topology's rounds of its mixing matrices; symmetric, and its rows sum to one. Raises ConfigError."""
    mean: F64 = np.mean([mixing_matrix(groups, ranks) for groups in make_topology(topology, ranks)], axis=0)
    return mean
