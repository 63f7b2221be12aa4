"""Which ranks average in which round, without chance: topologies as data. Random groups are in `wire.draws`.

After Decent-DP's topologies (arXiv:2410.11998) and the directed exponential graph of stochastic gradient push (arXiv:1811.10792).
Nothing here communicates.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from commopt.errors import ConfigError

F64 = NDArray[np.float64]
TopologyName = Literal["ring", "one_peer_exp", "alternating_exp_ring", "complete"]
# sorted groups of ranks that average in one round; a rank in none of them sits it out
Round = tuple[tuple[int, ...], ...]


def make_topology(name: str, ranks: int, slots: int = 1) -> tuple[Round, ...]:
    """The rounds of a topology by name, repeated without end; on a single rank each topology is one round without a group.

    complete: all ranks average in every round. ring: pairs of neighbours; with an odd number of ranks one sits out in turn.
    one_peer_exp: rank j pairs with j XOR 2^k. alternating_exp_ring: the same between nodes, alternating with averages inside them.
    slots: ranks on a node, of consecutive numbers; only alternating_exp_ring uses it.
    Raises ConfigError for a number of ranks that the topology has no rounds for.
    """
    if ranks == 1:
        return ((),)
    if name == "alternating_exp_ring":
        return _alternating_exp_ring(ranks, slots)
    if name == "complete":
        return ((tuple(range(ranks)),),)
    return {"ring": _ring, "one_peer_exp": _one_peer_exp}[name](ranks)


def mixing_matrix(round: Round, ranks: int) -> F64:
    """(N, N) float64: row i has the weights of all ranks' parameters in rank i's after a round (arXiv:2410.11998)."""
    matrix = np.eye(ranks)
    for members in round:
        matrix[np.ix_(members, members)] = 1 / len(members)
    return matrix


def directed_exponential(ranks: int, round: int, rank: int) -> int:
    """The rank that this one sends to in a round of push-sum: (rank + 2^(round mod ceil(log2 N))) mod N.

    Assran et al. 2018, arXiv:1811.10792. In each round every rank receives from exactly one other. At least two ranks.
    """
    return int((rank + 2 ** (round % (ranks - 1).bit_length())) % ranks)


def _ring(ranks: int) -> tuple[Round, ...]:
    """Even rounds pair (2k, 2k + 1), odd ones (2k, 2k - 1); an odd number of ranks has N rounds, and rank r - 1 sits round r out.

    The ranks after the one that sits out pair up along the ring, so in N rounds each sits out once, each edge is used (N - 1) / 2
    times, and a rank still turns to its other neighbour from round to round.
    """
    period = 2 if ranks % 2 == 0 else ranks
    pairs = [[((r + k) % ranks, (r + k + 1) % ranks) for k in range(0, ranks - 1, 2)] for r in range(period)]
    return tuple(tuple((min(pair), max(pair)) for pair in round) for round in pairs)


def _one_peer_exp(ranks: int) -> tuple[Round, ...]:
    """Rank j pairs with j XOR 2^k, which is a perfect matching where j + 2^k mod N is not, so log2 N rounds average exactly."""
    if ranks.bit_count() != 1:
        below = 1 << ranks.bit_length() - 1
        raise ConfigError(
            f"topology: one_peer_exp works with 2, 4, 8, 16, ... ranks, and here are {ranks}; "
            f"start {below} or {2 * below} of them, or write ring or complete, which work with any number"
        )
    hops = [1 << k for k in range(ranks.bit_length() - 1)]
    return tuple(tuple((j, j | hop) for j in range(ranks) if not j & hop) for hop in hops)


def _alternating_exp_ring(ranks: int, slots: int) -> tuple[Round, ...]:
    """Two rounds for each hop 2^k between nodes: even pairs of nodes average inside each node first, odd ones over both first.

    So about half of the pairs use the network at any time. A node of one rank has nothing to average inside: one_peer_exp.
    Exact after 2 log2(nodes) rounds.
    """
    nodes = ranks // slots
    if ranks % slots or nodes.bit_count() != 1:
        raise ConfigError(
            f"topology: alternating_exp_ring works with 1, 2, 4, 8, ... nodes of equally many ranks, and here are {ranks} ranks, "
            f"{slots} to a node; change the number of nodes, or write ring or complete, which work with any number"
        )
    if slots == 1:
        return _one_peer_exp(ranks)
    if nodes == 1:
        return make_topology("complete", ranks)
    own = [tuple(range(node * slots, (node + 1) * slots)) for node in range(nodes)]
    rounds = []
    for matching in _one_peer_exp(nodes):
        inside = [[own[a], own[b]] for a, b in matching]
        over_both = [[own[a] + own[b]] for a, b in matching]
        for turn in range(2):
            halves = [(inside, over_both)[(turn + k) % 2][k] for k in range(len(matching))]
            rounds.append(tuple(group for groups in halves for group in groups))
    return tuple(rounds)
