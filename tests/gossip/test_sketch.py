"""The estimated distance of replicas against the true one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from allocations import Allocations
from outer_rig import run_world, spread

from commopt.gossip.spread import PIECE, WIDTH, Spread, spread_of, squares
from commopt.groups import SimGroup, SimWorld


def replicas(count: int, elements: int, apart: float, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(elements, generator=generator)
    return [shared + apart * torch.randn(elements, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("apart", [1e-3, 0.1, 2.0])
@pytest.mark.parametrize("elements", [5_000, 200_003])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_the_estimate_is_near_the_true_spread(count: int, elements: int, apart: float) -> None:
    given = replicas(count, elements, apart, seed=count)
    sketches = [Spread(elements, rank).sketch(x) for rank, x in enumerate(given)]
    assert spread_of(squares(sketches)) == pytest.approx(spread(given), rel=0.15)


@pytest.mark.parametrize("elements", [1, 63, 511, 512, 513])
def test_a_model_smaller_than_the_sketch_is_measured_exactly(elements: int) -> None:
    given = replicas(3, min(elements, WIDTH), 0.5)
    sketches = [Spread(len(given[0]), rank).sketch(x) for rank, x in enumerate(given)]
    assert sketches[0].shape == (WIDTH,)
    assert spread_of(squares(sketches)) == pytest.approx(spread(given), rel=1e-5)


def test_equal_replicas_are_not_apart_and_one_alone_says_nothing() -> None:
    (x,) = replicas(1, 10_000, 0.0)
    sketch = Spread(10_000, 0).sketch(x)
    assert spread_of(squares([sketch, sketch.clone()])) == 0.0
    assert spread_of(squares([sketch])) is None
    assert spread_of(squares([])) is None
    assert spread_of(squares([torch.zeros(WIDTH)] * 2)) == 0.0
    assert spread_of(squares([sketch, torch.full((WIDTH,), float("nan"))])) is None


def test_one_large_element_counts_wherever_it_is() -> None:
    x = torch.ones(5_000)
    for place in (0, 700, 4_999):
        y = x.clone()
        y[place] += 300.0
        sketches = [Spread(5_000, rank).sketch(one) for rank, one in enumerate((x, y))]
        stacked = torch.stack(sketches)
        assert float((stacked[0] - stacked[1]).norm()) == pytest.approx(300.0, rel=1e-4)


def test_members_estimate_from_what_has_come_in() -> None:
    given = replicas(3, 20_000, 0.3)

    def rank_of(group: SimGroup) -> list[float | None]:
        measure = Spread(20_000, group.rank)
        estimates = []
        for step in (10, 20):
            assert measure.is_due(step)
            measure.begin(step)
            sketch = measure.sketch(given[group.rank])
            estimates.append(spread_of(measure.exchange(group.peers, sketch, step)))
            assert not measure.is_due(step + 9)
            group.peers.sleep(1.0)
        return estimates

    for _, second in SimWorld[Any](3).run(rank_of):
        assert second == pytest.approx(spread(given), rel=0.15)


def test_training_reports_the_spread_of_its_replicas() -> None:
    _, diaries = run_world(4, "noloco", {"every": 5}, 60, step_s=0.1)
    for diary in diaries:
        told = diary.attached.spread
        true = [spread([one.before[step] for one in diaries]) for step in (50, 55, 60)]
        assert told is not None
        assert 0.7 * min(true) < told < 1.3 * max(true)


def test_a_sketch_of_a_large_model_takes_a_pieces_memory_and_each_element_counts_once() -> None:
    x = torch.randn(2 * PIECE + 700, generator=torch.Generator().manual_seed(1))
    spread = Spread(len(x), 0)
    with Allocations() as made:
        sketch = spread.sketch(x)
    assert sum(made.nbytes) <= 6 * PIECE + 3 * 4 * WIDTH
    places = [0, 700, PIECE - 1, PIECE, 2 * PIECE + 699]
    for place in places:
        other = torch.zeros(len(x))
        other[place] = 3.0
        one = spread.sketch(other)
        assert one.nonzero().tolist() == [[place % WIDTH]]
        assert one.abs().sum() == 3.0
    signs = torch.from_numpy(np.unpackbits(spread._signs)[: len(x)].astype(np.float32)) * 2 - 1
    padded = torch.nn.functional.pad(x * signs, (0, -len(x) % WIDTH))
    torch.testing.assert_close(sketch, padded.view(-1, WIDTH).sum(0), rtol=1e-4, atol=1e-3)
