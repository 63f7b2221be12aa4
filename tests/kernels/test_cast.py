"""Half precision: the fast kernels against the plain ones."""

from __future__ import annotations

import math

import pytest
import torch
from block_values import LENGTHS, SEEDS, blocks_of, draw
from hypothesis import given
from hypothesis import strategies as st

from commopt.kernels.cpu import cast
from commopt.kernels.reference import cast as plain

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@HALVES
@given(
    lengths=LENGTHS,
    seed=SEEDS,
    has_residual=st.booleans(),
    scale=st.sampled_from([1.0, 1e4, 1e-6, 1e36]),  # some of it subnormal, or beyond the dtype
    bad=st.sampled_from([None, math.nan, -math.inf]),
    alpha=st.sampled_from([1.0, 1 / 3]),
    add=st.booleans(),
)
def test_halves_are_the_plain_kernels(
    dtype: torch.dtype,
    lengths: list[int],
    seed: int,
    has_residual: bool,
    scale: float,
    bad: float | None,
    alpha: float,
    add: bool,
) -> None:
    blocks, results = blocks_of(lengths), []
    x, residual = (values * scale for values in draw(blocks, seed))
    if bad is not None:
        x[blocks.starts[0] + seed % lengths[0]] = bad
    for kernel in (cast, plain):
        codes, e = torch.full((blocks.elements,), 7.0, dtype=dtype), residual.clone()
        kernel.compress_(x, e if has_residual else None, blocks, codes)
        out, quotients = torch.linspace(-1, 1, len(x)), torch.empty_like(x, dtype=dtype)
        kernel.decompress_(codes, blocks, out, alpha=alpha, add=add)
        kernel.divide_(x, 3, quotients)
        results.append((codes, e, out, quotients, kernel.bad_blocks(codes, blocks)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.nan_to_num(7, 8, 9), other.nan_to_num(7, 8, 9))
        assert torch.equal(one.signbit() & ~one.isnan(), other.signbit() & ~other.isnan())


@HALVES
def test_every_half_and_what_lies_between_two_are_converted_as_torch_does(dtype: torch.dtype) -> None:
    """Every half, the value halfway to the next one, and their neighbours in float32."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    out = torch.empty(len(every))
    cast.decompress_(every, blocks_of([len(every)], gap=0), out, alpha=1.0, add=False)
    assert torch.equal(out.nan_to_num(7), every.float().nan_to_num(7))
    half_a_step = 2 ** (12 if dtype == torch.float16 else 15)
    bits = every.float().view(torch.int32)
    near = torch.cat([bits + k for k in (-1, 0, 1, half_a_step - 1, half_a_step, half_a_step + 1)]).view(torch.float32)
    near = torch.cat([near, torch.arange(1, 4096) * 2.0**-26])  # subnormal ones, and what lies between them
    found = torch.empty_like(near, dtype=dtype)
    cast.divide_(near, 1, found)
    is_number = ~near.isnan()
    assert torch.equal(found[is_number].view(torch.int16), near.to(dtype)[is_number].view(torch.int16))
    assert bool(found[~is_number].isnan().all())
