"""The model of a step, against what can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commopt.plan.curve import Curve
from commopt.plan.links import LinkModel
from commopt.plan.model import Codec, Setting, ddp_buckets, predict
from commopt.plan.profile import Phase, Profile
from commopt.plan.transport import LIKELY, Assumed, same_links, transport_of

DENSE = Profile("dense", "gradient", (Phase("all_reduce", 4.0),))
SIGNS = Profile("signs", "gradient", (Phase("all_to_all", 0.125), Phase("all_gather", over_ranks=0.125)))
PERFECT = Assumed(efficiency=1.0, fast_efficiency=1.0, call_s=0.0, round_s=0.0)


def setting(rate: str | None = "8mbit", machines: int = 4, **changed: object) -> Setting:
    """1 MB/s links, a model of 10^6 parameters in one bucket, and a step of 3 s."""
    transport = transport_of(LinkModel.uniform(machines, rate), 1, PERFECT)
    return replace(Setting(machines, 1, 3.0, (10**6,), transport), **changed)  # type: ignore[arg-type]


def test_a_step_is_its_computation_and_the_ring_when_one_bucket_ends_with_backward() -> None:
    predicted = predict(DENSE, setting())
    assert predicted.step_s == pytest.approx(3.0 + 2 * 3 / 4 * 4)
    assert predicted.network_s == pytest.approx(6.0)
    assert predicted.compute_s == 3.0
    assert predicted.bytes_per_machine == pytest.approx(6e6)


def test_buckets_travel_while_backward_computes_the_next() -> None:
    halves = setting(buckets=(500_000, 500_000), compute_s=30.0)
    assert predict(DENSE, halves).step_s == pytest.approx(33.0), "only the last half of 3 s is exposed"
    assert predict(DENSE, replace(halves, overlap=False)).step_s == pytest.approx(36.0)
    assert predict(replace(DENSE, overlaps=False), halves).step_s == pytest.approx(36.0)


def test_a_codec_takes_its_time_from_backward_only_if_they_share_a_core() -> None:
    codecs = {"dense": Codec(Curve.line(0.0, 2e-6))}
    halves = setting(None, buckets=(500_000, 500_000), compute_s=30.0, codecs=codecs)
    assert predict(DENSE, halves).step_s == pytest.approx(31.0), "beside a GPU, only the last bucket's is exposed"
    assert predict(DENSE, replace(halves, cores_per_rank=2.0)).step_s == pytest.approx(31.0)
    assert predict(DENSE, replace(halves, cores_per_rank=1.0)).step_s == pytest.approx(32.0)
    assert predict(DENSE, replace(halves, cores_per_rank=0.25)).step_s == pytest.approx(32.0)


def test_one_machine_sends_and_encodes_nothing() -> None:
    alone = setting(machines=1, codecs={"dense": Codec(Curve.line(1.0, 0.0))})
    assert predict(DENSE, alone).step_s == 3.0
    assert predict(DENSE, alone).bytes_per_machine == 0.0


def test_slots_share_out_the_exchange_and_the_link() -> None:
    links = LinkModel((0, 0, 1, 1), (1e6, 1e6), (0.0, 0.0), (0, 0))
    shared = Setting(2, 2, 3.0, (10**6,), transport_of(links, 2, replace(PERFECT, inside_bytes_per_s=4e6)))
    predicted = predict(DENSE, shared)
    assert predicted.network_s == pytest.approx(4.0), "two halves at half the rate"
    assert predicted.step_s == pytest.approx(3.0 + 4.0 + 1.0), "and 4 MB through 4 MB/s inside"
    assert predicted.bytes_per_machine == pytest.approx(4e6)


def test_latency_counts_for_every_round() -> None:
    far = transport_of(LinkModel.uniform(4, None, "10ms"), 1, PERFECT)
    assert far.seconds["all_reduce"](0.0) == pytest.approx(6 * 0.01)
    assert far.seconds["all_to_all"](0.0) == pytest.approx(0.01)


def test_outer_methods_wait_once_in_their_interval_and_not_for_what_their_delay_hides() -> None:
    outer = Profile("diloco", "outer", (Phase("all_reduce", 4.0),), every=10)
    assert predict(outer, setting()).step_s == pytest.approx(3.0 + 6.0 / 10)
    assert predict(replace(outer, delay=1), setting()).step_s == pytest.approx(3.0 + 3.0 / 10)
    assert predict(replace(outer, delay=2), setting()).step_s == pytest.approx(3.0)
    assert predict(replace(outer, fragments=2, delay=1), setting()).step_s == pytest.approx(3.0)
    assert predict(replace(outer, delay=1), setting()).bytes_per_machine == pytest.approx(6e5)


def test_pairs_wait_for_less_than_all_and_rarely_for_less_still() -> None:
    spread = setting(None, machines=16, spread=0.1)
    every, pairs = (Profile("x", "outer", (Phase(operation, 4.0),), every=1) for operation in ("all_reduce", "send"))
    rare = replace(every, every=100)
    waits = [predict(one, spread).step_s - 3.0 for one in (every, pairs, rare)]
    assert waits[0] > waits[1] > waits[2] > 0
    assert waits[0] == pytest.approx(10 * waits[2])


@given(st.integers(1, 10**10), st.floats(1e5, 1e9))
def test_ddps_buckets_hold_all_parameters(parameters: int, nbytes: float) -> None:
    buckets = ddp_buckets(parameters, nbytes)
    assert sum(buckets) == parameters
    assert min(buckets) > 0
    assert len(buckets) <= 129


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), min_size=2, max_size=6, unique_by=lambda p: p[0]))
def test_a_curve_goes_through_its_points(points: list[tuple[float, float]]) -> None:
    curve = Curve(tuple(points))
    for x, y in points:
        assert curve(x) == pytest.approx(y, rel=1e-6, abs=1e-6)


def test_a_faster_link_never_makes_a_step_longer() -> None:
    links = LinkModel.uniform(4, "1gbit")
    for profile in (DENSE, SIGNS):
        steps = [
            predict(profile, setting(transport=transport_of(same_links(links, 10**k / 8), 1, LIKELY))).step_s
            for k in range(6, 13)
        ]
        assert steps == sorted(steps, reverse=True)
        assert steps[-1] < steps[0]
