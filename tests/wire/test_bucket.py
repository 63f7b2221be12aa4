"""Which blocks a model is cut into, and who serves them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from commopt.compress.base import Compressor
from commopt.compress.sign import BlockSign, TensorSign
from commopt.wire.bucket import MOST_LAYOUTS, Bucket, ParameterIndex, kept

NUMELS = st.lists(st.one_of(st.integers(0, 40), st.sampled_from([64, 65, 2048, 2049, 5000])), min_size=1, max_size=8)
RANKS = st.integers(1, 5)
COMPRESSORS = st.sampled_from([BlockSign(8), BlockSign(64), BlockSign(), TensorSign()])


def index_of(numels: list[int]) -> ParameterIndex:
    return ParameterIndex.of((f"p{k}", torch.zeros(n)) for k, n in enumerate(numels))


@st.composite
def buckets(draw: st.DrawFn) -> tuple[ParameterIndex, list[Bucket]]:
    """A model, and its parameters in any order, in buckets of any size, as DDP may have them."""
    index = index_of(draw(NUMELS))
    order = draw(st.permutations(range(len(index.names))))
    edges = sorted({0, len(order), *draw(st.lists(st.integers(0, len(order)), max_size=3))})
    tensors = [(index.names[k], torch.zeros(index.numels[k])) for k in order]
    return index, [Bucket.of(tensors[a:z]) for a, z in itertools.pairwise(edges)]


@given(NUMELS, RANKS, COMPRESSORS)
def test_blocks_cover_every_element_once_and_never_cross_parameters(
    numels: list[int], ranks: int, compressor: Compressor
) -> None:
    index = index_of(numels)
    table = compressor.table(index, ranks)
    times_covered = np.zeros(index.total, dtype=int)
    for k, within, length in zip(table.parameters, table.offsets, table.lengths, strict=True):
        assert 0 <= within < within + length <= numels[k]
        times_covered[index.offsets[k] + within :][:length] += 1
    assert (times_covered == 1).all()
    homes: list[int] = []
    for rank in range(ranks):  # what each serves lies where the parameters lie
        at_home, served = table.at_home(rank), table.served_by(rank)
        assert at_home.lengths.tolist() == served.lengths.tolist()
        for start, length in zip(at_home.starts, at_home.lengths, strict=True):
            homes += range(int(start), int(start + length))
    assert sorted(homes) == list(range(index.total))


@given(NUMELS, RANKS)
def test_block_b_is_served_by_rank_b_mod_n(numels: list[int], ranks: int) -> None:
    table = BlockSign(64).table(index_of(numels), ranks)
    lengths = [min(64, n - a) for n in numels for a in range(0, n, 64)]
    assert table.lengths.tolist() == lengths
    assert table.owners.tolist() == [b % ranks for b in range(len(lengths))]
    assert len(set(table.groups.tolist())) == len(lengths)


@given(NUMELS, RANKS)
def test_l2_chunks_are_whole_bytes_and_chunk_j_is_served_by_rank_j(numels: list[int], ranks: int) -> None:
    table = TensorSign().table(index_of(numels), ranks)
    for k, n in enumerate(numels):
        mine = table.parameters == k
        chunk = -(-n // (8 * ranks)) * 8
        lengths = [min(chunk, n - j * chunk) for j in range(ranks) if n - j * chunk > 0]
        assert table.lengths[mine].tolist() == lengths
        assert table.owners[mine].tolist() == list(range(len(lengths)))
        assert (table.groups[mine] == k).all()


@given(buckets(), RANKS, COMPRESSORS)
def test_a_blocks_place_does_not_depend_on_the_bucket_it_is_in(
    dealt: tuple[ParameterIndex, list[Bucket]], ranks: int, compressor: Compressor
) -> None:
    index, all_buckets = dealt
    table = compressor.table(index, ranks)
    element = torch.arange(index.total)
    seen: dict[int, list[int]] = {rank: [] for rank in range(ranks)}
    for bucket in all_buckets:
        parts = table.parts(bucket)
        flat = torch.cat([index.view(element, name) for name in bucket.names])  # its values are their own homes
        whole = table.all_of(bucket)
        covered: list[int] = []
        for rank, (blocks, served) in enumerate(zip(parts.by_owner, parts.served, strict=True)):
            for b in range(len(blocks)):
                start, home, length = int(blocks.starts[b]), int(blocks.homes[b]), int(blocks.lengths[b])
                assert flat[start : start + length].tolist() == list(range(home, home + length))
                seen[rank].extend(range(int(served.homes[b]), int(served.homes[b]) + length))
                covered += range(start, start + length)
            assert blocks.lengths.tolist() == served.lengths.tolist()
            assert blocks.parameters.tolist() == served.parameters.tolist()
            assert served.starts.tolist() == [0, *np.cumsum(served.lengths)[:-1]][: len(served)]
        assert sorted(covered) == list(range(len(flat)))
        assert whole.elements == len(flat)
    for rank in range(ranks):
        assert sorted(seen[rank]) == list(range(table.served_by(rank).elements))


def test_an_index_gives_views_of_a_flat_tensor() -> None:
    index = index_of([3, 0, 2])
    flat = torch.arange(5.0)
    index.view(flat, "p2").fill_(9.0)
    assert flat.tolist() == [0, 1, 2, 9, 9]
    assert index.view(flat, "p1").numel() == 0


def test_a_bucket_copies_tensors_of_any_shape_into_one() -> None:
    x = torch.ones(2, 2)
    bucket = Bucket.of([("a", x), ("b", torch.zeros(())), ("c", torch.full((3,), 2.0))])
    bucket.flat[0] = 5.0
    assert bucket.flat.tolist() == [5, 1, 1, 1, 0, 2, 2, 2]
    assert bucket.starts == (0, 4, 5)
    assert x[0, 0] == 1


def test_what_follows_from_objects_is_made_once_and_never_taken_for_that_of_others() -> None:
    tables: dict[Any, Any] = {}
    first = object()
    made = [kept(tables, "id", [first], lambda: [id(first)]) for _ in range(2)]
    assert made[0] is made[1]
    for k in range(3 * MOST_LAYOUTS):  # of objects whose addresses would be used again, if they were not kept
        assert kept(tables, "id", [object()], lambda k=k: k) == k  # type: ignore[misc]
    assert len(tables) <= MOST_LAYOUTS + 2
