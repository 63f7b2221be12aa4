"""Random groups: everybody has one, they are fair, and they stay the same from release to release."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from commopt.wire.draws import group_of, random_groups

SEEDS = st.integers(0, 2**32)


@given(st.integers(1, 40), st.integers(2, 9), SEEDS, st.integers(0, 10**6))
def test_random_groups_hold_each_rank_once_and_are_never_alone(ranks: int, size: int, seed: int, round: int) -> None:
    groups = random_groups(ranks, size, seed, round)
    members = [rank for group in groups for rank in group]
    assert len(set(members)) == len(members) == ranks - (ranks % size == 1)
    assert all(group == tuple(sorted(group)) for group in groups)
    sizes = sorted(len(group) for group in groups)
    left = ranks % size
    assert sizes == [left] * (left > 1) + [size] * (ranks // size)
    for rank in range(ranks):
        own = group_of(rank, ranks, size, seed, round)
        assert own in groups if rank in members else own == (rank,)


@given(st.sampled_from([(3, 2), (4, 3), (5, 2), (7, 3), (9, 4), (11, 2)]), SEEDS, st.integers(0, 50))
def test_ranks_sit_out_equally_often_and_never_twice_in_a_row(shape: tuple[int, int], seed: int, first: int) -> None:
    ranks, size = shape
    cycles = range(first * ranks, (first + 4) * ranks)
    out = [next(r for r in range(ranks) if group_of(r, ranks, size, seed, k) == (r,)) for k in cycles]
    for cycle in range(4):
        assert sorted(out[cycle * ranks : (cycle + 1) * ranks]) == list(range(ranks))
    assert all(a != b for a, b in pairwise(out))


def test_who_sits_out_first_differs_between_seeds_and_cycles() -> None:
    def order(seed: int, cycle: int) -> tuple[int, ...]:
        rounds = range(7 * cycle, 7 * cycle + 7)
        return tuple(next(r for r in range(7) if group_of(r, 7, 2, seed, k) == (r,)) for k in rounds)

    assert len({order(seed, cycle) for seed in range(5) for cycle in range(5)}) > 20


def test_random_groups_are_the_same_in_every_release() -> None:
    """Ranks of one job agree on nothing else, and a resumed job continues with the same rounds."""
    assert [random_groups(5, 2, 7, k) for k in range(3)] == [
        [(3, 4), (0, 1)],
        [(0, 4), (2, 3)],
        [(1, 4), (2, 3)],
    ]
    assert random_groups(8, 3, -1, 2**40) == [(3, 5, 6), (0, 1, 7), (2, 4)]


def test_pairs_are_drawn_evenly() -> None:
    rounds = 3000
    met = Counter(pair for k in range(rounds) for pair in random_groups(6, 2, 1, k))
    assert len(met) == 15
    for count in met.values():  # each pair with probability 1/5: 600 expected, standard deviation 22
        assert abs(count - rounds / 5) < 110


def test_one_round_says_nothing_about_the_next() -> None:
    again = sum(group_of(0, 6, 2, 3, k) == group_of(0, 6, 2, 3, k + 1) for k in range(2000))
    assert abs(again - 400) < 90  # probability 1/5, standard deviation 18
