"""Choosing, taking and adding elements: the fast kernels against the plain ones."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from block_values import LENGTHS, SEEDS, blocks_of, draw
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from commopt.kernels.cpu import select
from commopt.kernels.reference import select as plain
from commopt.wire.bucket import Blocks

BAD = st.sampled_from([None, math.nan, math.inf])
DENSITY = st.sampled_from([1e-3, 0.03, 0.5, 1.0])


def problem(lengths: list[int], seed: int, bad: float | None, density: float) -> tuple[Tensor, Tensor, Blocks, Any]:
    """Values, a residual, blocks of which the first may be bad, and how many of each are chosen."""
    blocks = blocks_of(lengths)
    x, residual = draw(blocks, seed)
    if bad is not None:
        x[blocks.starts[0] + seed % lengths[0]] = bad
    return x, residual, blocks, np.ceil(density * blocks.lengths).astype(np.int64)


def is_same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, but for the signs of NaNs."""
    return torch.equal(one.nan_to_num(7, 8, 9), other.nan_to_num(7, 8, 9)) and one.dtype == other.dtype


@given(lengths=LENGTHS, seed=SEEDS, bad=BAD, density=DENSITY, has_residual=st.booleans(), threshold=st.booleans())
def test_the_plain_kernels_elements_are_chosen(
    lengths: list[int], seed: int, bad: float | None, density: float, has_residual: bool, threshold: bool
) -> None:
    x, residual, blocks, ks = problem(lengths, seed, bad, density)
    results = []
    for kernel in (select, plain):
        e, counts = residual.clone(), ks.copy()
        given = e if has_residual else None
        results.append(
            (*kernel.select_(x, given, blocks, counts, 2.0 if threshold else 0.0), e, torch.from_numpy(counts))
        )
    assert all(is_same(one, other) for one, other in zip(*results, strict=True))


@given(lengths=LENGTHS, seed=SEEDS, bad=BAD, density=DENSITY, has_residual=st.booleans())
def test_elements_are_taken_and_added_as_by_the_plain_kernels(
    lengths: list[int], seed: int, bad: float | None, density: float, has_residual: bool
) -> None:
    x, residual, blocks, ks = problem(lengths, seed, bad, density)
    generator = np.random.default_rng(seed)
    places = [np.sort(generator.permutation(n)[:k]) for n, k in zip(blocks.lengths, ks, strict=True)]
    indices = torch.from_numpy(np.concatenate(places))
    results = []
    for kernel in (select, plain):
        e, out = residual.clone(), x.clone()
        values, good = kernel.take_(x, e if has_residual else None, blocks, ks, indices)
        scales, ratios = kernel.ratios(values, ks)
        kernel.add_(indices, ratios, scales, blocks.homes, ks, e, alpha=-1.0, good=good)
        kernel.add_(indices, values, scales, blocks.starts, ks, out, alpha=1 / 3)
        results.append((values, good, scales, ratios, e, out))
    assert all(is_same(one, other) for one, other in zip(*results, strict=True))
    assert results[0][1].tolist() == [bad is None] + [True] * (len(lengths) - 1)


def test_the_largest_finite_values_are_not_bad() -> None:
    """Their sum is beyond float32."""
    blocks, ks = blocks_of([4096], gap=0), np.asarray([5])
    for kernel in (select, plain):
        indices, _, good = kernel.select_(torch.full((4096,), 3e38), None, blocks, ks.copy())
        assert indices.tolist() == [0, 1, 2, 3, 4]
        assert good.tolist() == [True]
