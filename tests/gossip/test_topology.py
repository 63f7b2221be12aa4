"""Topologies: valid rounds, and how fast they reach consensus."""

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
    make_topology,
    mixing_matrix,
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


@given(st.integers(2, 70), st.integers(0, 30))
def test_in_the_directed_graph_everybody_sends_to_one_other_and_hears_from_one(ranks: int, round: int) -> None:
    targets = [directed_exponential(ranks, round, rank) for rank in range(ranks)]
    assert sorted(targets) == list(range(ranks))
    assert all(target != rank for rank, target in enumerate(targets))


def test_the_directed_graph_hops_1_2_4_and_starts_again() -> None:
    assert [directed_exponential(6, k, 4) for k in range(5)] == [5, 0, 2, 5, 0]
