"""Sparse codecs: the exact choice, values in few bits, and nothing lost."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from block_values import blocks_in, compress, sent_by
from hypothesis import given
from hypothesis import strategies as st
from rig import normal

from commopt.compress.base import Compressor
from commopt.compress.sparse import RandomK, Threshold, TopK
from commopt.kernels.cpu import select as cpu_select
from commopt.kernels.reference import select as reference_select
from commopt.wire.bucket import Blocks

NUMELS = st.lists(st.one_of(st.integers(1, 40), st.integers(1000, 3000)), min_size=1, max_size=4)
BITS = st.sampled_from([32, 16, 8, 1])
DENSITY = st.sampled_from([1e-3, 0.01, 0.2, 0.9, 1.0])


@given(numels=NUMELS, density=DENSITY, bits=BITS, seed=st.integers(0, 2**31))
def test_sent_and_kept_add_up_and_the_largest_are_sent(numels: list[int], density: float, bits: Any, seed: int) -> None:
    codec = TopK(density=density, value_bits=bits)
    blocks, n = blocks_in(codec, numels, 1), sum(numels)
    x, before = normal(n, seed), normal(n, seed + 1)
    residual, c = before.clone(), x + before
    decoded = sent_by(codec, x, blocks, residual)
    torch.testing.assert_close(decoded + residual, c, rtol=0, atol=1e-6)
    for a, m in zip(blocks.starts, blocks.lengths, strict=True):
        k = math.ceil(density * m - 1e-9)
        expected = np.argsort(-np.abs(c[a : a + m].numpy()), kind="stable")[:k]
        kept = np.setdiff1d(np.arange(m), expected)
        assert not decoded[a : a + m][kept].any()  # nothing else is sent
        if bits == 32:
            assert torch.equal(decoded[a : a + m][expected], c[a : a + m][expected])
    assert float(residual.norm()) <= float(c.norm()) * (1 + 1e-6)


@pytest.mark.parametrize("density", [0.001, 0.03, 0.4])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "ties", "sorted", "sparse", "rows"])
def test_a_misleading_sample_changes_nothing(kind: str, density: float) -> None:
    n = 30_000
    x = {
        "normal": normal(n, 0),
        "heavy tails": normal(n, 0) / normal(n, 1),
        "ties": normal(n, 0).mul(2).round(),
        "sorted": normal(n, 0).sort().values,
        "sparse": normal(n, 0) * (torch.arange(n) % 997 == 5),
        "rows": normal(n, 0) * (torch.arange(n) % 101 == 0),  # only what the sample sees, and then nothing else
    }[kind]
    blocks = blocks_in(TopK(density=density), [n], 1)
    ks = TopK(density=density).ks(blocks)
    fast, plain = (module.select_(x, None, blocks, ks.copy()) for module in (cpu_select, reference_select))
    assert torch.equal(fast[0], plain[0])
    assert torch.equal(fast[1], plain[1])


@pytest.mark.parametrize("bits", [32, 16, 8, 1])
def test_zeros_are_chosen_up_to_k_and_harm_nothing(bits: Any) -> None:
    codec = TopK(density=0.1, value_bits=bits)
    assert not sent_by(codec, torch.zeros(50), blocks_in(codec, [50], 1), torch.zeros(50)).any()


@pytest.mark.parametrize("bits", [32, 16, 8, 1])
def test_tiny_and_huge_values_keep_their_size(bits: Any) -> None:
    """Half precision alone would flush gradients below 6e-8 to zero, and overflow above 65,504."""
    codec, x = TopK(density=0.25, value_bits=bits), torch.tensor([0, 1.0, 0, 0, -1.0, 0, 0, 0])
    for size in (1e-12, 1e12):
        torch.testing.assert_close(sent_by(codec, x * size, blocks_in(codec, [8], 1)) / size, x)


@given(numels=NUMELS, bits=BITS, seed=st.integers(0, 2**31))
def test_a_threshold_sends_what_reaches_it(numels: list[int], bits: Any, seed: int) -> None:
    codec = Threshold(threshold=1.5, value_bits=bits)
    blocks, n = blocks_in(codec, numels, 1), sum(numels)
    x, residual = normal(n, seed), torch.zeros(n)
    decoded = sent_by(codec, x, blocks, residual)
    torch.testing.assert_close(decoded + residual, x, rtol=0, atol=1e-6)
    if bits == 32:
        assert torch.equal(decoded, torch.where(x.abs() >= 1.5, x, 0.0))
    assert not decoded[x.abs() < 1.5].any()


def random_blocks(codec: Compressor, n: int, key: int) -> Blocks:
    return blocks_in(codec, [n], 1).having(keys=np.asarray([key], dtype=np.uint64))


@given(n=st.integers(1, 3000), density=DENSITY, bits=BITS, key=st.integers(0, 2**64 - 1))
def test_random_places_are_distinct_and_nothing_is_lost(n: int, density: float, bits: Any, key: int) -> None:
    codec = RandomK(density=density, value_bits=bits)
    blocks = random_blocks(codec, n, key)
    places, _ = codec.places(blocks)
    assert (np.diff(places) > 0).all()
    assert 0 <= places[0] <= places[-1] < n
    x, residual = normal(n, 1), normal(n, 2)
    c = x + residual
    decoded = sent_by(codec, x, blocks, residual)
    torch.testing.assert_close(decoded + residual, c, rtol=0, atol=1e-6)
    assert not decoded[np.setdiff1d(np.arange(n), places)].any()


def test_every_place_is_drawn_equally_often() -> None:
    codec, n, draws = RandomK(density=0.1), 37, 4_000
    drawn = np.zeros(n)
    for key in np.random.default_rng(0).integers(0, 2**64, draws, dtype=np.uint64):
        drawn[codec.places(random_blocks(codec, n, int(key)))[0]] += 1
    k = 4  # strata of 9, 9, 9 and 10
    assert np.abs(drawn / draws - k / n).max() < 0.1 * k / n + 5 * math.sqrt(k / n / draws)


def test_unbiased_random_choice_has_the_right_mean() -> None:
    codec = RandomK(density=0.25, value_bits=32, is_unbiased=True)
    x, mean = normal(40, 0), torch.zeros(40)
    for key in range(1500):
        blocks = random_blocks(codec, 40, key * 0x9E3779B97F4A7C15 % 2**64)
        codec.decompress_(compress(codec, x, None, blocks), blocks, mean, alpha=1 / 1500, add=True)
    assert float((mean - x).abs().max()) < 5 * float(x.abs().max()) * math.sqrt(3 / 1500)


def test_places_are_found_among_2_to_the_31_elements() -> None:
    codec = RandomK(density=1e-8)
    zero = np.asarray([0])
    blocks = Blocks(zero, zero, np.asarray([2**31]), zero, zero, np.asarray([7], dtype=np.uint64))
    places, _ = codec.places(blocks)
    assert len(places) == 22
    assert (np.diff(places) > 0).all()
    assert places[-1] < 2**31
