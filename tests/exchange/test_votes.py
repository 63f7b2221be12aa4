"""Votes: every rank gets the sum or majority of the signs, ties and zeros take fair coins, and nothing drifts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from block_values import LENGTHS, SEEDS, blocks_of, draw
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from commopt.errors import AttachError
from commopt.exchange.vote import SignVote
from commopt.groups import LocalGroup, SimGroup, SimWorld
from commopt.kernels.cpu import votes as cpu_votes
from commopt.kernels.reference import votes as reference_votes
from commopt.kernels.reference.votes import coin_bits, count_votes, keyed
from commopt.wire import noise
from commopt.wire.bucket import Blocks, Bucket

NUMELS = [1, 7, 2049, 130, 4100]
TOTAL = sum(NUMELS)


def bits_of(row: Tensor, blocks: Blocks) -> list[Any]:
    """Each block's bits as zeros and ones, from the packed form."""
    return [
        np.unpackbits(row.numpy()[first : first + (n + 7) // 8])[:n]
        for first, n in zip(blocks.byte_starts, blocks.lengths, strict=True)
    ]


# --- kernels


def tossed(blocks: Blocks, seed: int, flips: Sequence[int] = (0,)) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """What coins are drawn by: a word for each parameter, or one for all, and whether they are turned over."""
    return noise.words(seed, "test", 0, np.arange(len(flips))), np.asarray(flips, np.uint8)


@given(LENGTHS, SEEDS, st.booleans(), st.booleans())
def test_a_bit_is_the_sign_and_for_zero_the_coin(lengths: list[int], seed: int, is_one: bool, is_blended: bool) -> None:
    blocks, rng = blocks_of(lengths), np.random.default_rng(seed)
    parts = [blocks.only(np.flatnonzero(np.arange(len(blocks)) % 3 == rank)) for rank in range(3)]
    (x, state), drawn = (
        draw(blocks, seed),
        tossed(blocks, seed, rng.choice([0, 255], 1 if is_one else len(blocks)).tolist()),
    )
    blended = {"state": state, "weight": 0.3} if is_blended else {}
    before, at = x.clone(), tuple(np.cumsum([0, *(4 + own.sign_bytes for own in parts)]).tolist())
    rows = [torch.zeros(at[-1], dtype=torch.uint8) for _ in range(2)]
    for kernel, row in zip((cpu_votes, reference_votes), rows, strict=True):
        assert kernel.pack_votes_(x, parts, drawn, row, at[:-1], **blended) == -1
    assert torch.equal(*rows)
    assert torch.equal(x, before)
    for own, first in zip(parts, at, strict=False):
        coins = torch.full((own.sign_bytes,), 255, dtype=torch.uint8)
        cpu_votes.toss_(own, drawn, coins)
        assert torch.equal(coins, coin_bits(*keyed(own, drawn), torch.device("cpu")))
        signs, packed = bits_of(rows[0][first + 4 :], own), bits_of(coins, own)
        for start, home, n, bits, coin in zip(own.starts, own.homes, own.lengths, signs, packed, strict=True):
            given = x[start : start + n]
            values = (state[home : home + n].lerp(given, 0.3) if is_blended else given).numpy()
            assert np.array_equal(bits, np.where(values == 0, coin, values > 0))


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kernel", [cpu_votes, reference_votes])
def test_only_the_block_with_a_bad_value_is_named(kernel: Any, bad: float) -> None:
    blocks = blocks_of([5, 2048, 9])
    for b in range(3):
        for i in (0, int(blocks.lengths[b]) - 1):
            x, _ = draw(blocks, 0)
            x[[int(blocks.starts[k]) - 1 for k in range(3)]] = bad  # between the blocks
            x[int(blocks.starts[b]) + i] = bad
            row = torch.empty(4 + blocks.sign_bytes, dtype=torch.uint8)
            assert kernel.pack_votes_(x, [blocks], tossed(blocks, 0), row, (0,)) == blocks.parameters[b]


def test_the_largest_finite_and_the_smallest_number_have_signs_like_others() -> None:
    blocks = blocks_of([4])
    x = torch.zeros(12)
    start = int(blocks.starts[0])
    x[start : start + 4] = torch.tensor([3.4028235e38, -3.4028235e38, 1e-45, -1e-45])
    for kernel in (cpu_votes, reference_votes):
        row = torch.empty(5, dtype=torch.uint8)
        assert kernel.pack_votes_(x, [blocks], tossed(blocks, 0), row, (0,)) == -1
        assert row[4].item() == 0b10100000


@given(st.integers(1, 70), SEEDS)
def test_counting_adds_bits_and_leaves_the_rows_alone(ranks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, 256, (9,), dtype=torch.uint8, generator=generator) for _ in range(ranks)]
    kept = torch.stack(rows)
    start = seed % 5
    width = (ranks + start).bit_length()
    planes = torch.stack(count_votes(rows, width, start)).numpy()
    counts = (np.unpackbits(planes, axis=1).astype(int) << np.arange(width)[:, None]).sum(0)
    assert np.array_equal(counts, start + np.unpackbits(kept.numpy(), axis=1).sum(0))
    assert torch.equal(torch.stack(rows), kept)


@pytest.mark.parametrize("ranks", [*range(1, 66), 127, 128, 255])
def test_a_count_travels_in_as_few_bits_as_hold_it(ranks: int) -> None:
    blocks = blocks_of([ranks + 1, 300])
    width = math.ceil(math.log2(ranks + 1))
    generator = torch.Generator().manual_seed(ranks)
    counts = torch.randint(0, ranks + 1, (8 * blocks.sign_bytes,), generator=generator)
    counts[: ranks + 1] = torch.arange(ranks + 1)
    planes = torch.from_numpy(np.concatenate([np.packbits((counts.numpy() >> k) & 1) for k in range(width)]))
    values = torch.randn(2**width, generator=generator)
    for kernel in (cpu_votes, reference_votes):
        out = torch.full((int(blocks.starts[-1]) + 305,), 7.0)
        expected, also = out.clone(), torch.zeros_like(out)
        state = torch.randn(blocks.elements, generator=torch.Generator().manual_seed(1))
        followed = state.clone()
        kernel.unpack_counts_(planes, (0,), width, [blocks], values, out, also, followed, 0.25)
        for start, home, n, first in zip(blocks.starts, blocks.homes, blocks.lengths, blocks.byte_starts, strict=True):
            expected[start : start + n] = values[counts[8 * first : 8 * first + n]]
            state[home : home + n].lerp_(torch.full((n,), 7.0), 0.25)
            assert torch.equal(also[start : start + n], out[start : start + n])
        assert torch.equal(out, expected)
        assert torch.equal(followed, state)


def test_coins_are_fair_and_do_not_depend_on_what_is_drawn_beside_them() -> None:
    n = 40_000
    keys = noise.keys(0, "tie", 0, np.asarray([0, 1, 2]), np.asarray([0, 0, n]))
    index = np.arange(3)
    blocks = Blocks(index * n, index * n, np.full(3, n), index, index, keys)
    up, cpu = np.zeros(3, np.uint8), torch.device("cpu")
    coins = np.stack(bits_of(coin_bits(blocks, up, cpu), blocks)).astype(float)
    assert np.abs(coins.mean(1) - 0.5).max() < 4 * 0.5 / math.sqrt(n)
    assert np.abs(np.corrcoef(coins) - np.eye(3)).max() < 4 / math.sqrt(n)
    neighbours = [np.corrcoef(coins[0, lag:], coins[0, :-lag])[0, 1] for lag in (1, 7, 8, 63, 64)]
    assert np.abs(neighbours).max() < 4 / math.sqrt(n)
    alone = blocks.only(np.asarray([1]))
    assert np.array_equal(bits_of(coin_bits(alone, up[:1], cpu), alone)[0], coins[1])
    turned = np.stack(bits_of(coin_bits(blocks, up + np.uint8(255), cpu), blocks))
    assert np.array_equal(turned, 1 - coins)


# --- the exchange


def named(flat: Tensor) -> list[tuple[str, Tensor]]:
    return [(f"p{k}", x) for k, x in enumerate(torch.split(flat, NUMELS))]


def votes_of(
    ranks: int, kind: str, values: Callable[[int, int], Tensor], exchanges: int = 1, seed: int = 0
) -> list[list[tuple[Tensor, str | None]]]:
    """[rank][exchange] (result, void) of voting on values(rank, exchange), each of TOTAL elements in five parameters."""

    def work(group: SimGroup) -> list[tuple[Tensor, str | None]]:
        method = SignVote(is_majority=kind == "majority", seed=seed)
        method.bind(named(torch.zeros(TOTAL)), group)
        results = []
        for step in range(exchanges):
            bucket = Bucket.of(named(values(group.rank, step)))
            method.exchange(bucket, group)
            method.exchanges += bucket.void is None
            results.append((bucket.flat, bucket.void))
        return results

    return SimWorld[Any](ranks).run(work)


def noise_of(rank: int, step: int) -> Tensor:
    return torch.randn(TOTAL, generator=torch.Generator().manual_seed(1000 * rank + step))


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 9, 17])
def test_a_vote_is_numpys_on_every_rank(ranks: int) -> None:
    total = sum(np.sign(noise_of(rank, 0).numpy()) for rank in range(ranks))
    for [(result, void)] in votes_of(ranks, "average", noise_of):
        assert void is None
        assert np.array_equal(result.numpy(), (total / ranks).astype(np.float32))
    majority = votes_of(ranks, "majority", noise_of)
    for [(result, void)] in majority:
        assert void is None
        assert np.array_equal(result.numpy()[total != 0], np.sign(total)[total != 0])
        assert torch.equal(result.abs(), torch.ones(TOTAL))
        assert torch.equal(result, majority[0][0][0])


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ties_take_a_fair_coin_that_all_ranks_share(ranks: int) -> None:
    def split(rank: int, step: int) -> Tensor:
        return torch.full((TOTAL,), 1.0 if rank < ranks // 2 else -1.0)

    tosses = torch.cat([torch.stack([one[0] for one in votes_of(ranks, "majority", split, 4, s)[0]]) for s in (0, 1)])
    for step, (toss, _) in enumerate(votes_of(ranks, "majority", split, 4)[-1]):
        assert torch.equal(toss, tosses[step])
    assert tosses[::2].numel() > 10_000
    assert float(tosses[::2].mean().abs()) < 4 / math.sqrt(tosses[::2].numel())
    assert torch.equal(tosses[1::2], -tosses[::2])  # every second toss is the opposite
    correlation = torch.corrcoef(tosses[::2]) - torch.eye(4)  # of exchanges 0 and 2, with two seeds
    assert float(correlation.abs().max()) < 4 / math.sqrt(TOTAL)


@pytest.mark.parametrize("kind", ["majority", "average"])
@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_an_element_without_any_opinion_stays_within_one_step(ranks: int, kind: str) -> None:
    def nothing(rank: int, step: int) -> Tensor:
        x = noise_of(rank, step)
        x[::2] = -0.0 if (rank + step) % 2 else 0.0
        return x

    results = votes_of(ranks, kind, nothing, 21)
    moved = torch.stack([one[0] for one in results[0]]).cumsum(0)[:, ::2]
    assert 1 / ranks <= float(moved.abs().max()) <= 1.0
    assert float(moved[-1].mean().abs()) <= 4 / math.sqrt(TOTAL / 2)  # and not all to one side
    assert not bool(moved[1::2].any())
    assert all(torch.equal(one[-1][0], results[0][-1][0]) for one in results)


@pytest.mark.parametrize(
    ("ranks", "live", "heard"),
    [(2, 0, 1 / 2), (2, 1, 1 / 2), (3, 0, 1 / 2), (3, 1, 1 / 2), (4, 3, 3 / 8), (5, 2, 3 / 8)],
)
def test_one_rank_with_an_opinion_among_zeros_is_heard(ranks: int, live: int, heard: float) -> None:
    """A majority then is a walk of N - 1 fair steps from 1, and of one more where it ends at 0."""

    def one_voice(rank: int, step: int) -> Tensor:
        return torch.ones(TOTAL) if rank == live else torch.zeros(TOTAL)

    for kind, expected in (("majority", heard), ("average", 1 / ranks)):
        results = torch.stack([one[0] for one in votes_of(ranks, kind, one_voice, 7)[0]])[::2]
        assert float(results.mean()) == pytest.approx(expected, abs=4 / math.sqrt(results.numel()))


@pytest.mark.parametrize("kind", ["majority", "average"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_value_on_one_rank_voids_the_vote_on_all_and_changes_nothing(kind: str, bad: float) -> None:
    def spoilt(rank: int, step: int) -> Tensor:
        x = noise_of(rank, step)
        if step == 1 and rank == 1:
            x[[5, TOTAL - 1]] = bad  # in p1 and p4
        return x

    def good(rank: int, step: int) -> Tensor:
        return noise_of(rank, (0, 2)[step])

    spoilt_runs, good_runs = votes_of(4, kind, spoilt, 3), votes_of(4, kind, good, 2)
    for rank, (run, other) in enumerate(zip(spoilt_runs, good_runs, strict=True)):
        assert [void for _, void in run] == [None, "p1", None]
        assert torch.equal(run[1][0].nan_to_num(7.0, 7.0), spoilt(rank, 1).nan_to_num(7.0, 7.0))
        assert torch.equal(run[2][0], other[1][0])  # the coins too: a void exchange is none


def test_buckets_and_their_order_do_not_matter() -> None:
    def zeros_and_ties(group: SimGroup) -> list[Tensor]:
        x = noise_of(group.rank, 0).sign() * (noise_of(group.rank, 1) > 0)
        parts = named(x)
        results = []
        for layout in ([[0, 1, 2, 3, 4]], [[4, 3], [2], [1, 0]]):
            method = SignVote(is_majority=True)
            method.bind(named(torch.zeros(TOTAL)), group)
            buckets = [Bucket.of([parts[k] for k in names]) for names in layout]
            for bucket in buckets:
                method.exchange(bucket, group)
            views = dict(view for bucket in buckets for view in bucket.views())
            results.append(torch.cat([views[f"p{k}"] for k in range(5)]))
        return results

    for one, other in SimWorld[Any](4).run(zeros_and_ties):
        assert torch.equal(one, other)


def test_one_rank_alone_takes_the_sign_and_sends_nothing() -> None:
    group = LocalGroup()
    for kind in ("majority", "average"):
        method = SignVote(is_majority=kind == "majority")
        method.bind(named(torch.zeros(TOTAL)), group)
        x = noise_of(0, 0)
        x[3] = 0.0
        bucket = Bucket.of(named(x))
        method.exchange(bucket, group)
        assert torch.equal(bucket.flat, x.sign())
        x[9] = math.nan
        bucket = Bucket.of(named(x))
        method.exchange(bucket, group)
        assert bucket.void == "p2"
        assert torch.equal(bucket.flat.nan_to_num(7.0), x.nan_to_num(7.0))
    assert group.traffic.payload_bytes == 0


def test_more_ranks_than_a_byte_counts_take_the_majority() -> None:
    group = SimWorld[Any](256)
    with pytest.raises(AttachError, match=r"vote: 'average' counts up to 255 ranks, not 256; write 'majority'"):
        SignVote(is_majority=False).bind(named(torch.zeros(TOTAL)), SimGroup(group, 0))
    SignVote(is_majority=True).bind(named(torch.zeros(TOTAL)), SimGroup(group, 0))
