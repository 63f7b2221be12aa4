from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commopt.errors import ConfigError
from commopt.plan.links import LinkModel, parse_delay, parse_loss, parse_rate, rounds, schedule, wire_bytes

sizes = st.integers(1, 40)
operations = st.sampled_from(["all_reduce", "all_gather", "broadcast"])


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        *((parse_rate, text, n) for text, n in (("8bit", 1), ("1kbit", 125), ("50mbit", 6.25e6), ("2.5gbit", 312.5e6))),
        *((parse_rate, text, n) for text, n in (("10 MBit", 1.25e6), ("1mbps", 1e6))),
        *((parse_delay, text, s) for text, s in (("20ms", 0.02), ("1.5s", 1.5), ("250us", 250e-6), (".5 ms", 0.0005))),
        *((parse_loss, text, share) for text, share in (("0.1%", 0.001), ("0%", 0), ("100%", 1))),
    ],
)
def test_rates_delays_and_losses_are_tcs(parse: Callable[[str], float], text: str, value: float) -> None:
    assert parse(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("parse", "text", "complaint"),
    [
        *((parse_rate, text, "is not a rate") for text in ("", "fast", "50", "50mb", "-1mbit", "0mbit", "1e3mbit")),
        *((parse_rate, text, "is not a rate") for text in ("nanmbit", "infmbit")),
        *((parse_loss, text, "is not a loss rate") for text in ("0.1", "-1%", "101%", "1e-3%", "%")),
    ],
)
def test_what_is_none_is_refused(parse: Callable[[str], float], text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse(text)


def test_headers_cost_six_percent_of_small_segments_and_one_of_large() -> None:
    assert wire_bytes(1e6, 1500) / 1e6 == pytest.approx(1.057, abs=0.002)
    assert wire_bytes(1e6, 9000) / 1e6 == pytest.approx(1.009, abs=0.001)


@given(operations, sizes, st.integers(0, 10**9))
def test_a_schedule_moves_what_the_operation_needs(operation: str, size: int, nbytes: int) -> None:
    sent = [schedule(operation, nbytes, rank, size) for rank in range(size)]
    assert all(peer != rank and 0 <= peer < size for rank, messages in enumerate(sent) for peer in messages)
    total = sum(sum(messages.values()) for messages in sent)
    needed = {"all_reduce": 2 * (size - 1), "all_gather": size * (size - 1), "broadcast": size - 1}[operation]
    assert total == pytest.approx(needed * nbytes)


@given(sizes, st.integers(0, 39))
def test_a_broadcast_reaches_every_rank_once(size: int, root: int) -> None:
    root %= size
    reached = [peer for rank in range(size) for peer in schedule("broadcast", 1, rank, size, root=root)]
    assert sorted([*reached, root]) == list(range(size))


@given(st.sampled_from(["all_reduce", "all_gather", "broadcast", "all_to_all", "swap"]), sizes)
def test_a_lone_rank_waits_for_nobody(operation: str, size: int) -> None:
    assert rounds(operation, 1) == 0
    assert rounds(operation, size + 1) >= 1


def test_an_unknown_operation_has_no_schedule() -> None:
    with pytest.raises(ValueError, match="no schedule for operation 'reduce'"):
        schedule("reduce", 1, 0, 2)


def test_a_ring_of_equal_links() -> None:
    links = LinkModel.uniform(4, "80mbit", "2ms")
    assert links.collective_seconds("all_reduce", 1_000_000) == pytest.approx(6 * 0.002 + 1.5e6 / 1e7)


@given(st.integers(0, 10**8), st.integers(1, 16), operations)
def test_unlimited_links_cost_nothing(nbytes: int, ranks: int, operation: str) -> None:
    assert LinkModel.uniform(ranks).collective_seconds(operation, nbytes) == 0


@given(st.integers(1, 10**8), st.integers(2, 16), operations)
def test_twice_the_rate_is_half_the_time(nbytes: int, ranks: int, operation: str) -> None:
    slow, fast = LinkModel.uniform(ranks, "10mbit"), LinkModel.uniform(ranks, "20mbit")
    assert slow.collective_seconds(operation, nbytes) == pytest.approx(2 * fast.collective_seconds(operation, nbytes))


def test_ranks_of_one_node_share_its_link_and_reach_each_other_for_nothing() -> None:
    links = LinkModel((0, 0, 1, 1), (1e6, 1e6), (0.0, 0.0), (0, 0))
    assert links.seconds([{1: 5e6}, {}, {}, {}]) == 0
    assert links.seconds([{2: 1e6}, {3: 1e6}, {}, {}]) == pytest.approx(2)


def test_a_nodes_pipe_in_is_shared_too_and_the_slowest_link_decides() -> None:
    assert LinkModel.uniform(4, "8mbit").seconds([{3: 1e6}, {3: 1e6}, {3: 1e6}, {}]) == pytest.approx(3)
    links = LinkModel((0, 1), (1e7, 1e6), (0.001, 0.005), (0, 0))
    assert links.seconds([{1: 1e6}, {}]) == pytest.approx(0.001 + 1)
    assert links.seconds([{}, {0: 1e6}]) == pytest.approx(0.005 + 1)


def test_sites_share_one_pipe_and_add_their_delay() -> None:
    links = LinkModel((0, 1, 2, 3), (1e9,) * 4, (0.001,) * 4, (0, 0, 1, 1), (1e6, 1e6), (0.01, 0.01))
    assert links.seconds([{2: 1e6}, {3: 1e6}, {}, {}]) == pytest.approx(0.011 + 2)
    assert links.seconds([{1: 1e6}, {}, {}, {}]) == pytest.approx(0.001 + 0.001)


def test_a_ring_is_as_late_as_its_longest_way_and_not_as_its_longest_hop() -> None:
    """Rank i has done round r when its own round r - 1 is done and what rank i - 1 sent after its round r - 1 has come."""
    delays = (0.001, 0.05, 0.002, 0.0, 0.03)
    links = LinkModel(tuple(range(5)), (math.inf,) * 5, delays, (0,) * 5)
    for operation in ("all_reduce", "all_gather"):
        done = [0.0] * 5
        for _ in range(rounds(operation, 5)):
            done = [max(done[i], done[i - 1] + delays[i - 1]) for i in range(5)]
        assert links.collective_seconds(operation, 1) == pytest.approx(max(done))
    assert links.collective_seconds("broadcast", 1) == pytest.approx(3 * 0.05)


def test_hops_within_a_node_take_a_ring_no_time() -> None:
    links = LinkModel((0, 0, 1, 1), (math.inf,) * 2, (0.01, 0.01), (0, 0))
    assert links.collective_seconds("all_reduce", 1) == pytest.approx(0.03)  # three of six hops in a row


@given(st.lists(st.floats(1e3, 1e9) | st.just(math.inf), min_size=1, max_size=8), st.floats(0, 1))
def test_more_bytes_never_arrive_sooner(rates: list[float], latency_s: float) -> None:
    nodes = len(rates)
    links = LinkModel(tuple(range(nodes)), tuple(rates), (latency_s,) * nodes, (0,) * nodes)
    few = [{(rank + 1) % nodes: 1e3} for rank in range(nodes)]
    many = [{(rank + 1) % nodes: 1e6} for rank in range(nodes)]
    assert links.seconds(few) <= links.seconds(many)
