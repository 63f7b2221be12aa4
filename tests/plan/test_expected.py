"""What is expected of other exchanges from steps under one, and what is chosen."""

from __future__ import annotations

import pytest

from commopt.plan.expected import Measured, Work, next_choice, predicted
from commopt.plan.profile import Phase, Profile

PROFILES = {
    "dense": Profile("dense", "gradient", (Phase("all_reduce", 4.0),)),
    "fp16": Profile("fp16", "gradient", (Phase("all_reduce", 2.0),)),
    "int8": Profile("int8", "gradient", (Phase("all_to_all", 1.0), Phase("all_gather", over_ranks=1.0))),
}
FREE = dict.fromkeys(PROFILES, 0.0)
WEIGHTS = {"dense": 1.0, "fp16": 1.05, "int8": 1.06}


@pytest.mark.parametrize(
    ("current", "measured"),
    [("dense", (0.5, 0.4, 0.4)), ("fp16", (0.3, 0.2, 0.2)), ("int8", (0.2, 0.1, 0.1))],
    ids=["dense", "fp16", "int8"],
)
@pytest.mark.parametrize("machines", [2, 4])
def test_without_overlap_the_wait_is_as_the_bytes_whatever_was_timed(
    current: str, measured: tuple[float, float, float], machines: int
) -> None:
    found = predicted(Measured(*measured), current, PROFILES, FREE, Work(machines, (3000, 1000)))
    assert found == pytest.approx({"dense": 0.5, "fp16": 0.3, "int8": 0.2})


def test_the_codec_of_what_was_timed_is_no_transfer() -> None:
    codec_s = {"dense": 0.0, "fp16": 0.02, "int8": 0.05}
    found = predicted(Measured(0.25, 0.15, 0.15), "int8", PROFILES, codec_s, Work(4, (4000,)))
    assert found == pytest.approx({"dense": 0.5, "fp16": 0.32, "int8": 0.25})


def test_what_backward_hides_gains_nothing() -> None:
    work = Work(4, (1000,) * 20, cores=None)
    hidden = predicted(Measured(0.5, 0.01, 0.2), "dense", PROFILES, FREE, work)
    assert hidden["int8"] == pytest.approx(hidden["dense"], rel=0.03)
    half = predicted(Measured(0.6, 0.35, 0.5), "dense", PROFILES, FREE, work)
    assert 0.25 < half["int8"] < 0.27 < half["fp16"] < 0.36


def test_a_lane_that_waited_for_backward_counts_as_shorter() -> None:
    work = Work(4, (1000,) * 20, cores=None)
    one, other = (predicted(Measured(0.6, 0.35, x), "dense", PROFILES, FREE, work) for x in (0.5, 0.55))
    assert one["fp16"] == pytest.approx(other["fp16"], rel=0.01)


def test_a_step_without_an_exchange_expects_nothing_of_others() -> None:
    still = Measured(0.5, 0.0, 0.0)
    assert predicted(still, "dense", PROFILES, FREE, Work(4, (1000,))) == pytest.approx(dict.fromkeys(PROFILES, 0.5))
    assert still.least_s == 0.5


@pytest.mark.parametrize(
    ("timed", "expected", "choice"),
    [
        ({"dense": 1.0}, {}, ("dense", False)),
        ({"dense": 1.0}, {"fp16": 0.96, "int8": 0.95}, ("dense", False)),
        ({"dense": 1.0}, {"fp16": 0.6, "int8": 0.4}, ("int8", True)),
        ({"dense": 1.0}, {"fp16": 0.6, "int8": 0.6}, ("fp16", True)),
        ({"dense": 1.0, "int8": 0.7}, {"fp16": 0.6}, ("fp16", True)),
        ({"dense": 1.0, "int8": 0.6}, {"fp16": 0.61}, ("int8", False)),
        ({"dense": 1.0, "int8": 1.2}, {"fp16": 1.1}, ("dense", False)),
        ({"dense": 1.0, "fp16": 0.96}, {"int8": 0.97}, ("dense", False)),
        ({"int8": 1.0}, {"dense": 1.05, "fp16": 1.2}, ("dense", True)),
        ({"int8": 1.0}, {"dense": 1.07, "fp16": 1.2}, ("int8", False)),
    ],
)
def test_the_fastest_by_weight_is_timed_before_it_is_kept(
    timed: dict[str, float], expected: dict[str, float], choice: tuple[str, bool]
) -> None:
    assert next_choice(timed, expected, WEIGHTS) == choice
