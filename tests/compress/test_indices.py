"""The code of ascending indices: its size, round trips, and damaged bytes."""

from __future__ import annotations

import itertools
import math
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from index_sets import corner_cases, many_blocks
from torch import Tensor

from commopt import kernels
from commopt.compress.indices import all_index_bytes, decode_all, encode_all, index_bytes
from commopt.kernels.cpu import indices as cpu_indices
from commopt.kernels.reference import indices as reference_indices
from commopt.kernels.reference.indices import MAX_N, widths_and_sizes

KERNELS = [cpu_indices, reference_indices]
SETS = st.one_of(
    st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))),
    st.integers(41, 3000).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), max_size=300))),
    st.integers(3001, MAX_N).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), max_size=20))),
)


@pytest.fixture(params=KERNELS, ids=["numba", "plain"])
def either_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The public functions, with the fast kernels and with the plain ones."""
    kernel: ModuleType = request.param
    monkeypatch.setattr(kernels, "of", lambda name, device: kernel)
    return kernel


def decode_indices(code: Tensor, n: int, k: int) -> Tensor:
    return decode_all(code, np.asarray([n]), np.asarray([k]))


def encoded(indices: list[int] | Tensor, n: int) -> Tensor:
    x = torch.as_tensor(indices, dtype=torch.int64)
    return encode_all(x, np.asarray([n]), np.asarray([len(x)]))


def entropy(n: int, k: int) -> float:
    """Bits per index: log2 of the number of sets, by Stirling's series, since lgamma cancels at large n."""
    if n <= 10**6:
        return math.log2(math.comb(n, k)) / k
    p = k / n
    in_sum = -math.log2(p) - (1 - p) / p * math.log1p(-p) / math.log(2)
    return in_sum - math.log2(2 * math.pi * k * (1 - p)) / (2 * k)


# sizes


