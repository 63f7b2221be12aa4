"""Residuals: nothing is lost, and a message that must not count can be taken back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from commopt.compress import BlockSign, Cast, Compressor, TensorSign
from commopt.compress.feedback import ErrorFeedback, Kept, first_bad_parameter
from commopt.wire.bucket import Blocks, Bucket, ParameterIndex

CODECS = [BlockSign(), BlockSign(8), TensorSign(), Cast()]
NUMELS = st.lists(st.one_of(st.integers(1, 40), st.just(2049)), min_size=1, max_size=4)
SEEDS = st.integers(0, 2**31)


def feedback_for(codec: Compressor, numels: list[int], ranks: int = 3) -> tuple[ErrorFeedback, tuple[Blocks, ...]]:
    tensors = [(f"p{k}", torch.zeros(n)) for k, n in enumerate(numels)]
    table = codec.table(ParameterIndex.of(tensors), ranks)
    return ErrorFeedback(codec, Kept(), table.everything), table.parts(Bucket.of(tensors)).by_owner


def draw(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("codec", CODECS, ids=repr)
@given(numels=NUMELS, seed=SEEDS)
def test_undo_takes_a_message_back_to_about_one_ulp(codec: Compressor, numels: list[int], seed: int) -> None:
    feedback, parts = feedback_for(codec, numels)
    n = sum(numels)
    for step in range(3):
        feedback.compress(draw(n, seed + step), parts)
    before, x = feedback.residual.clone(), draw(n, seed + 9)
    payloads = feedback.compress(x, parts)
    feedback.undo(x, payloads, parts)
    ulp = torch.finfo(torch.float32).eps * float(before.abs().max() + x.abs().max() + feedback.residual.abs().max())
    assert float((feedback.residual - before).abs().max()) <= 2 * ulp


@pytest.mark.parametrize("codec", CODECS, ids=repr)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_undo_leaves_blocks_alone_that_were_not_written(codec: Compressor, bad: float) -> None:
    feedback, parts = feedback_for(codec, [10, 3000, 20])
    feedback.compress(draw(3030, 1), parts)
    before, x = feedback.residual.clone(), draw(3030, 2)
    x[500] = bad
    payloads = feedback.compress(x, parts)
    feedback.undo(x, payloads, parts)
    torch.testing.assert_close(feedback.residual, before, rtol=0, atol=2e-6)
    b = next(b for blocks in parts for b in zip(blocks.homes, blocks.lengths, strict=True) if 0 <= 500 - b[0] < b[1])
    assert torch.equal(feedback.residual[b[0] : sum(b)], before[b[0] : sum(b)])


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_every_message_names_the_first_bad_parameter_of_all(codec: Compressor) -> None:
    feedback, parts = feedback_for(codec, [10, 3000, 20])
    x = draw(3030, 1)
    assert [first_bad_parameter([payload]) for payload in feedback.compress(x, parts)] == [-1] * 3
    x[3015], x[2000] = math.nan, math.inf
    payloads = feedback.compress(x, parts)
    assert [first_bad_parameter([payload]) for payload in payloads] == [1] * 3
    assert first_bad_parameter([feedback.compress(draw(3030, 2), parts)[0], payloads[0]]) == 1


@given(numels=NUMELS, seed=SEEDS)
def test_what_was_sent_and_what_is_left_add_up(numels: list[int], seed: int) -> None:
    feedback, parts = feedback_for(BlockSign(64), numels)
    n = sum(numels)
    given_in, sent = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for step in range(10):
        x, decoded = draw(n, seed + step), torch.zeros(n)
        for payload, blocks in zip(feedback.compress(x, parts), parts, strict=True):
            feedback.compressor.decompress_(payload.tensors[1:], blocks, decoded)
        given_in += x
        sent += decoded
    torch.testing.assert_close(given_in, sent + feedback.residual, rtol=0, atol=1e-5)
