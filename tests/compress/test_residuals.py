"""Residuals in 32, 16 and 8 bits, decayed, averaged and forgotten: against float64, and against each other."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from commopt import attach
from commopt.compress import BlockSign, Compressor
from commopt.compress.feedback import ErrorFeedback, Kept
from commopt.compress.quantize import BlockInt
from commopt.exchange.gather import GatherMean
from commopt.exchange.two_way import TwoWayMean
from commopt.groups import Group, SimWorld
from commopt.methods import EFSign
from commopt.wire import noise
from commopt.wire.bucket import Blocks, Bucket, ParameterIndex

NUMELS = [1, 700, 2049, 33]
TOTAL = sum(NUMELS)


def draw(seed: int, n: int = TOTAL) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def feedback_for(codec: Compressor, **options: Any) -> tuple[ErrorFeedback, tuple[Blocks, ...]]:
    """Two parts, as for two servers."""
    tensors = [(f"p{k}", torch.zeros(n)) for k, n in enumerate(NUMELS)]
    table = codec.table(ParameterIndex.of(tensors), 2)
    return ErrorFeedback(codec, Kept(**options), table.everything), table.parts(Bucket.of(tensors)).by_owner


def keyed(parts: tuple[Blocks, ...], step: int) -> list[Blocks]:
    return [blocks.with_keys(noise.keys(0, "test", 0, np.full(len(blocks), step), blocks.homes)) for blocks in parts]


def values(feedback: ErrorFeedback, parts: tuple[Blocks, ...]) -> np.ndarray[Any, Any]:
    """(TOTAL,) f64 the residual as it will be used, where it lies."""
    whole = np.zeros(TOTAL)
    for blocks in parts:
        ends = np.cumsum(blocks.lengths)
        for home, n, part in zip(
            blocks.homes, blocks.lengths, np.split(feedback.values(blocks).double().numpy(), ends), strict=False
        ):
            whole[home : home + n] = part
    return whole


def decoded(feedback: ErrorFeedback, payloads: Any, parts: Any) -> np.ndarray[Any, Any]:
    out = torch.zeros(TOTAL)
    for payload, blocks in zip(payloads, parts, strict=True):
        feedback.compressor.decompress_(payload.tensors[1:], blocks, out)
    return out.double().numpy()


@pytest.mark.parametrize("codec", [BlockSign(256), BlockInt(bits=4)], ids=repr)
@pytest.mark.parametrize(("decay", "average"), [(1.0, 0.0), (0.8, 0.0), (1.0, 0.8), (0.9, 0.5)])
@pytest.mark.parametrize("bits", [32, 16, 8])
def test_every_residual_is_the_equations_to_the_precision_of_its_storage(
    codec: Compressor, decay: float, average: float, bits: int
) -> None:
    feedback, parts = feedback_for(codec, bits=bits, decay=decay, average=average)
    for step in range(12):
        e, x, now = values(feedback, parts), draw(step), keyed(parts, step)
        payloads = feedback.compress(x, now)
        exact = average * e + (1 - average) * (x.double().numpy() + decay * e - decoded(feedback, payloads, now))
        found = values(feedback, parts)
        if bits == 8:  # less than one level of 127, of the block's largest
            for blocks in parts:
                for home, n in zip(blocks.homes, blocks.lengths, strict=True):
                    level = np.abs(exact[home : home + n]).max() / 127
                    assert np.abs(found - exact)[home : home + n].max() <= level * 1.001 + 1e-6
        else:
            np.testing.assert_allclose(found, exact, rtol=2**-8 if bits == 16 else 1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "options",
    [{"bits": 32, "decay": 0.8}, {"bits": 32, "average": 0.8}, {"bits": 16}, {"bits": 8}, {"bits": 8, "average": 0.8}],
)
@pytest.mark.parametrize("bad", [False, True])
def test_undo_is_exact_where_the_residual_is_not_plain(options: dict[str, Any], bad: bool) -> None:
    feedback, parts = feedback_for(BlockSign(64), **options)
    for step in range(3):
        feedback.compress(draw(step), keyed(parts, step))
    kept = (feedback.residual, feedback.scales)
    before = [x.clone() for x in kept]
    x, now = draw(9), keyed(parts, 9)
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
    """The mean of many draws of one residual is that residual: it is rounded up as often as it has to be."""
    feedback, parts = feedback_for(BlockSign(256), bits=8)
    x, total, count = draw(1), np.zeros(TOTAL), 600
    for step in range(count):
        for blocks in keyed(parts, step):
            places = torch.cat([torch.arange(h, h + n) for h, n in zip(blocks.homes, blocks.lengths, strict=True)])
            feedback.set_values(x[places], blocks)
        total += values(feedback, parts)
    error = total / count - x.double().numpy()
    for blocks in parts:
        for home, n in zip(blocks.homes, blocks.lengths, strict=True):
            block = slice(home, home + n)
            level = float(x[block].abs().max()) / 127
            assert np.abs(error[block]).max() < 5 * 0.5 * level / np.sqrt(count) + 1e-6
            assert abs(error[block].mean()) < 5 * 0.5 * level / np.sqrt(count * n) + 1e-6


def test_an_exact_number_of_levels_is_stored_as_it_is() -> None:
    feedback, parts = feedback_for(BlockSign(256), bits=8)
    x = torch.cat([torch.arange(n).remainder(255) - 127.0 for n in NUMELS])
    x[0], x[1 + 700 + 2049 :] = 0.0, torch.arange(33) * 0.0  # two blocks of zeros
    for blocks in keyed(parts, 1):
        places = torch.cat([torch.arange(h, h + n) for h, n in zip(blocks.homes, blocks.lengths, strict=True)])
        feedback.set_values(x[places], blocks)
    full = [home for blocks in parts for home, n in zip(blocks.homes, blocks.lengths, strict=True) if n == 256]
    found = values(feedback, parts)
    assert len(full) > 5
    for home in full:  # every value from -127 to 127 is in them
        np.testing.assert_allclose(found[home : home + 256], x[home : home + 256], rtol=0, atol=1e-4)
    assert not found[[0, *range(TOTAL - 33, TOTAL)]].any()


@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("kind", [GatherMean, TwoWayMean])
def test_residuals_are_forgotten_after_every_so_many_exchanges_of_their_own_parameter(kind: Any, bits: int) -> None:
    """b comes in every second exchange only. What is left after a reset is what one exchange leaves in a fresh method."""

    def work(group: Group) -> None:
        def bound(**options: Any) -> Any:
            method = kind(BlockSign(64), Kept(bits, **options))
            method.bind([("a", torch.zeros(300)), ("b", torch.zeros(100))], group)
            return method

        method = bound(reset_every=3)
        for step in range(8):
            parts = [("a", draw(step, 300)), ("b", draw(50 + step, 100))][: 1 + step % 2]
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


@pytest.mark.parametrize("kept", [Kept(16), Kept(8, decay=0.9, reset_every=4)], ids=str)
@pytest.mark.parametrize("kind", [GatherMean, TwoWayMean])
def test_resuming_is_bitwise_in_few_bits_too(kind: Any, kept: Kept) -> None:
    def work(group: Group) -> tuple[Tensor, Tensor]:
        def bound() -> Any:
            method = kind(BlockInt(bits=4), kept)
            method.bind([("a", torch.zeros(300)), ("b", torch.zeros(100))], group)
            return method

        def run(method: Any, steps: range) -> Tensor:
            for step in steps:
                bucket = Bucket.of([("a", draw(10 * step + group.rank, 300)), ("b", draw(500 + step, 100))])
                method.exchange(bucket, group)
                method.exchanges += 1
            return bucket.flat

        method = bound()
        run(method, range(5))
        again = bound()
        again.exchanges.copy_(method.exchanges)
        again.load(copy.deepcopy(method.saved()))
        return run(method, range(5, 10)), run(again, range(5, 10))

    for one, other in SimWorld[Any](3).run(work):
        assert torch.equal(one, other)


def train_on_digits(group: Group, make: Any) -> float:
    """The loss on all digits after 60 steps of SGD on an MLP."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 10))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.12)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    attach(model, make(), sgd, group=group)
    for step in range(60):
        which = torch.randint(len(x), (32,), generator=torch.Generator().manual_seed(1000 * step + group.rank))
        sgd.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(x[which]), y[which]))
        sgd.step()
    with torch.no_grad():
        return F.cross_entropy(model(x), y).item()


def test_digits_are_learnt_with_residuals_in_32_16_and_8_bits_alike() -> None:
    loss = {
        bits: SimWorld[float](4).run(lambda group: train_on_digits(group, lambda: EFSign(residual_bits=bits)))[0]  # noqa: B023
        for bits in (32, 16, 8)
    }
    assert loss[32] < 0.5  # 2.3 before
    assert max(loss[16], loss[8]) < 1.05 * loss[32], loss
