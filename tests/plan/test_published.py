"""Our simulation beside what others have published: simulated by Streaming DiLoCo's authors, measured by diloco-measured."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from streaming_diloco import STREAMING_DILOCO_MODELS, streaming_diloco

from commopt.errors import ConfigError
from commopt.plan.links import LinkModel
from commopt.plan.pipes import Collective
from commopt.plan.simulate import Exchange, Times, simulate

UTILISATIONS = (0.5, 0.8, 0.9, 0.95, 0.99)
METHODS = ("data parallel", "diloco", "streaming", "overlap", "fp4")
# arXiv:2501.18512, Table 4: Gbit/s needed for each utilisation, with H = 100
TABLE_4 = {
    "1B": (
        *((86.8, 152.6, 184.2, 222.3, 569.0), (1.4, 6.2, 13.3, 23.3, 86.8), (1.4, 5.2, 9.1, 16.0, 28.1)),
        *((1.4, 4.3, 6.2, 9.1, 11.0), (0.4, 0.9, 1.7, 2.0, 3.0)),
    ),
    "10B": (
        *((104.8, 222.3, 222.3, 268.3, 471.5), (1.7, 7.5, 16.0, 33.9, 104.8), (1.7, 5.2, 9.1, 13.3, 19.3)),
        *((1.7, 3.6, 5.2, 6.2, 7.5), (0.4, 0.9, 1.4, 1.4, 1.7)),
    ),
    "100B": (
        *((184.2, 323.8, 390.7, 390.7, 471.5), (3.0, 11.0, 23.3, 49.4, 184.2), (2.4, 6.2, 9.1, 11.0, 19.3)),
        *((1.7, 3.6, 4.3, 5.2, 5.2), (0.5, 0.9, 1.1, 1.1, 1.4)),
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", TABLE_4)
def test_streaming_dilocos_table_4(model: str, method: str) -> None:
    """Theirs is the next value of a grid, 10^(-1 + 4 k / 49), so up to 1.21 times what its simulation needs."""
    replica = streaming_diloco(model, method)
    found = [replica.needed_bits_per_s(utilisation) / 1e9 for utilisation in UTILISATIONS]
    ratios = np.array(found) / TABLE_4[model][METHODS.index(method)]
    assert (ratios > 1 / 1.25).all()
    assert (ratios < 1.25).all()


@pytest.mark.parametrize("model", TABLE_4)
def test_the_nodes_of_a_cluster_wait_as_their_replica_does(model: str) -> None:
    """Layers are buckets; what only the layered model has is that a forward pass begins before all of them have come."""
    for method in ("data parallel", "diloco"):
        replica = streaming_diloco(model, method)
        for rate in (replica.needed_bits_per_s(0.9), replica.needed_bits_per_s(0.5)):
            found = simulate(
                LinkModel.uniform(2, f"{rate / 1e9:.12f}gbit"),
                Exchange(
                    [Collective("all_reduce", 2 * replica.parameters)],
                    every=replica.every,
                    early=replica.backward * (1 - 1 / replica.layers),
                    buckets=replica.layers,
                ),
                steps=4 * replica.every,
                step=Times(replica.step_s),
            )
            assert found.utilisation == pytest.approx(replica.utilisation(rate), rel=0.02)


def test_a_faster_link_never_wastes_more_time() -> None:
    for model in STREAMING_DILOCO_MODELS:
        for method in METHODS:
            replica = streaming_diloco(model, method)
            shares = [replica.utilisation(rate) for rate in np.geomspace(1e8, 1e13, 20)]
            assert all(b >= a - 1e-9 for a, b in pairwise(shares))
            assert shares[-1] == pytest.approx(1, abs=0.01)
    with pytest.raises(ConfigError, match=r"utilisation: 1\.0 is out of range"):
        streaming_diloco("1B", "diloco").needed_bits_per_s(1.0)


# Adnan082/diloco-measured @07b7885: 4 x L40S, 30,846,720 float32 parameters, tc tbf; % of the time computing for H = 1, 8, 32, 128
MEASURED = {
    "50mbit": (0.07, 0.55, 2.41, 11.55),
    "200mbit": (0.32, 2.48, 10.01, 36.09),
    "1gbit": (1.74, 12.35, 36.01, 71.52),
    "5gbit": (7.76, 40.24, 68.10, 87.00),
}
# H: steps that were timed, after the warm-up. With H = 128 there is one exchange in 180 steps, so its column flatters.
TIMED = {1: 10, 8: 140, 32: 140, 128: 180}
STEP_S = 0.0262


def computing(link: str, every: int, efficiency: float = 1.0) -> float:
    exchange = Exchange([Collective("all_reduce", 4 * 30_846_720)], every=every)
    links = LinkModel.uniform(4, link)
    found = simulate(links, exchange, steps=TIMED[every], step=Times(STEP_S), efficiency=efficiency)
    return 100 * found.utilisation


def test_measured_utilisation_follows_from_one_calibrated_cell() -> None:
    """The study's own formula is off by 1.08 to 1.92; ours may be by 1.3, and is by 1.1 in most cells."""
    measured_s = 140 / 17 * STEP_S * (100 / MEASURED["1gbit"][1] - 1)  # of one exchange, of 17 in 140 steps
    efficiency = LinkModel.uniform(4, "1gbit").collective_seconds("all_reduce", 4 * 30_846_720) / measured_s
    assert 0.9 < efficiency <= 1
    gaps = []
    for link, row in MEASURED.items():
        for every, share in zip(TIMED, row, strict=True):
            ratio = computing(link, every, efficiency) / share
            gaps.append(max(ratio, 1 / ratio))
    print(gaps)
    assert max(gaps) < 1.3
    assert np.median(gaps) < 1.1
