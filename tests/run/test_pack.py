"""Nested state as JSON and tensors, and as one tensor of bytes: what went in comes out."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from commopt.errors import CheckpointError
from commopt.run.files import join, pack, split, unpack

MARKS = ["tensor", "tuple", "dict", "float", "bytes", "json", "t", ""]
texts = st.one_of(st.sampled_from(MARKS), st.text(max_size=4))
numbers = st.one_of(st.integers(), st.floats())
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
shapes = st.lists(st.integers(0, 3), max_size=3)
tensors = st.builds(lambda shape, dtype: torch.arange(math.prod(shape)).view(shape).to(dtype), shapes, dtypes)
keys = st.one_of(texts, st.integers(-3, 3), st.tuples(st.integers(0, 3), texts))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts, st.binary(max_size=4), tensors),
    lambda inside: st.one_of(
        st.lists(inside, max_size=3), st.lists(inside, max_size=3).map(tuple), st.dictionaries(keys, inside, max_size=3)
    ),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    """Equal, of the same types, with NaN equal to NaN and dicts in the same order."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(map(same, [*a.items()], [*b.items()]))
    return bool(a == b)


@given(values)
def test_what_is_split_is_joined_again_by_way_of_json(value: Any) -> None:
    described, found = split(value, "prefix")
    assert all(name.startswith("prefix") for name in found)
    assert same(join(json.loads(json.dumps(described, allow_nan=False)), found), value)


@given(values)
def test_what_is_packed_is_unpacked_again(value: Any) -> None:
    packed = pack(value)
    assert packed.dtype == torch.uint8
    assert packed.dim() == 1
    assert same(unpack(packed), value)


def test_tensors_that_share_memory_are_packed_each_by_itself() -> None:
    x = torch.arange(6.0)
    first, second, turned = unpack(pack([x, x[2:], x.view(2, 3).t()]))
    assert torch.equal(first, x)
    assert torch.equal(second, x[2:])
    assert torch.equal(turned, x.view(2, 3).t())
    first.zero_()
    assert second[0] == 2


def test_tensors_whose_places_read_alike_stay_apart() -> None:
    value = {"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}, "c": {1: torch.ones(2), "1": torch.zeros(2)}}
    assert same(unpack(pack(value)), value)
    assert same(join(*split(value)), value)


def test_a_tensor_that_trains_is_packed_as_its_values() -> None:
    assert not unpack(pack(torch.nn.Parameter(torch.ones(2)))).requires_grad


def test_numbers_of_numpy_become_pythons() -> None:
    found = unpack(pack({"a": np.float32(0.5), "b": np.int64(3), "c": np.bool_(True)}))
    assert same(found, {"a": 0.5, "b": 3, "c": True})


@pytest.mark.parametrize(
    ("value", "place"), [({"a": [1, print]}, "/a/1: builtin"), ({1, 2}, "this: set"), (1j, "this: c")]
)
def test_what_has_no_form_is_refused_with_its_place(value: Any, place: str) -> None:
    for refused in (lambda: split(value), lambda: pack(value)):
        with pytest.raises(CheckpointError, match=f"^{place}.* cannot be stored; use numbers, texts, lists, dicts"):
            refused()


def test_a_missing_tensor_is_named() -> None:
    described, _ = split({"a": torch.ones(1)}, "model")
    with pytest.raises(CheckpointError, match="model/a: this tensor is missing"):
        join(described, {})


@pytest.mark.parametrize("data", [b"", b"\x00" * 8, b"{}", pickle.dumps({"a": 1}), b"\xff" * 40])
def test_bytes_of_another_kind_are_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="not a packed state"):
        unpack(torch.tensor(list(data), dtype=torch.uint8))


@given(st.data())
def test_cut_off_bytes_are_refused(data: st.DataObject) -> None:
    packed = pack({"a": torch.arange(5.0), "b": [1, "two"]})
    cut = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(CheckpointError, match="not a packed state"):
        unpack(packed[:cut])
