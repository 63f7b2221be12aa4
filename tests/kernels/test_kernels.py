"""The fast kernels against the plain ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from block_values import LENGTHS, SEEDS, blocks_of, draw
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from commopt import kernels
from commopt.kernels.reference import signs as reference
from commopt.wire.bucket import Blocks

cpu = kernels.of("signs", torch.device("cpu"))
KERNELS = pytest.mark.parametrize("kernel", [cpu, reference], ids=["numba", "plain"])


def empty_codes(blocks: Blocks) -> tuple[Tensor, Tensor]:
    return torch.empty(len(blocks)), torch.full((blocks.sign_bytes,), 255, dtype=torch.uint8)


def compressed(
    kernel: Any, x: Tensor, residual: Tensor | None, blocks: Blocks, **how: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scales, bits and the new residual."""
    scales, bits = empty_codes(blocks)
    e = None if residual is None else residual.clone()
    kernel.compress_signs_(x, e, blocks, scales, bits, **how)
    return scales, bits, e


@given(LENGTHS, SEEDS, st.booleans(), st.booleans())
def test_compressing_is_the_plain_kernels(lengths: list[int], seed: int, squared: bool, has_residual: bool) -> None:
    blocks = blocks_of(lengths)
    x, residual = draw(blocks, seed, 0.0)
    given_x, before = x.clone(), residual if has_residual else None
    scales, bits, e = compressed(cpu, x, before, blocks, squared=squared)
    plain_scales, plain_bits, plain_e = compressed(reference, x, before, blocks, squared=squared)
    assert torch.equal(bits, plain_bits)
    torch.testing.assert_close(scales, plain_scales, rtol=1e-6, atol=0)
    if e is not None:
        torch.testing.assert_close(e, plain_e, rtol=0, atol=1e-5)
    assert torch.equal(x, given_x)


@given(LENGTHS, SEEDS, st.booleans())
def test_sums_and_packing_are_the_two_halves_of_compressing(lengths: list[int], seed: int, squared: bool) -> None:
    blocks = blocks_of(lengths)
    x, residual = draw(blocks, seed, 0.0)
    sums = torch.as_tensor(cpu.block_sums(x, residual, blocks, squared=squared))
    torch.testing.assert_close(sums, reference.block_sums(x, residual, blocks, squared=squared), rtol=1e-6, atol=0)
    scales, bits = empty_codes(blocks)
    _, plain_bits = empty_codes(blocks)
    e, plain_e = residual.clone(), residual.clone()
    scales.copy_(sums)
    cpu.compress_signs_(x, e, blocks, scales, bits, squared=None)
    reference.compress_signs_(x, plain_e, blocks, scales, plain_bits, squared=None)
    assert torch.equal(bits, plain_bits)
    assert torch.equal(e, plain_e)


@given(LENGTHS, SEEDS, st.sampled_from([1.0, 0.25, 1 / 3]), st.booleans())
def test_unpacking_gives_the_plain_kernels_values(lengths: list[int], seed: int, alpha: float, add: bool) -> None:
    blocks = blocks_of(lengths)
    x, _ = draw(blocks, seed, 0.0)
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(len(blocks), generator=generator)
    bits = torch.randint(0, 256, (blocks.sign_bytes,), dtype=torch.uint8, generator=generator)
    out, plain_out = x.clone(), x.clone()
    cpu.unpack_signs_(bits, scales, blocks, out, alpha=alpha, add=add)
    reference.unpack_signs_(bits, scales, blocks, plain_out, alpha=alpha, add=add)
    torch.testing.assert_close(out, plain_out, rtol=1e-6, atol=1e-6)
    between = torch.ones(len(x), dtype=torch.bool)
    for start, length in zip(blocks.starts, blocks.lengths, strict=True):
        between[start : start + length] = False
    assert torch.equal(out[between], x[between])  # nothing beside the blocks is written


@KERNELS
def test_the_first_element_is_the_highest_bit_and_zeros_of_either_sign_are_positive(kernel: Any) -> None:
    x = torch.tensor([1.0, -1.0, 0.0, -0.0, -2.0, 3.0, -1.0, -1.0, -5.0, 0.0])
    scales, bits, _ = compressed(kernel, x, None, blocks_of([10], gap=0), squared=False)
    assert bits.tolist() == [0b10110100, 0b01000000]
    assert scales.tolist() == pytest.approx([1.4])


@KERNELS
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 13, 2050])
def test_a_bad_block_gets_scale_nan_and_keeps_its_residual(kernel: Any, squared: bool, bad: float, place: int) -> None:
    blocks = blocks_of([20, 2051, 20])
    x, residual = draw(blocks, 1, 0.0)
    x[int(blocks.starts[1]) + place] = bad
    scales, _, e = compressed(kernel, x, residual, blocks, squared=squared)
    _, _, clean_e = compressed(kernel, x.nan_to_num(0.0, 0.0, 0.0), residual, blocks, squared=squared)
    assert e is not None
    assert clean_e is not None
    home, length = int(blocks.homes[1]), int(blocks.lengths[1])
    assert scales.isnan().tolist() == [False, True, False]
    assert torch.equal(e[home : home + length], residual[home : home + length])
    clean_e[home : home + length] = residual[home : home + length]
    assert torch.equal(e, clean_e)  # the blocks around it are compressed as if nothing had happened


@pytest.mark.parametrize(("squared", "large"), [(False, 1e34), (True, 1e17)])  # squares are float32 too
def test_scales_are_right_at_extreme_magnitudes(squared: bool, large: float) -> None:
    blocks = blocks_of([2048, 2048], gap=0)
    x = torch.cat([torch.full((2048,), large), torch.full((2048,), 1 / large)])
    scales, _, _ = compressed(cpu, x, None, blocks, squared=squared)
    assert scales.tolist() == pytest.approx([large, 1 / large], rel=1e-6, abs=0)
