"""Residuals in 32, 16 and 8 bits, undone, decayed, averaged and reset: against float64, and each other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rig import normal
from torch import Tensor

from commopt.compress.base import Compressor
from commopt.compress.cast import Cast
from commopt.compress.feedback import ErrorFeedback, Kept, first_bad_parameter
from commopt.compress.quantize import BlockFloat8, BlockInt, Natural, QSGDLevels, Ternary
from commopt.compress.sign import BlockSign, TensorSign
from commopt.exchange.gather import GatherMean
from commopt.exchange.two_way import TwoWayMean
from commopt.groups import Group, SimWorld
from commopt.wire import noise
from commopt.wire.bucket import Blocks, Bucket, ParameterIndex

NUMELS = [1, 700, 2049, 33]
TOTAL = sum(NUMELS)
CODECS = [BlockSign(), BlockSign(8), TensorSign(), Cast(), Ternary(256)]
UNBIASED = [
    QSGDLevels(), QSGDLevels(1, norm="max"), Ternary(), Ternary(None), BlockInt(2), BlockInt(4, 2048), BlockFloat8(), Natural(),
]  # fmt: skip
ANY_NUMELS = st.lists(st.one_of(st.integers(1, 40), st.just(2049)), min_size=1, max_size=4)


def feedback_for(
    codec: Compressor, numels: list[int] = NUMELS, **options: Any
) -> tuple[ErrorFeedback, tuple[Blocks, ...]]:
    """Three parts, as for three servers."""
    tensors = [(f"p{k}", torch.zeros(n)) for k, n in enumerate(numels)]
    table = codec.table(ParameterIndex.of(tensors), 3)
    return ErrorFeedback(codec, Kept(**options), table.everything), table.parts(Bucket.of(tensors)).by_owner


def places(parts: tuple[Blocks, ...] | list[Blocks]) -> list[slice]:
    """Where each block lies in the residual."""
    homes = [pair for blocks in parts for pair in zip(blocks.homes, blocks.lengths, strict=True)]
    return [slice(int(home), int(home + n)) for home, n in homes]


def keyed(parts: tuple[Blocks, ...], step: int) -> list[Blocks]:
    return [blocks.having(keys=noise.keys(0, "test", 0, np.full(len(blocks), step), blocks.homes)) for blocks in parts]


def values(feedback: ErrorFeedback, parts: tuple[Blocks, ...]) -> np.ndarray[Any, Any]:
    """(TOTAL,) f64 the residual as the next message uses it."""
    whole = np.zeros(TOTAL)
    for blocks in parts:
        each = torch.split(feedback.values(blocks).double(), blocks.lengths.tolist())
        for place, part in zip(places([blocks]), each, strict=True):
            whole[place] = part.numpy()
    return whole


def set_values(feedback: ErrorFeedback, parts: tuple[Blocks, ...], x: Tensor, step: int) -> None:
    for blocks in keyed(parts, step):
        feedback.set_values(torch.cat([x[place] for place in places([blocks])]), blocks)


def decoded(feedback: ErrorFeedback, payloads: Any, parts: Any) -> np.ndarray[Any, Any]:
    out = torch.zeros(TOTAL)
    for payload, blocks in zip(payloads, parts, strict=True):
        feedback.compressor.decompress_(payload.tensors[1:], blocks, out)
    return out.double().numpy()


@pytest.mark.parametrize("codec", CODECS, ids=repr)
@given(numels=ANY_NUMELS, seed=st.integers(0, 2**31), bad=st.sampled_from([0.0, math.nan, math.inf]))
def test_undo_takes_a_message_back_to_about_one_ulp(
    codec: Compressor, numels: list[int], seed: int, bad: float
) -> None:
    """And leaves a block alone that was not written."""
    feedback, parts = feedback_for(codec, numels)
    n, at = sum(numels), sum(numels) // 2
    for step in range(3):
        feedback.compress(normal(n, seed + step), parts)
    before, x = feedback.residual.clone(), normal(n, seed + 9)
    ulp = torch.finfo(torch.float32).eps * float(before.abs().max() + x.abs().max())
    x[at] = bad
    payloads = feedback.compress(x, parts)
    ulp += torch.finfo(torch.float32).eps * float(feedback.residual.abs().max())
    feedback.undo(x, payloads, parts)
    assert float((feedback.residual - before).abs().max()) <= 2 * ulp
    block = next(place for place in places(parts) if place.start <= at < place.stop)
    assert math.isfinite(bad) or torch.equal(feedback.residual[block], before[block])


@pytest.mark.parametrize("codec", UNBIASED, ids=repr)
def test_no_residual_grows_without_bound_however_coarse_the_codec(codec: Compressor) -> None:
    feedback, parts = feedback_for(codec)
    sent = np.zeros(TOTAL)
    for step in range(60):
        now = keyed(parts, step)
        sent += decoded(feedback, feedback.compress(normal(TOTAL, 0) ** 3, now), now)
    whole = 60 * (normal(TOTAL, 0) ** 3).double().numpy()
    np.testing.assert_allclose(sent + values(feedback, parts), whole, atol=1e-3)  # nothing is lost
    assert np.linalg.norm(values(feedback, parts)) < 0.3 * np.linalg.norm(whole)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_every_message_names_the_first_bad_parameter_of_all(codec: Compressor) -> None:
    feedback, parts = feedback_for(codec, [10, 3000, 20])
    x = normal(3030, 1)
    assert [first_bad_parameter([payload]) for payload in feedback.compress(x, parts)] == [-1] * 3
    x[3015], x[2000] = math.nan, math.inf
    payloads = feedback.compress(x, parts)
    assert [first_bad_parameter([payload]) for payload in payloads] == [1] * 3
    assert first_bad_parameter([feedback.compress(normal(3030, 2), parts)[0], payloads[0]]) == 1


@pytest.mark.parametrize("codec", [BlockSign(256), BlockInt(bits=4)], ids=repr)
@pytest.mark.parametrize(("decay", "average"), [(1.0, 0.0), (0.8, 0.0), (1.0, 0.8), (0.9, 0.5)])
@pytest.mark.parametrize("bits", [32, 16, 8])
def test_every_residual_is_the_equations_to_the_precision_of_its_storage(
    codec: Compressor, decay: float, average: float, bits: int
) -> None:
    feedback, parts = feedback_for(codec, bits=bits, decay=decay, average=average)
    for step in range(12):
        e, x, now = values(feedback, parts), normal(TOTAL, step), keyed(parts, step)
        payloads = feedback.compress(x, now)
        exact = average * e + (1 - average) * (x.double().numpy() + decay * e - decoded(feedback, payloads, now))
        found = values(feedback, parts)
        if bits == 8:  # less than one level of 127, of the block's largest
            for place in places(parts):
                level = np.abs(exact[place]).max() / 127
                assert np.abs(found - exact)[place].max() <= level * 1.001 + 1e-6
        else:
            np.testing.assert_allclose(found, exact, rtol=2**-8 if bits == 16 else 1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "options",
    [{"bits": 32, "decay": 0.8}, {"bits": 32, "average": 0.8}, {"bits": 16}, {"bits": 8}, {"bits": 8, "average": 0.8}],
)
@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("codec", [BlockSign(64), BlockInt(bits=4)], ids=repr)
def test_undo_is_exact_where_the_residual_is_not_plain(codec: Compressor, options: dict[str, Any], bad: bool) -> None:
    feedback, parts = feedback_for(codec, **options)
    for step in range(3):
        feedback.compress(normal(TOTAL, step), keyed(parts, step))
    kept = (feedback.residual, feedback.scales)
    before = [x.clone() for x in kept]
    x, now = normal(TOTAL, 9), keyed(parts, 9)
    if bad:
        x[900] = torch.nan
    payloads = feedback.compress(x, now)
    assert any(not torch.equal(x, y) for x, y in zip(before, kept, strict=True))
    feedback.undo(x, payloads, now)
    assert all(torch.equal(x, y) for x, y in zip(before, kept, strict=True))


@pytest.mark.parametrize(("bits", "bytes_each"), [(32, 4), (16, 2), (8, 1 + 4 / 2048)])
def test_state_takes_as_many_bytes_as_its_bits_say(bits: int, bytes_each: float) -> None:
    def work(group: Group) -> tuple[float, float]:
        method = TwoWayMean(BlockSign(), Kept(bits))
        method.bind([("x", torch.zeros(512, 512))], group)
        local = method.saved()["rank"]
        worker = sum(x.nbytes for key, x in local.items() if key.startswith("worker")) / 512**2
        return worker, sum(x.nbytes for key, x in local.items() if key.startswith("server")) / 512**2

    for worker, server in SimWorld[tuple[float, float]](4).run(work):
        assert worker == bytes_each
        assert server == bytes_each / 4


def test_storage_in_eight_bits_has_no_drift() -> None:
    """The mean of many draws of one residual is that residual: stochastic rounding is unbiased."""
    feedback, parts = feedback_for(BlockSign(256), bits=8)
    x, total, count = normal(TOTAL, 1), np.zeros(TOTAL), 200
    for step in range(count):
        set_values(feedback, parts, x, step)
        total += values(feedback, parts)
    error = total / count - x.double().numpy()
    for place in places(parts):
        level = float(x[place].abs().max()) / 127
        assert np.abs(error[place]).max() < 5 * 0.5 * level / np.sqrt(count) + 1e-6
        assert abs(error[place].mean()) < 5 * 0.5 * level / np.sqrt(count * len(error[place])) + 1e-6


def test_an_exact_number_of_levels_is_stored_as_it_is() -> None:
    feedback, parts = feedback_for(BlockSign(256), bits=8)
    x = torch.cat([torch.arange(n).remainder(255) - 127.0 for n in NUMELS])
    x[0], x[1 + 700 + 2049 :] = 0.0, torch.arange(33) * 0.0  # two blocks of zeros
    set_values(feedback, parts, x, 1)
    full = [place for place in places(parts) if place.stop - place.start == 256]
    found = values(feedback, parts)
    assert len(full) > 5
    for place in full:  # every value from -127 to 127 is in them
        np.testing.assert_allclose(found[place], x[place], rtol=0, atol=1e-4)
    assert not found[[0, *range(TOTAL - 33, TOTAL)]].any()


@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("kind", [GatherMean, TwoWayMean])
def test_residuals_are_forgotten_after_every_so_many_exchanges_of_their_own_parameter(kind: Any, bits: int) -> None:
    """b is only in every second exchange. A reset leaves what one exchange leaves in a fresh method."""

    def work(group: Group) -> None:
        def bound(**options: Any) -> Any:
            method = kind(BlockSign(64), Kept(bits, **options))
            method.bind([("a", torch.zeros(300)), ("b", torch.zeros(100))], group)
            return method

        method = bound(reset_every=3)
        for step in range(8):
            parts = [("a", normal(300, step)), ("b", normal(100, 50 + step))][: 1 + step % 2]
            for name, x in parts:
                k, fresh = method.index.position[name], bound()
                count = int(method.exchanges[k])
                fresh.exchanges[k] = count  # for the same random numbers
                method.exchange(Bucket.of([(name, x)]), group)
                method.exchanges[k] += 1
                fresh.exchange(Bucket.of([(name, x)]), group)
                same = all(
                    torch.equal(one, other)
                    for one, other in zip(method.state_views(name), fresh.state_views(name), strict=True)
                )
                assert same == (count % 3 == 0), (name, count)

    SimWorld[None](2).run(work)
