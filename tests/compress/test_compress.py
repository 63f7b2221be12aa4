"""What every codec promises about its messages."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from block_values import KERNELS, SEEDS, blocks_in, blocks_of, compress, draw, heavy_tailed, kernels_are, sent_by
from hypothesis import given
from hypothesis import strategies as st

from commopt.compress.base import Compressor
from commopt.compress.cast import Cast
from commopt.compress.quantize import BlockFloat8, BlockInt, Natural, QSGDLevels, Ternary
from commopt.compress.sign import BlockSign, RmsSign, TensorSign
from commopt.compress.sparse import RandomK, Threshold, TopK
from commopt.errors import ConfigError
from commopt.kernels.reference.runs import first_bad
from commopt.wire.bucket import Bucket, ParameterIndex
from commopt.wire.payload import Payload

CODECS = [BlockSign(), BlockSign(8), RmsSign(64), TensorSign(), Cast(), Cast(torch.bfloat16)]
EVERY = [
    *(*CODECS, BlockInt(), BlockInt(4, 4096, stochastic=False), QSGDLevels(12)),
    *(Ternary(None), BlockFloat8(4096), Natural(4096), RandomK(density=0.5), Threshold(threshold=0.5)),
    *(TopK(density=0.05), TopK(value_bits=1), TopK(value_bits=32)),
]
NUMELS = st.lists(st.one_of(st.integers(1, 40), st.sampled_from([2048, 2049])), min_size=1, max_size=4)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
@given(numels=NUMELS, seed=SEEDS)
def test_the_residual_is_what_was_not_sent(codec: Compressor, numels: list[int], seed: int) -> None:
    blocks = blocks_in(codec, numels)
    x, residual = (heavy_tailed(sum(numels), k).clamp(-3e4, 3e4) for k in (seed, seed + 1))  # within float16
    e = residual.clone()
    sent = sent_by(codec, x, blocks, e)
    largest = float((x + residual).abs().max())
    torch.testing.assert_close(sent + e, x + residual, rtol=1e-6, atol=1e-6 * largest)


@pytest.mark.parametrize("codec", [BlockSign(), BlockSign(8), Cast(), Cast(torch.bfloat16)], ids=repr)
@given(numels=NUMELS, seed=SEEDS)
def test_block_signs_and_casts_never_leave_more_than_there_was(codec: Compressor, numels: list[int], seed: int) -> None:
    blocks = blocks_in(codec, numels)
    x, left = heavy_tailed(sum(numels), seed).clamp(-6e4, 6e4), torch.zeros(sum(numels))
    compress(codec, x, left, blocks)
    for home, length in zip(blocks.homes, blocks.lengths, strict=True):
        part, rest = x[home : home + length].double(), left[home : home + length].double()
        assert rest.norm() <= part.norm() * (1 + 1e-6)


@pytest.mark.parametrize("codec", EVERY, ids=repr)
@given(numels=NUMELS, seed=SEEDS, alpha=st.sampled_from([1.0, 0.5, 1 / 3]))
def test_a_message_counts_by_its_weight(codec: Compressor, numels: list[int], seed: int, alpha: float) -> None:
    blocks = blocks_in(codec, numels)
    codes = compress(codec, heavy_tailed(sum(numels), seed), None, blocks)
    values, weighted, total = torch.empty(sum(numels)), torch.empty(sum(numels)), torch.ones(sum(numels))
    codec.decompress_(codes, blocks, values)
    codec.decompress_(codes, blocks, weighted, alpha=alpha)
    codec.decompress_(codes, blocks, total, alpha=alpha, add=True)
    torch.testing.assert_close(weighted, alpha * values, rtol=1e-6, atol=0)
    torch.testing.assert_close(total, 1 + weighted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("codec", EVERY, ids=repr)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [5, 2055])
def test_a_bad_value_marks_its_block_whose_residual_stays_and_changes_no_other(
    codec: Compressor, bad: float, place: int
) -> None:
    """Both kernels send the same bits, of bad blocks too. Neither zeros nor ordinary values mark theirs."""
    blocks, every_code = blocks_in(codec, [5, 2051, 30], ranks=1), []
    x, residual = draw(blocks, 0, 1.0)
    x[:5] = 0.0
    bad_x = x.clone()
    bad_x[place] = bad
    for kind in KERNELS:
        left, expected_left, sent = residual.clone(), residual.clone(), torch.zeros_like(x)
        with kernels_are(kind):
            expected = sent_by(codec, x, blocks, expected_left)
            codes = compress(codec, bad_x, left, blocks)
            codec.decompress_(codes, blocks, sent)
        is_bad = codec.is_bad(codes, blocks)
        (b,) = is_bad.nonzero().flatten().tolist()
        block = slice(blocks.starts[b], blocks.starts[b] + blocks.lengths[b])
        assert block.start <= place < block.stop
        assert first_bad(is_bad, blocks) == 1
        expected[block], expected_left[block] = sent[block], residual[block]
        assert torch.equal(left, expected_left)
        torch.testing.assert_close(sent, expected, rtol=0, atol=0, equal_nan=True)
        every_code.append([code for code in codes if not code.is_floating_point()])
    assert all(torch.equal(one, other) for one, other in zip(*every_code, strict=True))


@pytest.mark.parametrize("codec", EVERY, ids=repr)
def test_a_bad_residual_makes_its_block_bad_too(codec: Compressor) -> None:
    blocks = blocks_in(codec, [8, 8], ranks=1)
    x, residual = draw(blocks, 2)
    residual[0] = math.inf
    x[8] = residual[8] = 3e38  # their sum is beyond float32
    assert codec.is_bad(compress(codec, x, residual, blocks), blocks).tolist() == [True, True]


@pytest.mark.parametrize("codec", EVERY, ids=repr)
def test_no_blocks_are_no_work(codec: Compressor) -> None:
    none = blocks_of([1]).only(np.zeros(0, np.int64))
    for kind in KERNELS:
        with kernels_are(kind):
            out = torch.ones(3)
            codec.decompress_(compress(codec, torch.ones(3), torch.ones(3), none), none, out)
            assert out.tolist() == [1, 1, 1]


def test_a_value_beyond_float16_is_bad_there_and_not_in_bfloat16() -> None:
    for dtype, first in ((torch.float16, 0), (torch.bfloat16, -1)):
        blocks = blocks_in(Cast(dtype), [3])
        codes = compress(Cast(dtype), torch.tensor([1.0, 7e4, 1.0]), None, blocks)
        assert first_bad(Cast(dtype).is_bad(codes, blocks), blocks) == first


@given(n=st.integers(1, 300), seed=SEEDS)
def test_a_cast_rounds_as_torch_does(n: int, seed: int) -> None:
    x = heavy_tailed(n, seed).clamp(-6e4, 6e4)
    assert torch.equal(sent_by(Cast(), x, blocks_in(Cast(), [n])), x.half().float())


@given(numels=NUMELS, seed=SEEDS, ranks=st.integers(1, 5))
def test_a_tensor_sign_keeps_each_parameters_norm(numels: list[int], seed: int, ranks: int) -> None:
    x = heavy_tailed(sum(numels), seed)
    sent = sent_by(TensorSign(), x, blocks_in(TensorSign(), numels, ranks))
    for part, sent_part in zip(torch.split(x, numels), torch.split(sent, numels), strict=True):
        assert float(sent_part.norm()) == pytest.approx(float(part.norm()), rel=1e-5)
        assert len(set(sent_part.abs().tolist())) == 1


@given(n=st.integers(1, 5000), seed=SEEDS)
def test_a_block_sign_sends_the_mean_magnitude_of_each_block(n: int, seed: int) -> None:
    blocks = blocks_in(BlockSign(64), [n])
    x = heavy_tailed(n, seed)
    scales, _ = compress(BlockSign(64), x, None, blocks)
    torch.testing.assert_close(scales, torch.stack([part.abs().mean() for part in torch.split(x, 64)]))


def test_a_parts_scale_is_the_whole_tensors_when_it_is_cut_for_its_servers() -> None:
    tensors = [("p", torch.zeros(100))]
    parts = TensorSign().table(ParameterIndex.of(tensors), 3).parts(Bucket.of(tensors)).by_owner
    x = heavy_tailed(100, 3)
    payloads = [Payload.allocate(TensorSign().layout(blocks)) for blocks in parts]
    TensorSign().compress_(x, None, parts, [payload.tensors for payload in payloads])
    expected = float(x.norm()) / 10
    assert [payload.tensors[0].tolist() for payload in payloads] == [[pytest.approx(expected)]] * 3


OF_BLOCKS: list[Any] = [BlockSign, Cast, BlockInt, BlockFloat8, Natural, QSGDLevels, Ternary, TopK, RandomK, Threshold]
BAD: list[tuple[list[Any], str, list[Any], str]] = [
    (OF_BLOCKS, "block_size", [0, 7, 12, -8, 256.0, True], "write a positive multiple of 8"),
    ([BlockInt], "bits", [3], "write 2, 4 or 8"),
    ([BlockInt, BlockFloat8], "stochastic", [1], "write true or false"),
    ([QSGDLevels], "levels", [0, 128, 2.0, True], "from 1 to 127"),
    ([QSGDLevels], "norm", ["l1"], "write 'l2' or 'max'"),
    ([TopK, RandomK], "density", [0, 1.5, math.nan], "write a number above 0, at most 1"),
    ([TopK, RandomK, Threshold], "value_bits", [3], "write 32, 16, 8 or 1"),
    ([Threshold], "threshold", [0], "write a number above 0"),
    ([Cast], "dtype", [torch.float32], "write torch.float16 or torch.bfloat16"),
]


@pytest.mark.parametrize(("kinds", "option", "values", "wanted"), BAD, ids=str)
def test_a_bad_option_is_named_with_its_range(kinds: list[Any], option: str, values: list[Any], wanted: str) -> None:
    for kind in kinds:
        for value in values:
            with pytest.raises(ConfigError) as caught:
                kind(**{option: value})
            assert str(caught.value).startswith(f"{option}: {value!r} is")
            assert wanted in str(caught.value)
