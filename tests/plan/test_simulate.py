"""Simulated training runs: closed forms where there are any, and who waits for whom where there are none."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commopt.errors import ConfigError
from commopt.plan.links import LinkModel
from commopt.plan.model import Codec, Setting, predict
from commopt.plan.pipes import Collective
from commopt.plan.profile import profiles
from commopt.plan.simulate import Exchange, Failure, Simulated, Times, simulate
from commopt.plan.transport import LIKELY, transport_of

MEGABYTE = 1_000_000
LINKS = LinkModel.uniform(8, "80mbit", "2ms")  # 10 MB/s
STEADY = Times(0.5)
SWAP = [Collective("send", MEGABYTE)]  # of a pair: .1 s and 2 ms


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_times_have_the_mean_and_the_spread_that_were_asked_for(spread: float) -> None:
    drawn = Times(2.0, spread).draw(np.random.default_rng(1), (1_000_000,))
    assert drawn.mean() == pytest.approx(2, rel=0.01)
    assert drawn.std() == pytest.approx(2 * spread, rel=0.05)


# ---- closed forms ----------------------------------------------------------------------------------------------------


@given(
    st.integers(2, 40),
    st.integers(1, 60),
    st.integers(1, 9),
    st.sampled_from(["all_reduce", "all_gather"]),
    st.integers(0, 10**8),
)
def test_steady_nodes_on_equal_links_take_the_closed_form(
    nodes: int, steps: int, every: int, operation: str, nbytes: int
) -> None:
    links = LinkModel.uniform(nodes, "100mbit", "3ms")
    exchange = Exchange([Collective(operation, nbytes)], every=every)  # type: ignore[arg-type]
    found = simulate(links, exchange, steps=steps, step=STEADY)
    network_s = steps // every * links.collective_seconds(operation, nbytes)
    assert found.total_s == pytest.approx([steps * 0.5 + network_s])
    assert found.waited_s == pytest.approx(np.full((1, nodes), network_s))
    assert found.utilisation == pytest.approx(steps * 0.5 / (steps * 0.5 + network_s))
    assert (found.rounds, found.missed.sum()) == (steps // every, 0)


@settings(max_examples=50)
@given(st.integers(0, 4), st.sampled_from([1, 2, 4]), st.floats(0.01, 3))
def test_an_exchange_costs_what_the_steps_that_overlap_it_leave(tau: int, fragments: int, network_s: float) -> None:
    every, links = 8, LinkModel.uniform(2, "80mbit")
    exchange = Exchange(
        [Collective("all_gather", network_s * 1e7)], every=every, fragments=fragments, overlap_steps=tau
    )

    def total_s(cycles: int) -> float:
        return float(simulate(links, exchange, steps=every * cycles, step=STEADY).total_s[0])

    until_next_s = every / fragments * 0.5  # an exchange waits for the one before it, too
    waits_s = max(0.0, network_s - min(tau * 0.5, until_next_s))
    assert total_s(9) - total_s(6) == pytest.approx(3 * (every * 0.5 + fragments * waits_s))


def test_buckets_overlap_backward_and_the_last_one_nothing() -> None:
    exchange = Exchange([Collective("all_gather", 1e7 * 0.4)], early=0.6, buckets=4)
    links = LinkModel.uniform(2, "80mbit")  # .4 s of network, .3 s of which backward overlaps

    def step_s(network_s: float) -> float:
        given_ = replace(exchange, collectives=[Collective("all_gather", 1e7 * network_s)])
        return float(simulate(links, given_, steps=10, step=STEADY).total_s[0]) / 10

    assert step_s(0.4) == pytest.approx(0.5 + 0.1)
    assert step_s(0.2) == pytest.approx(0.5 + 0.05)  # the link idles between buckets


def test_every_bucket_pays_for_its_latency() -> None:
    links = LinkModel.uniform(2, "80mbit", "10ms")
    whole, parts = (
        simulate(links, Exchange([Collective("send", 1e6)], buckets=buckets), steps=3, step=STEADY)
        for buckets in (1, 5)
    )
    assert whole.total_s == pytest.approx([3 * (0.5 + 0.1 + 0.01)])
    assert parts.total_s == pytest.approx([3 * (0.5 + 0.1 + 0.05)])
    assert parts.sent_bytes == pytest.approx(whole.sent_bytes)


@pytest.mark.parametrize("name", profiles())
@pytest.mark.parametrize("rate", ["20mbit", "10gbit"])
def test_steady_nodes_on_equal_links_take_the_step_that_the_model_predicts(name: str, rate: str) -> None:
    profile, nodes, parameters, buckets, steps = profiles()[name], 8, 4_000_000, 4, 400
    links = LinkModel.uniform(nodes, rate, "2ms")
    nothing = replace(LIKELY, efficiency=1.0, fast_efficiency=1.0, call_s=0.0, round_s=0.0)
    setting = Setting(
        nodes, 1, 0.5, (parameters // buckets,) * buckets, transport_of(links, 1, nothing), {name: Codec()}
    )
    exchange = Exchange.of(profile, parameters, nodes, buckets=buckets)
    found = simulate(links, exchange, steps=steps, step=Times(0.5))
    predicted = predict(profile, setting)
    assert found.total_s / steps == pytest.approx([predicted.step_s], rel=0.01)
    assert found.sent_bytes.mean() / steps == pytest.approx(predicted.bytes_per_machine)


# ---- waiting ---------------------------------------------------------------------------------------------------------


def test_one_slow_node_holds_all_back_but_only_its_pairs() -> None:
    links = LinkModel.uniform(64)
    slow = {7: 3.0}
    every_one, pairs = (
        simulate(links, Exchange(every=10, group_size=size), steps=20, step=STEADY, slow=slow) for size in (None, 2)
    )
    assert every_one.total_s == pytest.approx([30])
    assert every_one.waited_s[0, 0] == pytest.approx(20)
    waiting = np.flatnonzero(pairs.waited_s[0])
    assert 2 <= len(waiting) <= 3  # its partner of each round, and a partner of that one
    assert pairs.computed_s[0, 7] == pytest.approx(30)


def test_a_pair_waits_for_the_later_of_two_and_all_for_the_last() -> None:
    """E max of n standard normal numbers: .56 for 2, 2.51 for 100; steps of small spread are nearly normal."""
    step, nodes = Times(1.0, 0.05), 100
    for size, expected in ((2, 0.5642), (None, 2.5076)):
        found = simulate(LinkModel.uniform(nodes), Exchange(group_size=size), steps=1, step=step, runs=500, seed=3)
        assert found.waited_s.mean() == pytest.approx(0.05 * expected, rel=0.05)


def test_a_nodes_step_is_that_of_its_slowest_rank() -> None:
    links = LinkModel(tuple(rank // 4 for rank in range(8)), (math.inf,) * 2, (0.0,) * 2, (0, 0))
    found = simulate(links, Exchange(every=2000), steps=2000, step=Times(1.0, 0.05))
    assert found.computed_s.mean() / 2000 - 1 == pytest.approx(0.05 * 1.0294, rel=0.06)  # E max of 4 normal numbers


def test_one_slow_site_decides_what_an_all_reduce_takes() -> None:
    site_of_node = tuple(node // 4 for node in range(12))
    links = LinkModel(tuple(range(12)), (1e9,) * 12, (0.0,) * 12, site_of_node, (1e9, 1e6, 1e9), (0.0, 0.05, 0.0))
    found = simulate(links, Exchange([Collective("all_reduce", MEGABYTE)]), steps=1, step=STEADY)
    assert found.total_s == pytest.approx([0.5 + 2 * 0.05 + 22 / 12])  # two hops out of it
    pairs = simulate(links, Exchange(SWAP, group_size=2), steps=1, step=STEADY)
    assert pairs.waited_s.max() > 1
    at_other_sites = pairs.waited_s[0][pairs.waited_s[0] < 0.01]
    assert len(at_other_sites) >= 4  # pairs that the slow site has no part in


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(2, 20), st.integers(1, 5), st.floats(0, 1))
def test_groups_never_take_longer_than_all_if_messages_are_free(
    seed: int, nodes: int, every: int, spread: float
) -> None:
    def total_s(size: int | None) -> float:
        exchange = Exchange(every=every, group_size=size)
        return float(
            simulate(LinkModel.uniform(nodes), exchange, steps=12, step=Times(1, spread), seed=seed).total_s[0]
        )

    assert total_s(2) <= total_s(None) * (1 + 1e-12)


# ---- failing nodes ---------------------------------------------------------------------------------------------------


def of_pairs(*failures: Failure, steps: int = 6) -> Simulated:
    exchange = Exchange(SWAP, every=2, group_size=2, timeout_s=10.0)
    return simulate(LINKS, exchange, steps=steps, step=STEADY, failures=failures)


def test_the_partner_of_a_failed_node_waits_once_and_goes_on_alone() -> None:
    found = of_pairs(Failure(3, at_step=1), steps=2)
    (partner,) = np.flatnonzero(found.waited_s[0] > 1)
    assert found.waited_s[0, partner] == pytest.approx(10)
    assert found.missed.tolist() == [int(node in (3, partner)) for node in range(8)]
    assert found.sent_bytes.tolist() == [0.0 if node in (3, partner) else MEGABYTE for node in range(8)]
    assert found.computed_s[0, 3] == 0.5
    later = of_pairs(Failure(3, at_step=1))
    assert later.waited_s.max() < 10 + 3 * 0.2 + 10  # nobody waits for it again; one of seven sits each round out
    assert later.missed.sum() == 1 + 3


def test_all_wait_once_for_a_failed_node_and_go_on_without_it() -> None:
    found = simulate(
        LINKS,
        Exchange([Collective("all_reduce", MEGABYTE)], timeout_s=10.0),
        steps=3,
        step=STEADY,
        failures=[Failure(3, at_step=2)],
    )
    eight, seven = (2 * (n - 1) * 0.002 + 2 * (n - 1) / n * 0.1 for n in (8, 7))
    assert found.total_s == pytest.approx([3 * 0.5 + eight + 10 + 2 * seven])
    assert found.missed.tolist() == [0, 0, 0, 2, 0, 0, 0, 0]
    assert found.down_s[0, 3] == pytest.approx(float(found.total_s[0]) - 2 * 0.5 - eight)


def test_a_node_that_is_back_takes_part_again() -> None:
    found = of_pairs(Failure(3, at_step=1, back_after_steps=2), steps=8)  # it misses the first of four rounds
    assert found.missed[3] == 1
    assert found.missed.sum() == 2
    assert found.sent_bytes[3] == 3 * MEGABYTE
    assert found.computed_s[0, 3] == pytest.approx(3.0)
    assert 0 < found.down_s[0, 3] < 2


def test_a_lone_survivor_trains_on() -> None:
    found = simulate(
        LinkModel.uniform(2, "80mbit"), Exchange(SWAP, group_size=2), steps=9, step=STEADY, failures=[Failure(0, 4)]
    )
    assert found.computed_s[0].tolist() == [2.0, 4.5]
    assert found.missed.tolist() == [6, 6]


# ---- size, and mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 2, 16])
def test_ten_thousand_ranks_need_little_memory(size: int | None) -> None:
    nodes = 10_000
    sites = tuple(node // 2500 for node in range(nodes))
    links = LinkModel(tuple(range(nodes)), (1e8,) * nodes, (0.001,) * nodes, sites, (1e10,) * 4, (0.03,) * 4)
    exchange = Exchange([Collective("all_reduce", 5e7)], every=50, group_size=size)
    tracemalloc.start()
    found = simulate(links, exchange, steps=200, step=Times(0.5, 0.1), slow={17: 2.0}, failures=[Failure(5, 60, 60)])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 60e6
    assert found.rounds == 4
    assert found.computed_s[0, 17] == pytest.approx(200, rel=0.05)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"steps": 0}, "steps=0.*write 1 or more"),
        ({"efficiency": 0.0}, "efficiency=0.0.*a share above 0"),
        ({"slow": {8: 2.0}}, "node 8: no such node; write 0 to 7"),
        ({"failures": [Failure(-1, 3)]}, "node -1: no such node"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        simulate(LINKS, Exchange(), **{"steps": 5, "step": STEADY, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change", [{"every": 3, "fragments": 4}, {"group_size": 1}, {"early": 1.5}, {"overlap_steps": -1}, {"buckets": 0}]
)
def test_an_exchange_that_cannot_be_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="is out of range"):
        Exchange(**change)  # type: ignore[arg-type]


def test_times_and_failures_that_cannot_be_are_refused() -> None:
    for wrong in (lambda: Times(0.0), lambda: Times(1.0, -1.0), lambda: Failure(0, -1), lambda: Failure(0, 3, 0)):
        with pytest.raises(ConfigError, match="is out of range"):
            wrong()
