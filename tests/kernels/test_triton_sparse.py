"""The sparse kernels for GPUs, by triton's interpreter: the choice, the values and the bits of the CPU's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from block_values import blocks_in, blocks_of, compress, heavy_tailed
from index_sets import corner_cases, many_blocks
from rig import flat, make_model
from torch import Tensor

from commopt import attach, build
from commopt.compress.sparse import RandomK, Threshold, TopK
from commopt.groups import SimGroup, SimWorld
from commopt.kernels.cpu import indices as cpu_indices
from commopt.kernels.reference import select as reference_select
from commopt.kernels.reference.indices import widths_and_sizes
from commopt.wire.bucket import Blocks
from commopt.wire.payload import Payload
from commopt.wire.residual import Accumulated

pytest.importorskip("triton", reason="triton is not installed: pip install triton")
if torch.cuda.is_available():
    pytest.skip("these kernels run on the GPU itself, in tests/gpu", allow_module_level=True)

from pretend import DEVICE, working_on

from commopt.kernels.cuda import indices, select, sparse

# lengths of blocks, and elements between them
BLOCKS = {
    "short": ([1, 7, 8, 9, 63, 255], 3),
    "to a piece": ([2047, 256, 2048, 1], 3),
    "longer": ([5000, 3, 2049, 4096], 3),
    "aligned": ([2048, 1024, 4096, 64], 0),
    "none": ([], 0),
}
KINDS = ["plain", "ties", "denormal", "bad"]
HOW: list[Any] = [0.01, 0.3, 1.0, "threshold"]


def drawn(case: str, kind: str) -> tuple[Blocks, Tensor, Tensor]:
    lengths, gap = BLOCKS[case]
    blocks, n = blocks_of(lengths, gap), sum(lengths) + 3 * len(lengths)
    x, residual = heavy_tailed(n, 1), heavy_tailed(n, 2)
    if kind == "ties":
        x, residual = x.round(), residual.round()
    elif kind == "denormal":
        x, residual = x * 1e-39, residual * 1e-39
    elif kind == "bad" and lengths:
        x[blocks.starts[0]], x[blocks.starts[-1] + blocks.lengths[-1] - 1] = float("nan"), float("-inf")
    return blocks, x, residual


@pytest.mark.parametrize("case", BLOCKS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", HOW)
def test_the_choice_is_that_of_the_cpu(case: str, kind: str, how: Any) -> None:
    # with a residual or without, so that each two of the others meet both
    has_residual = (list(BLOCKS).index(case) + KINDS.index(kind) + HOW.index(how)) % 2 == 0
    found = []
    for kernel in (reference_select, select):
        blocks, x, residual = drawn(case, kind)
        ks = np.ceil((0 if how == "threshold" else how) * blocks.lengths).astype(np.int64)
        threshold = (1e-39 if kind == "denormal" else 2.0) if how == "threshold" else 0.0
        given = residual if has_residual else None
        found.append((*kernel.select_(x, given, blocks, ks, threshold), residual, torch.from_numpy(ks)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.nan_to_num(0.5), other.nan_to_num(0.5))


@pytest.mark.parametrize("case", ["short", "longer", "aligned"])
@pytest.mark.parametrize("is_nesterov", [False, True])
def test_momentum_is_accumulated_while_the_choice_is_made_and_cleared_where_it_was_sent(
    case: str, is_nesterov: bool
) -> None:
    blocks, g, v = drawn(case, "plain")
    blocks = blocks.having(homes=blocks.starts)
    n, shift = len(g), 3  # the velocity lies elsewhere than the residual
    velocity = heavy_tailed(n + shift, 3)
    here = np.concatenate([np.arange(a, a + k) for a, k in zip(blocks.starts, blocks.lengths, strict=True)])
    u = g.clone()
    u[here] = g.add(velocity[shift:], alpha=0.9)[here]
    if is_nesterov:
        u[here] = (g + velocity[shift:])[here] * 0.9
    x, kept, left = g.clone(), v.clone(), velocity.clone()
    x[here] = (g + u)[here] if is_nesterov else u[here]
    entries = sparse.Entries.of(torch.full((len(blocks),), 1), torch.from_numpy(blocks.lengths), (len(blocks), 0, 0))
    expected = select.largest_(x, kept, blocks, entries)
    moved = torch.empty_like(g) if is_nesterov else g
    given = Accumulated(v, velocity, blocks.homes + shift, moved, 0.9)
    found = select.largest_(g, given, blocks, entries)
    for one, other in [(found.indices, expected.indices), (found.values, expected.values), (g, x), (v, kept)]:
        assert torch.equal(one, other)
    assert torch.equal(velocity, left)
    sparse.add_(found.indices, found.values, blocks, entries, g, alpha=1.0, add=False, given=given, cleared=0)
    u[torch.from_numpy(blocks.starts) + found.indices] *= 0
    left[shift:][here] = u[here]
    assert torch.equal(velocity, left)


def joined() -> tuple[Tensor, Any]:
    """Many sets of indices as the blocks of one message, with what kernels take of their layout."""
    sets = [(n, x) for n, x in corner_cases() if len(x) <= 1100]
    more, more_ns, more_ks = many_blocks()
    ns = np.asarray([*(n for n, _ in sets), *more_ns], dtype=np.int64)
    ks = np.asarray([*(len(x) for _, x in sets), *more_ks], dtype=np.int64)
    return torch.cat([*(x for _, x in sets), more]), (ns, ks, *widths_and_sizes(ns, ks))


def test_indices_have_the_bits_of_the_cpu() -> None:
    x, layout = joined()
    codes = [torch.full((int(layout[-1].sum()),), 0x5A, dtype=torch.uint8) for _ in range(2)]
    assert all(kernel.encode_(x, *layout, code) for kernel, code in zip((cpu_indices, indices), codes, strict=True))
    assert torch.equal(*codes)
    back = indices.decode(codes[1], *layout)
    assert back is not None
    assert torch.equal(back, x)


@pytest.mark.parametrize("bad", [[2, 1], [1, 1], [-1, 3], [3, 10], [0, 2**62], [-(2**62), 0]])
def test_wrong_indices_are_seen(bad: list[int]) -> None:
    ns, ks = np.asarray([20, 10, 20]), np.asarray([2, 2, 2])
    x = torch.tensor([3, 4, *bad, 5, 6])
    layout = (ns, ks, *widths_and_sizes(ns, ks))
    code = torch.zeros(int(layout[-1].sum()), dtype=torch.uint8)
    assert not indices.encode_(x, *layout, code)
    assert not cpu_indices.encode_(x, *layout, code)


def test_damaged_codes_are_seen_as_on_the_cpu() -> None:
    rng = np.random.default_rng(1)
    ns, ks = np.asarray([60, 9, 9, 300, 7, 40]), np.asarray([4, 4, 9, 5, 0, 20])
    layout = (ns, ks, *widths_and_sizes(ns, ks))
    x = torch.from_numpy(
        np.concatenate([np.sort(rng.choice(n, k, replace=False)) for n, k in zip(ns, ks, strict=True)])
    )
    code = torch.zeros(int(layout[-1].sum()), dtype=torch.uint8)
    cpu_indices.encode_(x, *layout, code)
    sound = 0
    for _ in range(20):
        damaged = code.clone()
        for place in rng.integers(0, 8 * len(code), rng.integers(1, 4)):
            damaged[place // 8] ^= 1 << place % 8
        expected, found = (kernel.decode(damaged, *layout) for kernel in (cpu_indices, indices))
        assert (found is None) == (expected is None)
        if expected is not None and found is not None:
            assert torch.equal(found, expected)
            sound += 1
    assert 0 < sound < 20


CODECS = [
    *(TopK(density=0.05, value_bits=bits) for bits in (32, 16, 8, 1)),
    *(Threshold(threshold=2.5, value_bits=bits) for bits in (32, 16, 8, 1)),
    *(RandomK(density=0.05, value_bits=bits) for bits in (32, 8, 1)),
    TopK(density=0.05, block_size=256),
    TopK(density=1.0, value_bits=8),
    RandomK(density=0.05, value_bits=32, is_unbiased=True),
    Threshold(threshold=1e6),  # of which there are none
]
NAMES = [f"{type(codec).__name__} {codec.value_bits} {codec.block_size} {k}" for k, codec in enumerate(CODECS)]
SIZES = [3001, 64, 5, 0, 2500]
N = 3


def exchanged(codec: Any, device: torch.device) -> tuple[list[Tensor], Tensor, Tensor, list[Any]]:
    """What N ranks send, what they keep, the sum that arrives, and which blocks each calls bad: a short and a long one of the first."""
    codes, residuals, bad = [], [], []
    blocks = blocks_in(codec, SIZES, 1)
    counts = np.zeros(len(SIZES), np.int64)
    blocks = blocks.worded(0, "test", 0, counts).having(keys=blocks.drawn(0, "test", 0, counts))
    for rank in range(N):
        x, residual = (heavy_tailed(sum(SIZES), 2 * rank + k, 1.0) for k in (0, 1))
        if rank == 0:
            x[SIZES[0] + 7], x[-1] = float("nan"), float("inf")
        x, residual = x.to(device), residual.to(device)
        codes.append(compress(codec, x, residual, blocks))
        residuals.append(residual)
        bad.append(codec.is_bad(codes[-1], blocks).cpu().tolist())
    header = torch.zeros(1, dtype=torch.int32, device=device)
    total = torch.full((sum(SIZES),), 7.0).to(device)
    codec.add_up_([Payload.of(header, *own) for own in codes], blocks, total, alpha=1 / N)
    return [code.cpu() for own in codes for code in own], torch.stack(residuals).cpu(), total.cpu(), bad


@pytest.mark.parametrize("codec", CODECS, ids=NAMES)
def test_messages_residuals_and_the_sum_of_all_ranks_are_those_of_the_cpu(codec: Any) -> None:
    expected = exchanged(codec, torch.device("cpu"))
    with working_on(DEVICE):
        found = exchanged(codec, DEVICE)
    assert found[3] == expected[3]
    assert [sum(bad) for bad in found[3]] == [2, 0, 0]
    for one, other in zip([*found[0], *found[1:3]], [*expected[0], *expected[1:3]], strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.nan_to_num(0.5), other.nan_to_num(0.5))


@pytest.mark.parametrize("codec", [TopK(density=0.05), Threshold(threshold=2.5, value_bits=1)], ids=["fixed", "counts"])
def test_a_damaged_message_stands_for_nan_and_harms_nothing_else(codec: Any) -> None:
    blocks = blocks_in(codec, SIZES, 1)
    rng = np.random.default_rng(3)
    with working_on(DEVICE):
        sound = compress(codec, heavy_tailed(sum(SIZES), 1).to(DEVICE), None, blocks)
        for _ in range(6):
            codes = [code.clone() for code in sound]
            for code in codes:
                if code.dtype in (torch.int32, torch.uint8):
                    damage = torch.from_numpy(rng.integers(0, 256, code.numel() * code.element_size(), dtype=np.uint8))
                    code.copy_(damage.view(code.dtype).to(DEVICE))
            out = torch.zeros(sum(SIZES) + 16).to(DEVICE)
            codec.decompress_(codes, blocks, out)
            found = out.cpu()
            assert found.isnan().any()
            assert not found[-16:].any()


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "random_k": ("random_k", {"density": 0.1}),
    "random_k in half precision": ("random_k", {"density": 0.1, "value_bits": 16, "dense_1d": False}),
    "random_k without feedback": ("random_k", {"density": 0.1, "error_feedback": False}),
    "top_k": ("top_k", {"density": 0.1, "value_bits": 32}),
    "threshold": ("threshold", {"threshold": 0.5, "value_bits": 8}),
    "threshold, and signs": ("threshold", {"threshold": 0.5, "value_bits": 1, "residual_bits": 16}),
    "ef21 of what reaches a threshold": ("ef21", {"compressor": {"compressor": "threshold", "threshold": 0.2}}),
    "dgc": ("dgc", {"density": 0.1, "momentum": 0.5}),
    "dgc, warming up": ("dgc", {"density": 0.05, "momentum": 0.5, "nesterov": True, "warmup_steps": 2}),
}


def three_steps(name: str, options: dict[str, Any], device: torch.device) -> list[Tensor]:
    """Of both ranks, the parameters after each step, of which the second has a NaN, and the state at the end."""

    def rank_of(group: SimGroup) -> list[Tensor]:
        with working_on(device):
            model = make_model().to(device)
            run: Any = attach(model, build(name, **options), torch.optim.SGD(model.parameters(), lr=0.1), group=group)
            found = []
            for step in range(3):
                for k, p in enumerate(model.parameters()):
                    grad = heavy_tailed(p.numel(), 100 * step + 10 * group.rank + k, 0.5)
                    if (step, group.rank, k) == (1, 1, 0):
                        grad[3] = float("nan")
                    p.grad = grad.to(device).view(p.shape)
                run.optimizer.step()
                found.append(flat(model).cpu())
            assert sorted(dict(run.voided).items()) == [(1, "0.weight")]
            return [*found, *(x.cpu() for x in run.method.state.values())]

    one, other = SimWorld[list[Tensor]](2, timeout_s=100).run(rank_of)
    return [*one, *other]


@pytest.mark.parametrize("case", METHODS)
def test_what_a_method_exchanges_and_keeps_is_what_it_does_on_the_cpu(case: str) -> None:
    expected, found = (three_steps(*METHODS[case], device) for device in (torch.device("cpu"), DEVICE))
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.nan_to_num(0.5), other.nan_to_num(0.5))
        assert torch.equal(one.isnan(), other.isnan())
