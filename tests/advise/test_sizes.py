"""Which sizes of an exchange a probe times, on links that are pretended."""

from __future__ import annotations

from itertools import pairwise, product

import pytest

from commopt.advise.sizes import MOST_BYTES, Point, calls_of, curve, were_less
from commopt.plan.curve import Curve
from commopt.plan.links import rounds
from commopt.plan.profile import sent_bytes

BUDGET_S, START_S = 3.0, 3e-4
LINKS = list(
    product((2, 4, 6, 16, 64), (1e6, 2.5e6, 12.5e6, 125e6), (5e-5, 1e-3, 2e-2, 0.1))
)  # machines, bytes/s, latency
OPERATIONS = ("all_reduce", "all_gather", "all_to_all")


def timed(operation: str, machines: int, bytes_per_s: float, latency_s: float) -> tuple[float, list[Point]]:
    """All seconds, and the points."""
    spent_s, first_s = [], START_S + rounds(operation, machines) * latency_s
    byte_s = sent_bytes(operation, 1.0, machines) / bytes_per_s

    def measure(nbytes: int, calls: int) -> tuple[int, float, float, float]:
        seconds = first_s + nbytes * byte_s
        spent_s.append((calls or calls_of(seconds, BUDGET_S / 4)) * seconds)
        return nbytes, seconds, 0.1, spent_s[-1]

    points = curve(measure, byte_s, BUDGET_S)
    return sum(spent_s), points


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_takes_no_longer_than_it_may_or_than_one_call(operation: str) -> None:
    for link in LINKS:
        spent_s, points = timed(operation, *link)
        assert spent_s <= max(BUDGET_S, points[0].seconds) * 1.001, link


@pytest.mark.parametrize("operation", OPERATIONS)
def test_larger_exchanges_follow_from_the_points(operation: str) -> None:
    for link in LINKS:
        _, points = timed(operation, *link)
        known, (first, *_, last) = Curve.of(points), points
        byte_s = (last.seconds - first.seconds) / (last.nbytes - first.nbytes)
        for nbytes in (1 << 12, 1 << 18, 1 << 24):
            assert known(nbytes) == pytest.approx(first.seconds + byte_s * (nbytes - first.nbytes)), link
        assert last.seconds > 0.4 / 6 or last.nbytes == MOST_BYTES  # noise counts for little in the slope


@pytest.mark.parametrize("machines", [2, 4, 6])
def test_without_much_latency_no_size_is_left_out(machines: int) -> None:
    for operation, bytes_per_s in product(OPERATIONS, (2.5e6, 12.5e6, 125e6)):
        _, points = timed(operation, machines, bytes_per_s, 5e-5)
        assert len(points) >= 5
        assert all(b.nbytes <= 6 * a.nbytes for a, b in pairwise(points))
        assert min(point.calls for point in points) >= 3
        assert len(points) == 7 or points[-1].seconds == pytest.approx(0.4, rel=1e-3)  # the longest that is wanted


def test_what_was_left_out_is_told() -> None:
    told = [were_less(timed("all_reduce", 6, 2.5e6, latency_s)[1]) for latency_s in (2e-2, 0.1)]
    assert were_less(timed("all_reduce", 2, 125e6, 5e-5)[1]) == ""
    assert told == ["3 sizes, each at least 3 times", "2 sizes, each at least once"]
    _, points = timed("all_reduce", 64, 125e6, 0.1)
    assert were_less(points) == "one size, once; larger ones are worked out from the links"
    assert [(point.nbytes, point.calls) for point in points] == [(1024, 1), (MOST_BYTES, 0)]


def test_a_link_that_turns_out_slower_ends_it_earlier() -> None:
    spent_s = []

    def measure(nbytes: int, calls: int) -> tuple[int, float, float, float]:
        seconds = 1e-3 + nbytes * 1e-5  # a hundred times what was known
        spent_s.append((calls or calls_of(seconds, BUDGET_S / 4)) * seconds)
        return nbytes, seconds, 0.1, spent_s[-1]

    points = curve(measure, 1e-7, BUDGET_S)
    assert sum(spent_s) <= BUDGET_S
    assert points[-1].nbytes < MOST_BYTES / 50
