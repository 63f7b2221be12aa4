"""Topologies: valid rounds, how fast they reach consensus, and fair random groups."""

from __future__ import annotations

from collections import Counter
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from commopt.errors import ConfigError
from commopt.gossip.topology import (
    F64,
    Round,
    directed_exponential,
    group_of,
    make_topology,
    mixing_matrix,
    random_groups,
)

SEEDS = st.integers(0, 2**32)


@st.composite
def topologies(draw: st.DrawFn) -> tuple[int, tuple[Round, ...]]:
    """Ranks, and the rounds of one of their topologies."""
    name = draw(st.sampled_from(["complete", "ring", "one_peer_exp", "alternating_exp_ring"]))
    slots = draw(st.integers(1, 4)) if name == "alternating_exp_ring" else 1
    ranks = draw(st.integers(1, 17)) if name in ("complete", "ring") else 2 ** draw(st.integers(0, 4)) * slots
    return ranks, make_topology(name, ranks, slots)


def period(rounds: tuple[Round, ...], ranks: int) -> F64:
    """The product of all rounds' matrices, the first round applied first."""
    return reduce(lambda done, matrix: matrix @ done, [mixing_matrix(groups, ranks) for groups in rounds])


@given(topologies(), st.integers(0, 1000))
def test_every_round_averages_in_groups_that_have_no_rank_in_common(
    topology: tuple[int, tuple[Round, ...]], seed: int
) -> None:
    ranks, rounds = topology
    x = np.random.default_rng(seed).standard_normal(ranks)
    for groups in rounds:
        matrix, expected = mixing_matrix(groups, ranks), x.copy()
        members = [rank for group in groups for rank in group]
        assert len(members) == len(set(members))
        assert (matrix >= 0).all()
        np.testing.assert_allclose(matrix.sum(axis=0), 1, rtol=0, atol=1e-12)
        np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=0, atol=1e-12)
        for group in groups:
            assert group == tuple(sorted(group))
            expected[list(group)] = x[list(group)].mean()
        np.testing.assert_allclose(matrix @ x, expected, rtol=0, atol=1e-12)


@given(topologies())
def test_rounds_without_end_reach_consensus(topology: tuple[int, tuple[Round, ...]]) -> None:
    ranks, rounds = topology
    gap = np.linalg.matrix_power(period(rounds, ranks), 200) - 1 / ranks
    np.testing.assert_allclose(gap, 0, rtol=0, atol=1e-3)


@pytest.mark.parametrize("ranks", [2, 4, 8, 16, 64])
def test_one_peer_exp_is_exact_after_log2_of_the_ranks(ranks: int) -> None:
    rounds = make_topology("one_peer_exp", ranks)
    assert 2 ** len(rounds) == ranks
    np.testing.assert_allclose(period(rounds, ranks), 1 / ranks, rtol=0, atol=1e-12)


def test_one_peer_exp_pairs_ranks_that_differ_in_one_bit() -> None:
    assert make_topology("one_peer_exp", 8) == (
        ((0, 1), (2, 3), (4, 5), (6, 7)),
        ((0, 2), (1, 3), (4, 6), (5, 7)),
        ((0, 4), (1, 5), (2, 6), (3, 7)),
    )


