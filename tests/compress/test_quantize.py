"""The block quantisers: their bounds, their averages, and the fast kernels against the plain ones."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest
import torch
from block_values import KERNELS, LENGTHS, SEEDS, blocks_of, compress, draw, heavy_tailed, kernels_are, sent_by
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from commopt.compress import quantize
from commopt.compress.quantize import BlockFloat8, BlockInt, BlockScaled, EvenLevels, Natural, QSGDLevels, Ternary
from commopt.kernels.cpu import quantize as fast
from commopt.kernels.cpu.rows import byte_starts
from commopt.kernels.reference import quantize as plain
from commopt.wire import noise
from commopt.wire.bucket import Blocks

EVEN = [
    *(BlockInt(bits) for bits in (8, 4, 2)),
    BlockInt(4, stochastic=False),
    *(QSGDLevels(levels) for levels in (3, 12, 25, 50)),  # 3, 5, 6 and 7 bits
    QSGDLevels(7, norm="max"),
    Ternary(),
]
CODECS = [*EVEN, BlockFloat8(), BlockFloat8(stochastic=False), Natural()]
UNBIASED = [codec for codec in CODECS if codec.stochastic]
LARGEST = float(np.finfo(np.float32).max)
each_codec = pytest.mark.parametrize("codec", CODECS, ids=repr)


def elements_of(x: Tensor, blocks: Blocks) -> list[Tensor]:
    return [x[start : start + n] for start, n in zip(blocks.starts, blocks.lengths, strict=True)]


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


@each_codec
@given(
    lengths=LENGTHS,
    seed=SEEDS,
    has_keys=st.booleans(),
    has_residual=st.booleans(),
    spread=st.sampled_from([0.1, 2.0, 15.0]),
    scale=st.sampled_from([1.0, 1e30, 1e-36, 1e-42]),
    alpha=st.sampled_from([1.0, 1 / 3]),
    add=st.booleans(),
)
def test_fast_and_plain_kernels_agree_to_the_bit(
    codec: BlockScaled,
    lengths: list[int],
    seed: int,
    has_keys: bool,
    has_residual: bool,
    spread: float,
    scale: float,
    alpha: float,
    add: bool,
) -> None:
    blocks = blocks_of(lengths, seed=seed if has_keys else None)
    x, residual = (values * scale for values in draw(blocks, seed, spread))
    given_x, results = x.clone(), []
    for kind in KERNELS:
        with kernels_are(kind):
            e = residual.clone() if has_residual else None
            scales, codes = compress(codec, x, e, blocks)
            out = torch.linspace(-1, 1, len(x))
            codec.decompress_((scales, codes), blocks, out, alpha=alpha, add=add)
            results.append((scales, codes, residual if e is None else e, out))
    for name, one, other in zip(("scales", "codes", "residual", "decoded"), *results, strict=True):
        if name == "decoded":  # NaNs of different signs are the same here
            one, other = one.nan_to_num(7, 8, 9), other.nan_to_num(7, 8, 9)
        assert torch.equal(bits(one), bits(other)), name
    assert torch.equal(bits(x), bits(given_x))


@pytest.mark.parametrize("codec", [BlockInt(2), QSGDLevels(7), BlockInt(8)], ids=repr)
@given(lengths=LENGTHS, seed=SEEDS, has_residual=st.booleans(), bad=st.booleans())
def test_fast_and_plain_kernels_fit_scales_alike(
    codec: EvenLevels, lengths: list[int], seed: int, has_residual: bool, bad: bool
) -> None:
    blocks, results = blocks_of(lengths, seed=seed), []
    x, residual = draw(blocks, seed)
    x[blocks.starts[0] + seed % lengths[0]] = math.nan if bad else 1.0
    scales, codes = compress(codec, x, residual if has_residual else None, blocks)
    for kernel in (fast, plain):
        fitted, e = scales.clone(), residual.clone()
        kernel.fit_(x, e if has_residual else None, blocks, fitted, codes, bits=codec.code_bits)
        results.append((fitted, e))
    for one, other in zip(*results, strict=True):
        assert torch.equal(bits(one.nan_to_num(7)), bits(other.nan_to_num(7)))
    assert bool(results[0][0][0].isnan()) == bad


@each_codec
@given(lengths=LENGTHS, seed=SEEDS)
def test_the_residual_is_what_was_not_sent_to_an_ulp(codec: BlockScaled, lengths: list[int], seed: int) -> None:
    blocks = blocks_of(lengths, seed=seed)
    x, residual = draw(blocks, seed)
    left, out = residual.clone(), torch.full_like(x, 7.0)
    codec.decompress_(compress(codec, x, left, blocks), blocks, out)
    for start, home, n in zip(blocks.starts, blocks.homes, blocks.lengths, strict=True):
        c = (x[start : start + n] + residual[home : home + n]).double()
        rest = left[home : home + n].double()
        assert ((out[start : start + n].double() + rest - c).abs() <= rest.abs() * 2**-24).all()
        out[start : start + n] = 7.0
    assert (out == 7).all()  # nothing beside the blocks is written


def steps_around(codec: BlockScaled, c: Tensor, scale: float) -> Tensor:
    """(n,) f64 the distance between the two levels around each c, at least."""
    a = c.abs().double()
    binade = torch.exp2(torch.frexp(a).exponent.double() - 1)
    if isinstance(codec, Natural):
        return torch.where(a < scale * 2.0**-126, scale * 2.0**-126, binade)
    if isinstance(codec, BlockFloat8):
        binade = torch.exp2(torch.frexp(a / scale).exponent.double() - 1)
        return binade.clamp(min=2.0**-6) / 8 * scale
    return torch.full_like(a, scale)


@each_codec
@given(lengths=LENGTHS, seed=SEEDS, has_keys=st.booleans())
def test_a_value_goes_to_a_level_beside_it(codec: BlockScaled, lengths: list[int], seed: int, has_keys: bool) -> None:
    blocks = blocks_of(lengths, seed=seed if has_keys else None)
    x, _ = draw(blocks, seed)
    out = torch.empty_like(x)
    scales, codes = compress(codec, x, None, blocks)
    codec.decompress_((scales, codes), blocks, out)
    share = 1.0 if has_keys and codec.stochastic else 0.5
    for c, sent, scale in zip(elements_of(x, blocks), elements_of(out, blocks), scales.tolist(), strict=True):
        slack = 1e-6 * c.abs().double().max()  # c / scale is rounded
        assert ((sent.double() - c.double()).abs() <= share * steps_around(codec, c, scale) + slack).all()
        assert (sent[c == 0] == 0).all()
        assert (sent * c >= 0).all()


@pytest.mark.parametrize("codec", UNBIASED, ids=repr)
def test_stochastic_rounding_is_right_on_average(codec: BlockScaled) -> None:
    times, n = 20_000, 48
    c = torch.cat([torch.randn(n - 2, generator=torch.Generator().manual_seed(1)), torch.tensor([1e-3, 5.0])])
    blocks = blocks_of([n] * times, gap=0)
    out = sent_by(codec, c.repeat(times), blocks)
    mean, scale = out.view(times, n).double().mean(0), float(compress(codec, c, None, blocks_of([n], gap=0))[0])
    assert ((mean - c).abs() <= 5 * 0.5 * steps_around(codec, c, scale) / math.sqrt(times)).all()
    assert out.view(times, n).std(0).gt(0).sum() > n // 2


def test_natural_compression_is_right_on_average_below_its_smallest_power() -> None:
    times, c = 20_000, torch.tensor([2.0**100, 2.0**-27, 3 * 2.0**-27, -(2.0**-28), 1.5 * 2.0**-26, 0.0, 1e-30])
    mean = sent_by(Natural(), c.repeat(times), blocks_of([len(c)] * times, gap=0)).view(times, -1).double().mean(0)
    assert ((mean[1:] - c[1:].double()).abs() <= 5 * 0.5 * 2.0**-26 / math.sqrt(times)).all()
    assert mean[0] == 2.0**100
    assert mean[5] == 0


@pytest.mark.parametrize("codec", [Natural(), BlockFloat8(), BlockInt(4), QSGDLevels(4), Ternary()], ids=repr)
def test_the_mean_squared_error_keeps_the_published_bounds(codec: BlockScaled) -> None:
    n, times = 512, 200
    c = heavy_tailed(n, 3)
    out = sent_by(codec, c.repeat(times), blocks_of([n] * times, gap=0)).view(times, n)
    error = float((out - c).double().square().sum(1).mean() / c.double().square().sum())
    largest = float(c.abs().max()) ** 2 / float(c.double().square().sum())
    bound = {
        Natural(): 1 / 8,
        BlockFloat8(): 1 / 256 + n / 4 * (1 / 448 / 512) ** 2 * largest,
        BlockInt(4): n / 4 / 49 * largest,
        QSGDLevels(4): min(n / 16, math.sqrt(n) / 4),
        Ternary(): float(c.abs().max() * c.abs().sum() / c.square().sum()) - 1 + 0.1,
    }
    assert 0 < error <= bound[codec]


@pytest.mark.parametrize("codec", EVEN, ids=repr)
@pytest.mark.parametrize("has_keys", [True, False])
def test_even_levels_are_those_of_the_papers(codec: EvenLevels, has_keys: bool) -> None:
    """QSGD: norm / s * sign(c) * (floor(a) + [u < a - floor(a)]) with a = s |c| / norm; the others are its case of norm = max|c|."""
    blocks = blocks_of([512] * 40, gap=0, seed=3 if has_keys else None)
    x = heavy_tailed(512 * 40, 5)
    c = x.double().numpy().reshape(40, 512)
    l2, largest = np.sqrt((c**2).sum(1, keepdims=True)), np.abs(c).max(1, keepdims=True)
    norm = l2 if codec.has_l2_norm else largest
    a = codec.levels * np.abs(c) / norm
    u = np.full_like(a, 0.5)
    if blocks.keys is not None and codec.stochastic:
        u = noise.uniform(blocks.keys, blocks.lengths).double().numpy().reshape(40, 512)
    expected = norm / codec.levels * np.sign(c) * (np.floor(a) + (u < a - np.floor(a)))
    out = sent_by(codec, x, blocks).double().numpy().reshape(40, 512)
    is_clear = np.abs(u - (a - np.floor(a))) > 1e-4
    is_clear &= np.abs(a - np.round(a)) > 1e-4
    assert is_clear.mean() > 0.5
    np.testing.assert_allclose(out[is_clear], expected[is_clear], rtol=1e-6, atol=1e-6)


@each_codec
@given(lengths=LENGTHS, seed=SEEDS)
def test_a_blocks_codes_do_not_depend_on_its_neighbours(codec: BlockScaled, lengths: list[int], seed: int) -> None:
    blocks = blocks_of(lengths, seed=seed)
    x, residual = draw(blocks, seed)
    together, apart = residual.clone(), residual.clone()
    scales, codes = compress(codec, x, together, blocks)
    starts = np.append(byte_starts(blocks, codec.code_bits), len(codes))
    for b in reversed(range(len(blocks))):
        scale, own = compress(codec, x, apart, blocks.only(np.asarray([b])))
        assert torch.equal(scale, scales[b : b + 1])
        assert torch.equal(own, codes[starts[b] : starts[b + 1]])
    assert torch.equal(bits(together), bits(apart))


@each_codec
def test_equal_blocks_with_different_keys_are_drawn_apart_and_with_the_same_alike(codec: BlockScaled) -> None:
    x = heavy_tailed(256, 2).repeat(2)
    out = sent_by(codec, x, blocks_of([256, 256], gap=0))
    again = sent_by(codec, x, blocks_of([256, 256], gap=0))
    assert torch.equal(out, again)
    assert torch.equal(out[:256], out[256:]) != codec.stochastic


@each_codec
@given(lengths=LENGTHS, seed=SEEDS)
def test_minus_the_values_is_minus_the_message(codec: BlockScaled, lengths: list[int], seed: int) -> None:
    blocks = blocks_of(lengths, seed=seed)
    x, _ = draw(blocks, seed)
    assert torch.equal(sent_by(codec, -x, blocks), -sent_by(codec, x, blocks))


@each_codec
@given(n=st.integers(1, 5000))
def test_a_block_takes_its_bits_in_whole_bytes_and_a_scale(codec: BlockScaled, n: int) -> None:
    lengths = codec.block_lengths(n, 3)
    assert sum(lengths) == n
    assert all(length % 8 == 0 for length in lengths[:-1])
    (dtype, scales), (code_dtype, code_bytes) = codec.layout(blocks_of(lengths))
    assert (dtype, code_dtype, scales) == (torch.float32, torch.uint8, len(lengths))
    assert code_bytes == sum(math.ceil(length * codec.code_bits / 8) for length in lengths)


def test_levels_take_as_many_bits_as_they_need() -> None:
    assert [quantize.bits_of(s) for s in range(1, 128)] == [math.ceil(math.log2(2 * s + 1)) for s in range(1, 128)]
    assert [codec.code_bits for codec in (BlockInt(8), BlockInt(4), BlockInt(2), Ternary())] == [8, 4, 2, 2]
    assert Ternary(None).block_lengths(5000, 3) == [5000]
    assert Ternary(None).block_lengths(0, 3) == []


@each_codec
@pytest.mark.parametrize("kind", KERNELS)
def test_zeros_stay_zeros_and_denormal_blocks_are_left_over(codec: BlockScaled, kind: str) -> None:
    blocks = blocks_of([9, 9, 9], gap=0)
    x = torch.cat([torch.zeros(9), torch.full((9,), -0.0), torch.linspace(-1e-39, 1e-39, 9)])
    left, out = torch.zeros(27), torch.full((27,), 7.0)
    with kernels_are(kind):
        codes = compress(codec, x, left, blocks)
        codec.decompress_(codes, blocks, out)
    assert not codec.is_bad(codes, blocks).any()
    assert (out[:18] == 0).all()
    assert (left[blocks.homes[1] : blocks.homes[0] + 9] == 0).all()
    assert torch.equal(out[18:] + left[:9], x[18:])
    if not isinstance(codec, Natural):
        assert (out == 0).all()


@each_codec
@pytest.mark.parametrize("large", [1e38, 3e38, LARGEST, float(np.nextafter(np.float32(LARGEST), np.float32(0)))])
def test_huge_values_are_sent_or_refused_and_never_become_infinite(codec: BlockScaled, large: float) -> None:
    for c in (torch.tensor([large, -large / 2, 1.0]), torch.full((64,), -large)):
        blocks = blocks_of([len(c)], gap=0)
        left, out = torch.zeros(len(c)), torch.empty(len(c))
        codes = compress(codec, c, left, blocks)
        codec.decompress_(codes, blocks, out)
        if bool(codec.is_bad(codes, blocks)):
            has_large_norm = isinstance(codec, EvenLevels) and codec.has_l2_norm
            assert has_large_norm or large > 3.4e38
            assert (left == 0).all()
        else:
            assert out.isfinite().all()
            assert left.isfinite().all()
            assert torch.allclose(out + left, c)


@pytest.mark.parametrize("codec", [codec for codec in EVEN if not codec.has_l2_norm], ids=repr)
@pytest.mark.parametrize("magnitude", [1e-35, 1.0, 3e38])
def test_the_largest_of_a_block_is_kept_where_it_sets_the_scale(codec: EvenLevels, magnitude: float) -> None:
    x = heavy_tailed(256, 4).clamp(-1, 1) * 0.5
    x[17] = -1.0
    out = sent_by(codec, x * magnitude, blocks_of([256], gap=0))
    assert float(out[17]) == pytest.approx(-magnitude, rel=1e-6)


def test_every_float8_pattern_is_torchs() -> None:
    patterns = torch.arange(256, dtype=torch.uint8)
    expected = patterns.view(torch.float8_e4m3fn).float()
    x, out = expected.nan_to_num(448.0), torch.empty(256)
    for has_keys in (True, False):
        blocks = blocks_of([256], gap=0, seed=1 if has_keys else None)
        scales, codes = compress(BlockFloat8(), x, None, blocks)
        assert scales.tolist() == [1.0]
        assert torch.equal(codes[~expected.isnan()], patterns[~expected.isnan()])
    for kernel in (fast, plain):
        kernel.decompress_(patterns, torch.ones(1), blocks, out, kind="float8", alpha=1.0, add=False)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    grid = plain.float8_values()[:127]
    ties = torch.cat([(grid[1:] + grid[:-1]) / 2, torch.tensor([-448.0])])
    scales, codes = compress(BlockFloat8(stochastic=False), ties, None, blocks_of([127], gap=0))
    assert scales.tolist() == [1.0]
    assert torch.equal(codes, ties.to(torch.float8_e4m3fn).view(torch.uint8))


@given(seed=SEEDS, spread=st.sampled_from([0.5, 2.0, 4.0]))
def test_float8_to_the_nearest_is_torchs_cast(seed: int, spread: float) -> None:
    x = heavy_tailed(1000, seed, spread)
    grid = plain.float8_values()[:127]
    x[:126] = (grid[1:] + grid[:-1]) / 2 * float(x.abs().max()) / 448  # ties, where the scale is a power of two
    scales, codes = compress(BlockFloat8(stochastic=False), x, None, blocks_of([1000], gap=0))
    cast = (x / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(codes, cast.view(torch.uint8))


@pytest.mark.parametrize("kind", KERNELS)
def test_integers_to_the_nearest_round_half_to_even(kind: str) -> None:
    x = torch.tensor([7.0, 0.5, 1.5, -2.5, -3.5, 6.5, 2.4, 2.6, -0.5])
    with kernels_are(kind):
        out = sent_by(BlockInt(4, stochastic=False), x, blocks_of([9], gap=0))
    assert torch.equal(out, x.round())


def test_natural_compression_leaves_powers_of_two_as_they_are() -> None:
    for top in (127, 60, 0, -60, -126):
        exponents = torch.arange(top, max(top - 127, -127), -1)
        x = torch.ldexp(torch.ones(len(exponents)), exponents) * torch.where(exponents % 3 == 0, -1, 1)
        assert torch.equal(sent_by(Natural(), x, blocks_of([len(x)], gap=0)), x)


def test_natural_compression_sends_what_is_beyond_the_last_power_as_that() -> None:
    x = torch.tensor([LARGEST, -3e38, 2.0**127])
    assert sent_by(Natural(), x, blocks_of([3], gap=0)).tolist() == [2.0**127, -(2.0**127), 2.0**127]


@given(n=st.integers(1, 5000), width=st.integers(2, 8), seed=SEEDS)
def test_packed_codes_come_back(n: int, width: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = generator.integers(-(2 ** (width - 1)), 2 ** (width - 1), n).astype(np.int8)
    digits = values.astype(np.int64)[:, None] >> np.arange(width) & 1
    expected = np.packbits(digits.astype(np.uint8).reshape(-1), bitorder="little")
    for kind in KERNELS:
        out = torch.full((math.ceil(n * width / 8),), 255, dtype=torch.uint8)
        with kernels_are(kind):
            quantize.pack_codes_(torch.from_numpy(values).float(), width, out)
            assert torch.equal(out, torch.from_numpy(expected))
            assert torch.equal(quantize.unpack_codes(out, width, n), torch.from_numpy(values).float())


@pytest.mark.parametrize("kernel", [fast, plain], ids=KERNELS)
def test_scales_and_codes_are_the_two_halves_of_compressing(kernel: ModuleType) -> None:
    blocks = blocks_of([5, 2050, 300])
    x, residual = draw(blocks, 4)
    codes, other_codes = (torch.zeros(2 + 769 + 113, dtype=torch.uint8) for _ in range(2))
    scales, left, other_left = torch.empty(3), residual.clone(), residual.clone()
    kernel.compress_(x, left, blocks, scales, codes, kind="levels", levels=3, bits=3, squared=True)
    given_scales, how = scales.clone(), {"kind": "levels", "levels": 3, "bits": 3, "is_given": True}
    kernel.compress_(x, other_left, blocks, given_scales, other_codes, **how)
    assert torch.equal(scales, given_scales)
    assert torch.equal(codes, other_codes)
    assert torch.equal(bits(left), bits(other_left))
    given_scales /= 1000  # values beyond the last level are cut off there
    kernel.compress_(x, None, blocks, given_scales, other_codes, **how)
    out = torch.zeros_like(x)
    kernel.decompress_(other_codes, given_scales, blocks, out, kind="levels", bits=3, alpha=1.0, add=False)
    assert float(out.abs().max()) == pytest.approx(3 * float(given_scales.max()))
