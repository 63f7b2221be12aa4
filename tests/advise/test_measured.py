"""What the model makes of a probe's numbers."""

from __future__ import annotations

import pytest
from probe_file import probe_file

from commopt.advise.measured import at_rate, profiles_in, settings_of
from commopt.plan.model import predict
from commopt.plan.probe import Probe
from commopt.plan.profile import Phase, profiles

# 10 MB/s: a call takes 2 ms beside its bytes; codecs 1 us an element
CALLS = [[1000, 0.002, 0.0], [1_001_000, 0.102, 0.0]]
FOUND = probe_file(
    CALLS,
    {
        "dense": {"exchange": [[1000, 0.0], [101_000, 0.0]], "step": [[1000, 0.0], [101_000, 0.01]]},
        "onebit_adam": {"exchange": [[1000, 0.0], [101_000, 0.1]], "step": [[1000, 0.0], [101_000, 0.03]]},
    },
    cores_per_rank=2.0,
    profiles={"dense": {"name": "dense", "kind": "gradient", "phases": [{"operation": "all_reduce", "constant": 2.0}]}},
)


def test_a_step_is_made_of_what_was_measured() -> None:
    settings = settings_of(Probe.model_validate(FOUND), 1.0, (1_000_000,))
    dense, onebit = (predict(profiles()[name], settings["likely"]) for name in ("dense", "onebit_adam"))
    assert dense.step_s == pytest.approx(1.0 + 0.002 + (4e6 - 1000) / 10e6)
    phases_s = 0.004 + (0.127e6 + 0.0635e6 - 2000) / 10e6
    assert onebit.network_s == pytest.approx(phases_s, rel=0.01)
    assert onebit.codec_s == pytest.approx(1.0, rel=0.01)
    more_s = 0.2  # its step takes 0.02 s per 100,000 more than AdamW's
    assert onebit.step_s == pytest.approx(1.0 + more_s + 1.0 + phases_s, rel=0.01)


def test_limits_lie_on_both_sides() -> None:
    settings = settings_of(Probe.model_validate(FOUND), 1.0, (1_000_000,))
    low, likely, high = (predict(profiles()["dense"], settings[key]).step_s for key in ("low", "likely", "high"))
    assert low < likely < high


def test_the_scripts_own_parameters_decide_what_is_sent() -> None:
    dense, fp16 = profiles_in(Probe.model_validate(FOUND), [profiles()["dense"], profiles()["fp16"]])
    assert dense.phases == (Phase("all_reduce", 2.0),)
    assert fp16 == profiles()["fp16"]


def test_another_rate_changes_what_bytes_take_and_not_the_call() -> None:
    probe = Probe.model_validate(FOUND)
    setting = at_rate(probe, settings_of(probe, 1.0, (1_000_000,))["likely"])
    for factor in (0.1, 1.0, 10.0):
        seconds = setting(10e6 * factor).transport.seconds["all_reduce"]
        assert seconds(1000) == pytest.approx(0.002)
        assert seconds(1_001_000) == pytest.approx(0.002 + 0.1 / factor)
