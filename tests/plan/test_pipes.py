"""Rounds on arrays of links take what `LinkModel.seconds` says of the same messages."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from commopt.plan.links import LinkModel, rounds, schedule
from commopt.plan.pipes import Collective, Groups, Pipes
from commopt.plan.profile import Operation

RATES = st.floats(1e3, 1e9) | st.just(math.inf)
DELAYS = st.floats(0, 0.1)


@st.composite
def clusters(draw: st.DrawFn) -> LinkModel:
    nodes, sites = draw(st.integers(2, 12)), draw(st.integers(1, 3))

    def some(values: st.SearchStrategy[float], count: int) -> tuple[float, ...]:
        return tuple(draw(st.lists(values, min_size=count, max_size=count)))

    own = some(RATES, nodes), some(DELAYS, nodes)
    site_of_node = tuple(draw(st.lists(st.integers(0, sites - 1), min_size=nodes, max_size=nodes)))
    return LinkModel(tuple(range(nodes)), *own, site_of_node, some(RATES, sites), some(DELAYS, sites))


def messages(operation: str, nbytes: int, members: list[int], nodes: int) -> list[dict[int, float]]:
    """What each node of the cluster sends to each other in one collective of `members`."""
    sent: list[dict[int, float]] = [{} for _ in range(nodes)]
    for place, node in enumerate(members):
        if operation == "send":
            sent[node] = {members[(place + 1) % len(members)]: nbytes} if len(members) > 1 else {}
        elif operation == "all_to_all":
            sent[node] = {other: nbytes / len(members) for other in members if other != node}
        else:
            to = schedule(operation, nbytes, place, len(members))
            sent[node] = {members[peer]: amount for peer, amount in to.items()}
    return sent


@given(clusters(), st.sampled_from(get_args(Operation)), st.integers(1, 10**6))
def test_one_group_of_all_takes_what_the_link_model_says(links: LinkModel, operation: Operation, nbytes: int) -> None:
    nodes = links.ranks
    sent = messages(operation, nbytes, list(range(nodes)), nodes)
    groups = Groups(np.arange(nodes), np.array([0]))
    seconds, sent_bytes = Pipes(links).round(groups, [Collective(operation, nbytes)])
    assert seconds == pytest.approx([links.seconds(sent, rounds(operation, nodes))])
    assert sent_bytes == pytest.approx([sum(own.values()) for own in sent])


@given(clusters(), st.sampled_from(get_args(Operation)), st.integers(2, 5), st.randoms(use_true_random=False))
def test_groups_of_one_round_share_the_pipes(
    links: LinkModel, operation: Operation, size: int, random: st.DataObject
) -> None:
    order = list(range(links.ranks))
    random.shuffle(order)  # type: ignore[attr-defined]
    groups = Groups.cut(np.array(order), size)
    sent: list[dict[int, float]] = [{} for _ in order]
    for members in np.split(groups.order, groups.starts[1:]):
        for node, own in enumerate(messages(operation, 1000, members.tolist(), links.ranks)):
            sent[node] |= own
    still = LinkModel(
        *(links.node_of_rank, links.bytes_per_s, (0.0,) * links.ranks, links.site_of_node, links.between_bytes_per_s)
    )
    still = LinkModel(**{**still.__dict__, "between_latency_s": (0.0,) * len(links.between_bytes_per_s)})
    seconds, _ = Pipes(still).round(groups, [Collective(operation, 1000)])
    assert seconds.max() == pytest.approx(still.seconds(sent))


def test_collectives_come_one_after_another_and_links_are_filled_in_part() -> None:
    links = LinkModel.uniform(4, "8mbit", "2ms")
    groups = Groups(np.arange(4), np.array([0]))
    two_way = [Collective("all_to_all", 1e6), Collective("all_gather", 1e4)]
    ((took_s,), _) = Pipes(links, efficiency=0.5).round(groups, two_way)
    assert took_s == pytest.approx(0.002 + 2 * 0.75 + 3 * 0.002 + 2 * 0.03)


def test_groups_go_on_without_the_nodes_that_are_gone() -> None:
    groups = Groups.cut(np.array([5, 1, 4, 0, 3, 2]), 2)
    assert groups.order.tolist() == [1, 5, 0, 4, 2, 3]
    left, has_lost = groups.among(np.array([True, False, True, True, True, False]))
    assert left.order.tolist() == [0, 4, 2, 3]
    assert left.starts.tolist() == [0, 2]
    assert has_lost.tolist() == [False, False]
    left, has_lost = groups.among(np.array([False, True, True, True, True, True]))
    assert left.starts.tolist() == [0, 2, 3]
    assert has_lost.tolist() == [False, True, False]