@given(st.integers(0, MAX_N), st.data())
def test_the_size_is_the_smallest_over_all_widths_of_the_low_part(n: int, data: st.DataObject) -> None:
    k = data.draw(st.one_of(st.integers(0, n), st.integers(0, min(n, 50)), st.integers(max(n - 50, 0), n)))
    best = min(k * width + k + (n - k >> width) for width in range(45))
    assert index_bytes(n, k) == (0 if k in (0, n) else -(-best // 8))
    assert index_bytes(n, k) <= -(-n // 8)  # a bitmap


@pytest.mark.parametrize("n", [10_000, 2**31 - 1, 2**31, 2**31 + 1, 2**32 + 5, 2**40])
@pytest.mark.parametrize("density", [0.001, 0.01, 0.1, 0.25])
def test_a_code_is_within_0_6_bit_per_index_of_the_entropy(n: int, density: float) -> None:
    k = round(n * density)
    spare = 7 / k  # bits that fill the last byte
    assert 0 <= 8 * index_bytes(n, k) / k - entropy(n, k) <= 0.6 + spare


def test_one_index_of_a_thousand_costs_at_most_1_6_bytes() -> None:
    sizes = {k: index_bytes(1000 * k, k) for k in [*range(1, 2000), 10_000, 2**30]}
    too_large = {k: size for k, size in sizes.items() if size > 1.6 * k}
    for k, size in too_large.items():  # only where no code in whole bytes could do better
        assert size == math.ceil(math.log2(math.comb(1000 * k, k)) / 8)
    assert set(too_large) == {1, 3}


def test_sizes_of_many_are_the_sizes_of_each() -> None:
    ns, ks = np.asarray([5, 10**6, 2**40, 0]), np.asarray([5, 1000, 77, 0])
    assert all_index_bytes(ns, ks).tolist() == [index_bytes(int(n), int(k)) for n, k in zip(ns, ks, strict=True)]
    assert all_index_bytes(ns[:0], ks[:0]).tolist() == []


@pytest.mark.parametrize(("n", "k"), [(3, 4), (3, -1), (-1, -1), (MAX_N + 1, 1)])
def test_impossible_counts_are_refused(n: int, k: int) -> None:
    with pytest.raises(ValueError, match="0 <= k <= n"):
        index_bytes(n, k)


# round trips


def test_the_bits_are_laid_out_as_described() -> None:
    # n - k = 96 and l = 4: less i the indices are 3, 20, 20, 95; low 3, 4, 4, 15; high 0, 1, 1, 5
    code = encoded([3, 21, 22, 98], 100)
    assert code.tolist() == [0x43, 0xF4, 0b00001101, 0b1]
    assert encoded([0, 1, 2, 9], 10).tolist() == [0b111, 0b10]  # a bitmap


def test_every_small_set_comes_back_and_no_other_bytes_are_a_code(either_kernel: ModuleType) -> None:
    for n, k in [(5, 2), (8, 1), (8, 7), (9, 4), (11, 2), (6, 3), (30, 1), (60, 1)]:
        sets = list(itertools.combinations(range(n), k))
        by_code = {bytes(encoded(list(x), n).tolist()): x for x in sets}
        assert len(by_code) == len(sets)
        if index_bytes(n, k) > 1:
            for code, x in by_code.items():
                assert decode_indices(torch.tensor(list(code), dtype=torch.uint8), n, k).tolist() == list(x)
            continue
        for byte in range(256):
            code_of_byte = torch.tensor([byte], dtype=torch.uint8)
            if bytes([byte]) in by_code:
                assert decode_indices(code_of_byte, n, k).tolist() == list(by_code[bytes([byte])])
            else:
                with pytest.raises(ValueError, match="not the code of any"):
                    decode_indices(code_of_byte, n, k)


@given(SETS)
def test_any_set_comes_back_from_the_same_bytes_of_both_kernels(case: tuple[int, set[int]]) -> None:
    """Bytes beside it are neither read nor written."""
    n, chosen = case
    x = torch.tensor(sorted(chosen), dtype=torch.int64)
    size = index_bytes(n, len(x))
    around = torch.full((size + 40,), 255, dtype=torch.uint8)
    code = around[20 : 20 + size]
    ns, ks = np.asarray([n]), np.asarray([len(x)])
    widths, sizes = widths_and_sizes(ns, ks)
    assert cpu_indices.encode_(x, ns, ks, widths, sizes, code)
    assert (torch.cat([around[:20], around[20 + size :]]) == 255).all()
    plain = torch.empty_like(code)
    assert reference_indices.encode_(x, ns, ks, widths, sizes, plain)
    assert torch.equal(code, plain)
    assert torch.equal(decode_indices(code, n, len(x)), x)
    from_plain = reference_indices.decode(code, ns, ks, widths, sizes)
    assert from_plain is not None
    assert torch.equal(from_plain, x)


def test_corner_cases_come_back(either_kernel: ModuleType) -> None:
    for n, x in corner_cases():
        assert torch.equal(decode_indices(encoded(x, n), n, len(x)), x)


# many blocks


def test_many_blocks_are_the_codes_of_each_one_behind_the_other(either_kernel: ModuleType) -> None:
    x, ns, ks = many_blocks()
    out = torch.full((int(all_index_bytes(ns, ks).sum()),), 0x5A, dtype=torch.uint8)
    assert either_kernel.encode_(x, ns, ks, *widths_and_sizes(ns, ks), out)  # every byte of them
    each = [encoded(part, int(n)) for part, n in zip(torch.split(x, ks.tolist()), ns, strict=True)]
    assert torch.equal(out, torch.cat(each))
    assert torch.equal(decode_all(out, ns, ks), x)


# bad input


@pytest.mark.parametrize("indices", [[2, 1], [1, 1], [-1, 3], [3, 10], [10, 11], [-5, -4], [0, 2**62], [-(2**62), 0]])
def test_unsorted_repeated_and_outside_indices_are_refused(either_kernel: ModuleType, indices: list[int]) -> None:
    with pytest.raises(ValueError, match="ascend without repeats"):
        encoded(indices, 10)
    with pytest.raises(ValueError, match="ascend without repeats"):
        encoded([*range(8), *indices], 10)  # as many as there are: no bytes, but they must be all of them


def test_a_bad_block_among_good_ones_is_refused(either_kernel: ModuleType) -> None:
    x, ns, ks = many_blocks()
    x[17 + 2] = x[17 + 1]
    with pytest.raises(ValueError, match="ascend without repeats"):
        encode_all(x, ns, ks)


def test_tensors_of_another_length_or_type_are_refused() -> None:
    x = torch.tensor([1, 5])
    code = encoded(x, 100)
    for bad_x, k in ((x.int(), 2), (x, 3)):
        with pytest.raises(ValueError, match=r"indices: wanted \(\d,\) torch.int64, contiguous"):
            encode_all(bad_x, np.asarray([100]), np.asarray([k]))
    for bad_code in (code[:-1], code.repeat(2), code.to(torch.int8), code.repeat(2)[::2]):
        with pytest.raises(ValueError, match=r"code: wanted \(\d,\) torch.uint8, contiguous"):
            decode_indices(bad_code, 100, 2)


@given(SETS, st.data())
def test_damaged_codes_are_refused_or_are_the_code_of_what_they_decode_to(
    case: tuple[int, set[int]], data: st.DataObject
) -> None:
    """A few bits are flipped, or all bytes are random."""
    n, chosen = case
    k = len(chosen)
    code = encoded(sorted(chosen), n)
    if not len(code):
        return
    if data.draw(st.booleans()):
        code = torch.tensor(list(data.draw(st.binary(min_size=len(code), max_size=len(code)))), dtype=torch.uint8)
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            place = data.draw(st.integers(0, 8 * len(code) - 1))
            code[place // 8] ^= 1 << place % 8
    ns, ks = np.asarray([n]), np.asarray([k])
    plain = reference_indices.decode(code, ns, ks, *widths_and_sizes(ns, ks))
    try:
        x = decode_indices(code, n, k)
    except ValueError:
        assert plain is None
    else:
        assert plain is not None
        assert torch.equal(x, plain)
        assert torch.equal(encoded(x, n), code)


def test_a_damaged_block_among_good_ones_is_refused(either_kernel: ModuleType) -> None:
    x, ns, ks = many_blocks()
    sizes = all_index_bytes(ns, ks)
    out = encode_all(x, ns, ks)
    starts = np.cumsum(sizes) - sizes
    for block in np.flatnonzero(sizes):
        damaged = out.clone()
        damaged[int(starts[block] + sizes[block]) - 1] ^= 128  # a spare bit, or a one too many or too few
        with pytest.raises(ValueError, match="not the code of any"):
            decode_all(damaged, ns, ks)
