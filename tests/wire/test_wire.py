"""Payloads: tensors to one buffer, and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from commopt.wire.payload import Bundle, Layout, Payload, checksum, cut, in_a_row, joined, layout_bytes

DTYPES = [torch.float64, torch.int64, torch.float32, torch.int32, torch.float16, torch.bfloat16, torch.int8]
DTYPES += [torch.uint8, torch.bool]


def layouts_of(dtypes: list[torch.dtype]) -> st.SearchStrategy[Layout]:
    entries = st.lists(st.tuples(st.sampled_from(dtypes), st.integers(0, 20)), max_size=5)
    return entries.map(lambda layout: tuple(sorted(layout, key=lambda entry: -entry[0].itemsize)))


def fill(layout: Layout, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 2, (n,), generator=generator).to(dtype) for dtype, n in layout]


@given(layouts_of(DTYPES), st.integers(0, 1000))
def test_tensors_survive_the_buffer(layout: Layout, seed: int) -> None:
    tensors = fill(layout, seed)
    payload = Payload.of(*tensors)
    again = Payload(payload.buffer.clone(), layout)
    assert payload.layout == layout
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors, again.tensors, strict=True))


@given(layouts_of(DTYPES))
def test_a_payload_is_as_long_as_its_layout_says_and_padded_with_zeros(layout: Layout) -> None:
    payload = Payload.allocate(layout)
    content = sum(dtype.itemsize * n for dtype, n in layout)
    widest = max((dtype.itemsize for dtype, _ in layout), default=1)
    assert payload.nbytes == layout_bytes(layout)
    assert payload.nbytes % widest == 0
    assert 0 <= payload.nbytes - content < widest
    assert not payload.buffer[content:].any()


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6), st.integers(0, 1000))
def test_payloads_stand_one_behind_the_other(sizes: list[tuple[int, int]], seed: int) -> None:
    layouts: list[Layout] = [((torch.int32, 1), (torch.float32, n), (torch.uint8, m)) for n, m in sizes]
    payloads = [Payload.of(*fill(layout, seed + k)) for k, layout in enumerate(layouts)]
    joined = torch.cat([torch.zeros(0, dtype=torch.uint8), *(payload.buffer for payload in payloads)])
    for payload, part in zip(payloads, cut(joined, layouts), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(payload.tensors, part.tensors, strict=True))


def test_what_fills_up_a_row_is_zero_beforehand() -> None:
    for _ in range(8):
        np.full(32, 255, np.uint8)  # memory that is given out again
    layouts: list[Layout] = [((torch.int32, 1), (torch.uint8, 5)), ((torch.int32, 1), (torch.uint8, 3))]
    bundle = in_a_row(layouts, torch.device("cpu"), room=32)
    for payload in bundle:
        for x in payload.tensors:
            x.fill_(-1 if x.dtype == torch.int32 else 255)
    assert bundle.row.tolist() == [255] * 9 + [0] * 3 + [255] * 7 + [0] * 13


def test_headers_of_a_row_are_written_and_read_together() -> None:
    layouts: list[Layout] = [((torch.int32, 1), (torch.uint8, n)) for n in (5, 0, 2)]
    bundle = in_a_row(layouts, torch.device("cpu"))
    bundle.head_all_(7)
    assert [int(payload.tensors[0]) for payload in bundle] == bundle.heads.tolist() == [7, 7, 7]
    apart = [bundle[2], Payload.of(torch.tensor([3], dtype=torch.int32)), bundle[0]]
    assert Bundle.of(apart).heads.tolist() == [7, 3, 7]
    assert joined(bundle) is bundle.row
    assert joined(apart).tolist() == torch.cat([payload.buffer for payload in apart]).tolist()


def test_views_write_into_the_buffer_that_travels() -> None:
    payload = Payload.allocate(((torch.float32, 1), (torch.uint8, 3)))
    payload.tensors[0].fill_(1.0)
    payload.tensors[1].fill_(7)
    assert payload.buffer.tolist() == [0, 0, 128, 63, 7, 7, 7, 0]


def test_a_narrow_dtype_before_a_wide_one_is_refused() -> None:
    with pytest.raises(ValueError, match="widest dtype first"):
        Payload.of(torch.zeros(3, dtype=torch.uint8), torch.zeros(1))


def test_a_checksum_tells_apart_what_differs_by_one_bit() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    y, swapped = x.clone(), x.clone()
    y.view(torch.int32)[500] ^= 1
    swapped[[3, 4]] = x[[4, 3]]
    assert len({checksum(x), checksum(y), checksum(swapped), checksum(x, checksum(x))}) == 4
    assert checksum(x[500:], checksum(x[:500])) == checksum(x.clone())
