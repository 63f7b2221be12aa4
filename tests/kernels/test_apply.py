"""What the CPU's kernels do beside an exchange: steps of parameters, and blending and copying a momentum, with the bits of passes apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from commopt.kernels.cpu import apply, signs
from commopt.kernels.reference import apply as plain
from commopt.kernels.reference.apply import Lamb, Move, Root
from commopt.wire.bucket import BlockTable, Bucket, ParameterIndex
from commopt.wire.payload import Payload, in_a_row
from commopt.wire.residual import Blended

SHAPES = {"a": (3, 5), "b": (4100,), "c": (), "d": (0,), "e": (640, 500), "f": (8, 3, 2)}
INDEX = ParameterIndex(tuple(SHAPES), tuple(torch.Size(shape).numel() for shape in SHAPES.values()))
ROOT = Root(0.97, 1e-8, 0.4)
MOVES = {
    "plain": (Move(Root(1.0, 1e-8), 0.01), False, False),
    "bounded and decayed": (Move(ROOT, 0.01, 0.987), False, False),
    "decay is rounded": (Move(ROOT, 0.01, 0.987, rounds=True), False, False),
    "from elsewhere": (Move(ROOT, 0.01, 0.99), True, False),
    "with a mean": (Move(ROOT, 0.01, 0.99, 0.3), False, True),
    "with a mean of little": (Move(ROOT, 0.01, 1.0, 0.9), False, True),
}


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)) and torch.equal(one.isnan(), other.isnan())


def values(seed: int) -> Tensor:
    """Of every parameter, among them NaN, inf, denormals and zeros."""
    x = torch.randn(INDEX.total, generator=torch.Generator().manual_seed(seed)) ** 3
    x[seed + 20 : seed + 27] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-41, -1e-41, 0.0, -0.0])
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", MOVES)
def test_parameters_move_as_in_plain_torch(case: str, dtype: torch.dtype) -> None:
    how, has_start, has_mean = MOVES[case]
    results = []
    for kernel in (plain, apply):
        ps = {name: INDEX.view(values(1), name).view(shape).to(dtype) for name, shape in SHAPES.items()}
        ps["e"], ps["a"] = (ps[name].t().contiguous().t() for name in ("e", "a"))  # not contiguous
        m, v, begin, mean = values(2), values(3).square(), values(4), values(5)
        kernel.move_(ps, INDEX, m, v, how, begin if has_start else None, mean if has_mean else None)
        results.append((torch.cat([p.reshape(-1) for p in ps.values()]), mean, m, v, begin))
    assert all(map(same, *results))
    moved, mean, m, *_ = results[1]
    assert not same(moved, torch.cat([INDEX.view(values(1), name).to(dtype) for name in SHAPES]))
    assert same(mean, values(5)) != has_mean
    assert same(m, values(2))


def messages(bucket: Bucket) -> tuple[list[Payload], BlockTable]:
    """For three owners, whose blocks lie between each other."""
    table = BlockTable.cut(
        INDEX, 3, lambda numel, _: [numel] if numel < 4100 else [2048, 5, numel - 2053], shared_scale=False
    )
    every = table.parts(bucket).by_owner
    layouts = [((torch.int32, 1), (torch.float32, len(own)), (torch.uint8, own.sign_bytes)) for own in every]
    return in_a_row(layouts, torch.device("cpu")), table


@pytest.mark.parametrize("squared", [False, True], ids=["mean", "root mean square"])
@pytest.mark.parametrize("weights", [(0.1,), (0.1, 0.7)], ids=["one state", "two states"])
def test_signs_are_of_what_is_blended_while_they_are_packed(weights: tuple[float, ...], squared: bool) -> None:
    bucket = Bucket(torch.cat([values(6), values(7)]), ("e", "b", "a", "f"), (7, 320010, 324110, 324130))
    states = [(values(8 + k), weight) for k, weight in enumerate(weights)]
    blended, found, given = bucket.flat.clone(), [], bucket.flat.clone()
    places = INDEX.places(bucket.names, bucket.starts)
    for state, weight in states:
        plain.blend_(state, blended, blended, places, weight)
    for x in (blended, bucket.flat):
        payloads, table = messages(bucket)
        residual = values(30).nan_to_num(1.0, 1.0, 1.0)
        moved = residual if x is blended else Blended(residual, states=tuple(states))
        signs.compress_all_(x, moved, payloads, table.parts(bucket).by_owner, squared=squared)
        found.append((*(one for payload in payloads for one in payload.tensors[1:]), residual))
    assert all(map(same, *found))
    assert same(bucket.flat, given)
    assert any(scales.isnan().any() for scales in found[0][:-1:2])
    assert not same(found[0][-1], values(30).nan_to_num(1.0, 1.0, 1.0))


def test_what_is_decoded_goes_to_two_places_and_is_zero_where_it_is_masked() -> None:
    bucket = Bucket(torch.zeros(324200), ("e", "b", "a", "f"), (7, 320010, 324110, 324130))
    payloads, table = messages(bucket)
    parts, rng = table.parts(bucket).by_owner, np.random.default_rng(0)
    for payload in payloads:
        payload.tensors[1].copy_(torch.from_numpy(rng.random(payload.layout[1][1], np.float32)))
        payload.tensors[2].copy_(torch.from_numpy(rng.integers(0, 256, payload.layout[2][1], np.uint8)))
    mask = torch.from_numpy(rng.random(INDEX.total) < 0.7)
    whole, found, also = bucket.flat.clone(), bucket.flat.clone(), torch.full((INDEX.total,), 3.0)
    signs.decompress_all_(payloads, parts, whole, alpha=1.0, add=False)
    signs.decompress_all_(payloads, parts, found, alpha=1.0, add=False, also=also, mask=mask)
    for name, start in zip(bucket.names, bucket.starts, strict=True):
        x, y = (flat[start : start + INDEX.size(name)] for flat in (whole, found))
        assert torch.equal(y, torch.where(INDEX.view(mask, name), x, 0.0))
        assert torch.equal(INDEX.view(also, name), y)
        assert bool((x != 0).all())
    assert set(INDEX.view(also, "c").tolist()) == {3.0}


@pytest.mark.parametrize("seed", range(3))
def test_a_fresh_variance_follows_momenta_as_in_plain_torch(seed: int) -> None:
    results = []
    for kernel in (plain, apply):
        flats = values(seed), values(seed + 3), values(seed + 6).square()
        kernel.freshen_(*([INDEX.view(flat, name) for name in SHAPES] for flat in flats), 0.9, 0.98)
        results.append(flats)
    assert all(map(same, *results))
    assert same(results[1][0], results[1][1])
    assert not same(results[1][2], values(seed + 6).square())


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("lacking", [1.0, 0.97])
def test_directions_of_lamb_are_those_of_plain_torch(
    decay: float, is_frozen: bool, is_masked: bool, lacking: float
) -> None:
    how = Lamb(
        is_frozen, Root(lacking, 1e-6, 0.4), 1 / lacking, decay, 0.1, (0.01, 10.0), 0.9, (0.5, 4.0, 0.1), lacking
    )
    x, m, v, w = values(1), *(values(seed).nan_to_num(1.0, 1.0, 1.0) for seed in (2, 3, 4))
    mask = values(5) > 0
    for name, shape in SHAPES.items():
        p, own_m, own_v, own_w = (INDEX.view(flat, name).view(shape) for flat in (x, m, v.square(), w.square()))
        live = INDEX.view(mask if is_masked else torch.ones_like(mask), name).view(shape)
        fresh, own = own_w if is_frozen else None, live if is_masked else None
        found, expected = (kernel.directions(p, own_m, own_v, fresh, own, how) for kernel in (apply, plain))
        assert same(found[0], expected[0])
        assert same(found[1], expected[1])
        assert found[2] == expected[2]
        assert (found[2] > 0) == (is_frozen and bool(live.any()))
