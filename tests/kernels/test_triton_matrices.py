"""The kernels of PowerSGD and DeMo by triton's interpreter: what plain torch and numba make of the same."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from commopt import build
from commopt.compress.indices import decode_all
from commopt.groups import LocalGroup
from commopt.kernels.reference.runs import places_in
from commopt.wire import noise
from commopt.wire.bucket import Blocks, Bucket
from commopt.wire.payload import Payload

pytest.importorskip("triton", reason="triton is not installed: pip install triton")
if torch.cuda.is_available():
    pytest.skip("these kernels run on the GPU itself, in tests/gpu", allow_module_level=True)

from commopt.kernels.cuda import factors
from commopt.kernels.cuda.chunks import LONGEST

SHAPES: list[tuple[int, ...]] = [(18, 33), (16, 16), (7,), (1,), (33,), (3, 2, 5), (0, 4)]
CHUNKS: dict[
    str, dict[str, int]
] = {  # sizes that nothing divides; all of a chunk; many of each; longer than a program's tile
    "few": {"chunk": 16, "top_k": 6},
    "few in 32 bits": {"chunk": 16, "top_k": 5, "value_bits": 32},
    "all of most": {"chunk": 16, "top_k": 200, "value_bits": 32},
    "many": {"chunk": 33, "top_k": 301},
    "one": {"chunk": 64, "top_k": 1},
    "long": {"chunk": 90, "top_k": 300},
}
LARGE = [(90, 91), (7,)]
ALL = pytest.mark.parametrize("case", CHUNKS)


@pytest.mark.parametrize("counts", [[3, 3], [3, 5]], ids=["one word", "a word for each parameter"])
def test_rows_get_length_one_and_zeros_are_drawn_as_on_the_host(counts: list[int]) -> None:
    """Two factors: two rows of 2,051, and two of 5, which lie elsewhere in the state."""
    lengths, parameters = np.array([2051, 2051, 5, 5]), np.array([1, 1, 0, 0])
    within, places = np.array([0, 2051, 0, 5]), np.array([7000, 7000, 40, 40])
    starts, homes = np.array([3, 2054, 4105, 4110]), np.array([20, 2071, 10, 15])
    rows = Blocks(starts, homes, lengths, parameters, within, places=places)
    q = torch.randn(4120, generator=torch.Generator().manual_seed(0))
    q[2054:4105], q[4105:4110] = 0.0, torch.tensor([1e-30, -2e-30, 3e30, 1e-45, 0.0])
    found = torch.full((4122,), 7.0)
    factors.normalise_(q, found, rows.worded(5, "powersgd", 0, np.array(counts)))

    expected = torch.full((4122,), 7.0)
    for start, home, n in zip(starts, homes, lengths, strict=True):
        row = q[start : start + n].double()
        expected[home : home + n] = row / torch.linalg.vector_norm(row)
    keys = noise.keys(5, "powersgd", 0, np.array(counts[1:]), places[:1])
    expected[2071:4122] = noise.uniform(keys, np.array([4102]))[2051:] - 0.5
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert torch.equal(found[2071:], expected[2071:])


def demo(case: str) -> tuple[Any, Bucket]:
    """The method, and a bucket that holds parameters in reverse order."""
    method: Any = build("demo", **CHUNKS[case])
    named = [(f"p{k}", torch.zeros(shape)) for k, shape in enumerate(LARGE if case == "long" else SHAPES)]
    method.bind(named, LocalGroup())
    return method, Bucket.of(named[::-1])


def values(n: int, seed: int) -> Tensor:
    """Numbers with many ties, zeros of both signs, denormals, large ones, and some halfway between two bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * torch.rand(n, generator=generator).pow(8)
    x[::3], x[1::7], x[5::11], x[2::17] = x[::3].mul(8).round() / 8, 1e-40, -0.0, -1e-42
    x[4::50] *= 1e30
    x[6::100] = 2.0**99 * (1 + 2.0**-8)
    return x


def message(method: Any, bucket: Bucket, d: Tensor) -> Payload:
    sent: Payload = method._largest(bucket.with_flat(d), *method._chunks_of(bucket))
    return sent


