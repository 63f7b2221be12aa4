"""Orders and groups of ranks that every rank draws alike, from (seed, purpose, count) only. Needs numpy and no torch."""

import numpy as np
from numpy.typing import NDArray

from commopt.wire.noise import keys

I64 = NDArray[np.int64]


def random_groups(ranks: int, size: int, seed: int, round: int) -> list[tuple[int, ...]]:
    """NoLoCo's random groups of a round (arXiv:2506.10911), the same on every rank from (seed, round) only.

    A permutation of the ranks, cut into groups of `size`; members are sorted. Ranks that are left over make a smaller group (the
    paper wants ranks to be divisible by size). A single one sits the round out and is in no group: from round cN to cN + N - 1 each of
    N ranks does so once, and none does twice in a row.
    """
    order = random_order(ranks, size, seed, round).tolist()
    return [tuple(sorted(order[first : first + size])) for first in range(0, len(order), size)]


def random_order(ranks: int, size: int, seed: int, round: int) -> I64:
    """The ranks in the order that `random_groups` cuts every `size` of; without the one that sits the round out."""
    order = _permuted(ranks, seed, "random groups", round)
    return order[order != _sits_out(ranks, seed, round)] if ranks % size == 1 else order


def group_of(rank: int, ranks: int, size: int, seed: int, round: int) -> tuple[int, ...]:
    """The group of this rank in `random_groups`, and (rank,) if it sits the round out."""
    return next((group for group in random_groups(ranks, size, seed, round) if rank in group), (rank,))


def permutation(ranks: int, seed: int, purpose: str, count: int) -> list[int]:
    """The ranks in the order of their keys, which differ: for one count, a key is a bijection of the place."""
    order: list[int] = _permuted(ranks, seed, purpose, count).tolist()
    return order


def _permuted(ranks: int, seed: int, purpose: str, count: int) -> I64:
    drawn = keys(seed, purpose, 0, np.asarray([count]), np.arange(ranks))  # (N,) u64
    return np.argsort(drawn)


def _sits_out(ranks: int, seed: int, round: int) -> int:
    """The rank that sits a round out: they take turns, in an order drawn anew for each cycle of N rounds."""
    cycle, turn = divmod(round, ranks)
    order = permutation(ranks, seed, "sits out", cycle)
    if turn < 2 and cycle > 0 and ranks > 2 and order[0] == permutation(ranks, seed, "sits out", cycle - 1)[-1]:
        order[:2] = order[1::-1]  # else it would sit out twice in a row; the last turn stays, so cycles do not chain
    return order[turn]