@pytest.mark.parametrize(("nodes", "slots"), [(2, 2), (2, 3), (4, 2), (8, 4)])
def test_alternating_exp_ring_is_exact_after_two_rounds_for_each_hop(nodes: int, slots: int) -> None:
    rounds = make_topology("alternating_exp_ring", nodes * slots, slots)
    assert 2 ** (len(rounds) // 2) == nodes
    np.testing.assert_allclose(period(rounds, nodes * slots), 1 / (nodes * slots), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("nodes", "slots"), [(4, 2), (8, 4), (16, 2)])
def test_alternating_exp_ring_has_half_of_the_ranks_on_the_network(nodes: int, slots: int) -> None:
    for groups in make_topology("alternating_exp_ring", nodes * slots, slots):
        crossing = [group for group in groups if len({rank // slots for rank in group}) == 2]
        assert {len(group) for group in crossing} == {2 * slots}
        assert sum(len(group) for group in crossing) == nodes * slots / 2
        assert sum(len(group) for group in groups) == nodes * slots


def test_alternating_exp_ring_starts_with_even_pairs_inside_their_nodes() -> None:
    assert make_topology("alternating_exp_ring", 8, 2)[:2] == (
        ((0, 1), (2, 3), (4, 5, 6, 7)),
        ((0, 1, 2, 3), (4, 5), (6, 7)),
    )


@pytest.mark.parametrize("ranks", [2, 8])
def test_alternating_exp_ring_with_one_rank_on_a_node_is_one_peer_exp(ranks: int) -> None:
    assert make_topology("alternating_exp_ring", ranks, slots=1) == make_topology("one_peer_exp", ranks)


def test_complete_and_alternating_exp_ring_on_one_node_average_everybody() -> None:
    assert make_topology("alternating_exp_ring", 3, slots=3) == make_topology("complete", 3) == (((0, 1, 2),),)


def test_an_even_ring_turns_to_the_right_and_then_to_the_left() -> None:
    assert make_topology("ring", 6) == (((0, 1), (2, 3), (4, 5)), ((1, 2), (3, 4), (0, 5)))


@pytest.mark.parametrize("ranks", [3, 5, 9, 15])
def test_in_an_odd_ring_each_rank_sits_out_once_and_each_edge_is_used_alike(ranks: int) -> None:
    rounds = make_topology("ring", ranks)
    assert len(rounds) == ranks
    out = [set(range(ranks)) - {rank for pair in pairs for rank in pair} for pairs in rounds]
    assert sorted(out, key=min) == [{rank} for rank in range(ranks)]
    around = {(rank, rank + 1) for rank in range(ranks - 1)} | {(0, ranks - 1)}
    assert Counter(pair for pairs in rounds for pair in pairs) == dict.fromkeys(around, (ranks - 1) // 2)
    for rank in range(ranks):  # no neighbour is met in two rounds running, the last and the first included
        met = [pair for pairs in [*rounds, *rounds] for pair in pairs if rank in pair]
        assert all(a != b for a, b in pairwise(met))


@pytest.mark.parametrize("name", ["complete", "ring", "one_peer_exp", "alternating_exp_ring"])
def test_a_single_rank_sits_every_round_out(name: str) -> None:
    assert make_topology(name, 1) == ((),)
    assert mixing_matrix((), 1).tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (
            {"name": "one_peer_exp", "ranks": 6},
            r"2, 4, 8, 16, \.\.\. ranks, and here are 6; start 4 or 8 of them, or write ring",
        ),
        ({"name": "alternating_exp_ring", "ranks": 6, "slots": 2}, "here are 6 ranks, 2 to a node; change the number"),
        ({"name": "alternating_exp_ring", "ranks": 6, "slots": 4}, "here are 6 ranks, 4 to a node; change the number"),
        ({"name": "alternating_exp_ring", "ranks": 3}, "here are 3 ranks, 1 to a node; change the number"),
    ],
)
def test_ranks_that_a_topology_has_no_rounds_for_are_refused(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_topology(**given)


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


@given(st.integers(2, 70), st.integers(0, 30))
def test_in_the_directed_graph_everybody_sends_to_one_other_and_hears_from_one(ranks: int, round: int) -> None:
    targets = [directed_exponential(ranks, round, rank) for rank in range(ranks)]
    assert sorted(targets) == list(range(ranks))
    assert all(target != rank for rank, target in enumerate(targets))


def test_the_directed_graph_hops_1_2_4_and_starts_again() -> None:
    assert [directed_exponential(6, k, 4) for k in range(5)] == [5, 0, 2, 5, 0]