BAD = [
    ("few", math.nan),
    ("few in 32 bits", -math.inf),
    ("long", math.nan),
    ("few", 3.4e38),
    ("few in 32 bits", 3.4e38),
]


@pytest.mark.parametrize(("case", "bad"), [*((case, None) for case in CHUNKS), *BAD])
def test_messages_are_those_of_the_cpu(case: str, bad: float | None) -> None:
    method, bucket = demo(case)
    d = values(len(bucket.flat), 1)
    if bad is not None:
        d[dict(zip(bucket.names, bucket.starts, strict=True))["p1"] + 3] = bad
        d[-1] = bad
    expected, found = message(method, bucket, d), method._device_chunks(bucket).largest(d)
    assert found.layout == expected.layout
    if bad is None:
        assert torch.equal(found.buffer, expected.buffer)
    assert torch.equal(found.tensors[0], expected.tensors[0])  # of a bad message nothing else is read
    is_inf_there = bad is not None and not (bad == 3.4e38 and method.options.value_bits == 32)
    assert int(found.tensors[0]) == (0 if is_inf_there else -1)  # whose last element it is
    chunks = method._device_chunks(bucket)
    assert (chunks.longest > LONGEST) == (case == "long")


@ALL
def test_messages_of_all_ranks_are_added_up_in_their_order(case: str) -> None:
    method, bucket = demo(case)
    blocks, counts = method._chunks_of(bucket)
    every = [values(len(bucket.flat), seed).clamp(-1e10, 1e10) for seed in range(5)]
    payloads = [message(method, bucket, d) for d in every]
    total, rest = torch.zeros_like(every[0]), every[2].clone()
    for rank, payload in enumerate(payloads):
        _, sent, codes = payload.tensors
        places = places_in(blocks.starts, counts, decode_all(codes, blocks.lengths, counts))
        total[places] += sent.float()
        if rank == 2:
            rest[places] -= sent.float()
    found, is_damaged = method._device_chunks(bucket).add_up(payloads, 2, every[2])
    assert torch.equal(found, total)
    assert torch.equal(every[2], rest)
    assert not is_damaged.any()


def test_bytes_that_are_no_code_are_noticed_and_stay_within_bounds() -> None:
    method, bucket = demo("few")
    chunks, d = method._device_chunks(bucket), values(len(bucket.flat), 1)
    good = chunks.largest(d)
    payload = Payload.of(*good.tensors)
    for byte in (0, 255):  # no entry is there, or too many are
        payload.tensors[2].fill_(byte)
        assert bool(chunks.add_up([good, payload], 0, d.clone())[1])
    payload = Payload.of(*good.tensors)
    payload.tensors[2][2:6] = torch.tensor([255, 255, 255, 1], dtype=torch.uint8)  # indices beyond the first chunk
    assert bool(chunks.add_up([good, payload], 0, d.clone())[1])
    assert not bool(chunks.add_up([good, good], 0, d.clone())[1])


@pytest.mark.parametrize("case", ["few", "many", "one"])
def test_chunks_are_transformed_and_back_as_by_products_of_matrices(case: str) -> None:
    method, bucket = demo(case)
    chunks, n = method._device_chunks(bucket), len(bucket.flat)
    x, momentum = (torch.randn(n, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    method.state["momentum"].copy_(momentum)
    expected = bucket.with_flat(x.clone())
    method._transform_(expected)
    found = torch.empty(n)
    chunks.add_transformed(x, momentum, method.options.momentum_decay, found)
    torch.testing.assert_close(found, expected.flat, rtol=1e-5, atol=1e-5)

    total, signs, kept = x * 1e30, torch.empty(n), torch.full((n,), math.nan)
    method._keep(bucket.with_flat(found))
    bucket.flat.copy_(total / 3)
    method._put_signs_(bucket)
    chunks.put_signs(total, 3, found, kept, signs)
    assert torch.equal(kept, method.state["momentum"])
    assert float((signs != bucket.flat).float().mean()) < 1e-3
    assert set(signs.tolist()) <= {-1.0, 1.0, 0.0}
    chunks.put_signs(torch.zeros(n), 3, found, kept, signs)
    assert not signs.any()
