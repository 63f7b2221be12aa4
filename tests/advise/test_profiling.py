"""What the planner knows of methods is what they do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from commopt.advise.profiling import profile_of
from commopt.errors import ConfigError
from commopt.methods import METHODS, build
from commopt.plan.profile import Profile, profiles


@pytest.mark.parametrize("name", profiles())
def test_bytes_are_those_of_the_method(name: str) -> None:
    method, profile = build(name), profiles()[name]
    for ranks in (4, 16, 64, 1024):
        try:
            wanted = method.bytes_per_parameter(ranks)
        except ConfigError:  # a topology that such a number of ranks has none of
            continue
        assert profile.bytes_per_parameter(ranks) == pytest.approx(wanted, rel=0.01), ranks
    assert profile.bytes_per_parameter(1) == 0
    assert profile.kind == method.kind
    assert profile.warmup_steps == method.warmup_steps
    assert profile.overlaps != getattr(method, "merges_buckets", False)


def test_every_method_is_known_but_those_whose_bytes_depend_on_links_or_gradients() -> None:
    assert set(METHODS) - {name.partition("(")[0] for name in profiles()} == {"auto", "threshold"}


@pytest.mark.parametrize("name", ["two_way(4bit)", "powersgd", "onebit_adam", "distributed_lion", "noloco", "diloco"])
def test_the_table_is_what_is_found(name: str) -> None:
    stored = profiles()[name]
    found = profile_of(build(name), name)
    assert replace(found, exchange_copies=stored.exchange_copies, quality=stored.quality, options=None) == stored


def test_options_change_what_is_found() -> None:
    sparse = profile_of(build("top_k", density=0.001))
    assert sparse.bytes_per_parameter(4) == pytest.approx(
        build("top_k", density=0.001).bytes_per_parameter(4), rel=0.01
    )
    assert profile_of(build("diloco", every=50, delay=10, fragments=5)).fragments == 5


def test_a_profile_survives_its_file() -> None:
    for profile in profiles().values():
        assert Profile.from_json(profile.to_json()) == profile
