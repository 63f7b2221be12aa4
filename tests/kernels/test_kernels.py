"""The fast kernels against the plain ones."""

from __future__ import annotations

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
NONE = torch.zeros(0)  # no residual
KERNELS = pytest.mark.parametrize("kernel", [cpu, reference], ids=["numba", "plain"])


def compressed(
    kernel: Any, x: Tensor, residual: Tensor, blocks: Blocks, scales: Tensor | None = None, **how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Scales, bits and the new residual."""
    scales = torch.empty(len(blocks)) if scales is None else scales.clone()
    bits, e = torch.full((blocks.sign_bytes,), 255, dtype=torch.uint8), residual.clone()
    kernel.compress_signs_(x, e if len(e) else None, blocks, scales, bits, **how)
    return scales, bits, e


@given(LENGTHS, SEEDS, st.booleans(), st.booleans())
def test_compressing_is_the_plain_kernels(lengths: list[int], seed: int, squared: bool, has_residual: bool) -> None:
    blocks = blocks_of(lengths)
    x, residual = draw(blocks, seed, 0.0)
    given_x, before = x.clone(), residual if has_residual else NONE
    scales, bits, e = compressed(cpu, x, before, blocks, squared=squared)
    plain_scales, plain_bits, plain_e = compressed(reference, x, before, blocks, squared=squared)
    assert torch.equal(bits, plain_bits)
    torch.testing.assert_close(scales, plain_scales, rtol=1e-6, atol=0)
    torch.testing.assert_close(e, plain_e, rtol=0, atol=1e-5)
    assert torch.equal(x, given_x)


@given(LENGTHS, SEEDS, st.booleans())
def test_sums_and_packing_are_the_two_halves_of_compressing(lengths: list[int], seed: int, squared: bool) -> None:
    blocks = blocks_of(lengths)
    x, residual = draw(blocks, seed, 0.0)
    sums = torch.as_tensor(cpu.block_sums(x, residual, blocks, squared=squared))
    torch.testing.assert_close(sums, reference.block_sums(x, residual, blocks, squared=squared), rtol=1e-6, atol=0)
    halves = [compressed(kernel, x, residual, blocks, sums.float(), squared=None) for kernel in (cpu, reference)]
    assert all(torch.equal(one, other) for one, other in zip(*halves, strict=True))


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
    scales, bits, _ = compressed(kernel, x, NONE, blocks_of([10], gap=0), squared=False)
    assert bits.tolist() == [0b10110100, 0b01000000]
    assert scales.tolist() == pytest.approx([1.4])


@pytest.mark.parametrize(("squared", "large"), [(False, 1e34), (True, 1e17)])  # squares are float32 too
def test_scales_are_right_at_extreme_magnitudes(squared: bool, large: float) -> None:
    blocks = blocks_of([2048, 2048], gap=0)
    x = torch.cat([torch.full((2048,), large), torch.full((2048,), 1 / large)])
    scales, _, _ = compressed(cpu, x, NONE, blocks, squared=squared)
    assert scales.tolist() == pytest.approx([large, 1 / large], rel=1e-6, abs=0)
