"""Counter-based random bits: reproducible, independent of layout, uniform."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from commopt.wire.noise import keys, mix, uniform


def one_key(seed: int = 0, purpose: str = "worker", rank: int = 0, count: int = 0, place: int = 0) -> int:
    return int(keys(seed, purpose, rank, np.asarray([count]), np.asarray([place]))[0])


def test_mix_is_splitmix64() -> None:
    """The first two outputs of the reference implementation with seed 1234567."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    state = np.asarray([1234567], dtype=np.uint64) + golden * np.asarray([1, 2], dtype=np.uint64)
    assert mix(state).tolist() == [6457827717110365317, 3203168211198807973]


def test_every_part_of_a_name_changes_the_key() -> None:
    names: list[Any] = [{}, {"seed": 1}, {"seed": -1}, {"purpose": "server"}, {"rank": 1}, {"count": 1}, {"place": 1}]
    assert len({one_key(**name) for name in names}) == len(names)


def test_draws_do_not_depend_on_what_is_drawn_beside_them() -> None:
    lengths = np.asarray([3, 5])
    both = uniform(keys(0, "worker", 0, np.asarray([4, 4]), np.asarray([0, 3])), lengths)
    second = uniform(keys(0, "worker", 0, np.asarray([4]), np.asarray([3])), lengths[1:])
    assert torch.equal(both[3:], second)


def test_draws_are_uniform_and_uncorrelated() -> None:
    n = 200_000
    u = uniform(keys(0, "worker", 0, np.asarray([0, 1]), np.asarray([0, 0])), np.asarray([n, n])).double().view(2, n)
    assert 0 <= float(u.min()) < 1e-4
    assert 1 - 1e-4 < float(u.max()) < 1
    assert torch.allclose(torch.histc(u[0], 16, 0, 1) / n, torch.full((16,), 1 / 16, dtype=torch.float64), atol=3e-3)
    assert abs(float(torch.corrcoef(u)[0, 1])) < 0.01
    assert abs(float(torch.corrcoef(torch.stack([u[0, 1:], u[0, :-1]]))[0, 1])) < 0.01
