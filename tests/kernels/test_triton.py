"""The kernels for GPUs: by triton's interpreter with the bits of the CPU's, and compiled for GPUs that are not here."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from block_values import blocks_of, heavy_tailed
from torch import Tensor

from commopt import kernels
from commopt.compress import make_compressor
from commopt.compress.feedback import ErrorFeedback, Kept
from commopt.kernels.cpu import quantize as cpu_quantize
from commopt.kernels.cpu import signs as cpu_signs
from commopt.kernels.cpu import votes as cpu_votes
from commopt.kernels.reference.votes import coin_bits, count_votes
from commopt.wire import noise
from commopt.wire.bucket import Blocks, Bucket, ParameterIndex
from commopt.wire.payload import in_a_row

pytest.importorskip("triton", reason="triton is not installed: pip install triton")
if torch.cuda.is_available():
    pytest.skip("these kernels run on the GPU itself, in tests/gpu", allow_module_level=True)

from commopt.kernels.cuda import cast, headers, quantize, signs, votes
from commopt.kernels.cuda.pieces import Pieces

CPU = torch.device("cpu")
# lengths of blocks, and elements between them: with 3 nothing is aligned, with 0 all that is a multiple of 8
BLOCKS = {
    "short": ([1, 7, 8, 9, 63, 255], 3),
    "to a piece": ([2047, 256, 2048, 1], 3),
    "longer": ([5000, 3, 2049, 4096], 3),
    "aligned": ([2048, 1024, 4096, 64], 0),
}
ALL = pytest.mark.parametrize("case", BLOCKS)
CODECS: dict[str, dict[str, Any]] = {
    "int8": {"kind": "levels", "levels": 127, "bits": 8},
    "4bit": {"kind": "levels", "levels": 7, "bits": 4},
    "2bit to the nearest": {"kind": "levels", "levels": 1, "bits": 2, "stochastic": False},
    "qsgd": {"kind": "levels", "levels": 7, "bits": 4, "squared": True},
    "qsgd of 3 levels": {"kind": "levels", "levels": 3, "bits": 3, "squared": True},
    "6 bits": {"kind": "levels", "levels": 31, "bits": 6},
    "fp8": {"kind": "float8", "levels": 448, "bits": 8},
    "fp8 to the nearest": {"kind": "float8", "levels": 448, "bits": 8, "stochastic": False},
    "natural": {"kind": "natural"},
}


def drawn(case: str) -> tuple[Blocks, Tensor, Tensor]:
    """Blocks, values and a residual, with everything that float32 has: a NaN, an inf, denormals, and a block of zeros."""
    lengths, gap = BLOCKS[case]
    blocks = blocks_of(lengths, gap)
    blocks = blocks.having(words=noise.words(0, "test", 0, np.zeros(1, np.int64)))  # of the same keys
    x, residual = (heavy_tailed(sum(lengths) + 3 * len(lengths), seed) for seed in (1, 2))
    first, second, third, last = (slice(blocks.starts[k], blocks.starts[k] + blocks.lengths[k]) for k in (0, 1, 2, -1))
    x[first.stop - 1] = float("nan")
    x[second][::3], residual[:] = 1e-40, torch.where(residual.abs() < 1e-3, 1e-41, residual)
    x[last.stop - 1] = float("-inf")
    if case != "aligned":
        x[third], residual[blocks.homes[2] : blocks.homes[2] + blocks.lengths[2]] = 0.0, 0.0
    return blocks, x, residual


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, whichever NaN it is."""
    return torch.equal(one.nan_to_num(0.5), other.nan_to_num(0.5)) and torch.equal(one.isnan(), other.isnan())


@ALL
@pytest.mark.parametrize(
    ("name", "has_residual"),
    [(name, True) for name in CODECS] + [("int8", False), ("natural", False)],  # without one a pass has fewer lines
)
def test_codes_scales_residuals_and_values_are_those_of_the_cpu(case: str, name: str, has_residual: bool) -> None:
    how, found = CODECS[name], []
    read = {"kind": how["kind"], "bits": how.get("bits", 8)}
    for kernel in (cpu_quantize, quantize):
        blocks, x, residual = drawn(case)
        scales, given = torch.zeros(len(blocks)), residual if has_residual else None
        codes = torch.full((int(((blocks.lengths * read["bits"] + 7) // 8).sum()),), 171, dtype=torch.uint8)
        kernel.compress_(x, given, blocks, scales, codes, **how)
        added, put = torch.linspace(-1, 1, len(x)), torch.zeros(len(x))
        kernel.decompress_(codes, scales, blocks, added, alpha=1 / 3, add=True, **read)
        kernel.decompress_(codes, scales, blocks, put, alpha=1.0, add=False, **read)
        found.append((scales, residual, added, put, codes))
    assert all(map(same, *found))


@ALL
@pytest.mark.parametrize("squared", [False, True], ids=["mean", "root mean square"])
def test_signs_are_those_of_the_cpu_with_scales_to_rounding(case: str, squared: bool) -> None:
    found = []
    for kernel in (cpu_signs, signs):
        blocks, x, residual = drawn(case)
        scales, bits = torch.zeros(len(blocks)), torch.full((blocks.sign_bytes,), 171, dtype=torch.uint8)
        sums = torch.as_tensor(kernel.block_sums(x, residual, blocks, squared=squared))
        kernel.compress_signs_(x, residual, blocks, scales, bits, squared=squared)
        added = torch.linspace(-1, 1, len(x))
        kernel.unpack_signs_(bits, scales, blocks, added, alpha=1 / 3, add=True)
        given = torch.linspace(0.5, 1.5, len(blocks))
        kernel.compress_signs_(x, residual, blocks, given, bits_given := bits.clone(), squared=None)
        found.append((bits, bits_given, scales, residual, added, sums))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    for one, other in zip(found[0][2:], found[1][2:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-4, equal_nan=True)


@contextmanager
def fused() -> Iterator[None]:
    """Tensors of the CPU are compressed by the kernels for GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "has_triton", lambda _: True)
        of, ours = kernels.of, {"signs": signs, "quantize": quantize, "cast": cast}
        patch.setattr(kernels, "of", lambda kernel, device: ours.get(kernel) or of(kernel, device))
        yield


STORED = {
    "loco": Kept(8, average=0.8),
    "8 bits": Kept(8, decay=0.9),
    "bfloat16": Kept(16, decay=0.9, average=0.3),
    "decayed": Kept(32, decay=0.5),
}


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        *itertools.product(["sign", "int8", "in pieces", "fp16", "top_k"], STORED),
        *itertools.product(
            ["4bit", "natural", "ternary", "bf16"], ["loco", "bfloat16"]
        ),  # of the kernels of those above
    ],
)
def test_a_stored_residual_is_that_of_the_cpu_and_is_restored(name: str, stored: str) -> None:
    """For two steps, with blocks of several owners, some of them longer than a piece, and some that need to be fitted; then a NaN."""
    given: Any = {"compressor": "int8", "block_size": 4096} if name == "in pieces" else name
    codec, kept, results = make_compressor(given), STORED[stored], []
    bucket = Bucket(torch.zeros(9001), ("a", "b", "c"), (4, 0, 5003))
    index = ParameterIndex(("b", "z", "a", "c"), (3, 100, 5000, 3998))  # in another order in the bucket, with a gap
    table = codec.table(index, 3)
    for is_fused in (False, True):
        with fused() if is_fused else nullcontext():
            feedback = ErrorFeedback(codec, kept, table.everything)
            feedback.residual.fill_(1)  # what is not of this bucket stays
            feedback.scales.fill_(0.5)
            payloads = []
            for step in range(3):
                counts = np.full(4, step)
                keyed = [own.having(keys=own.drawn(0, "test", 1, counts)) for own in table.parts(bucket).by_owner]
                keyed = [own.worded(0, "test", 1, counts) for own in keyed]
                x = heavy_tailed(9004, step, spread=1.0)
                x[5002 if step == 2 else 9003] = float("nan")
                before = feedback.residual.clone(), feedback.scales.clone()
                payloads += feedback.compress(x, keyed)
            changed = not torch.equal(feedback.residual, before[0])
            feedback.undo(x, payloads[-3:], keyed)
            assert torch.equal(feedback.residual, before[0])
            assert torch.equal(feedback.scales, before[1])
            results.append((payloads, feedback.values(table.everything), changed))
    (expected, residual, _), (found, found_residual, changed) = results
    assert changed
    assert [int(one.tensors[0]) for one in found] == [int(one.tensors[0]) for one in expected] == [-1] * 6 + [2] * 3
    if name == "sign":  # sums are rounded in another order, so that a sign may change
        assert float(((residual - found_residual).abs() > 1e-5).float().mean()) < 5e-3
        return
    assert all(torch.equal(one.buffer, other.buffer) for one, other in zip(expected[:6], found[:6], strict=True))
    assert same(residual, found_residual)


@pytest.mark.parametrize("name", ["sign", "int8", "top_k"])
def test_undoing_a_message_restores_the_residual_of_blocks_that_are_not_bad(name: str) -> None:
    codec, results = make_compressor(name), []
    bucket = Bucket(torch.zeros(9001), ("a", "b", "c"), (0, 5000, 5003))
    parts = codec.table(ParameterIndex(bucket.names, (5000, 3, 3998)), 3).parts(bucket).by_owner
    for is_fused in (False, True):
        with fused() if is_fused else nullcontext():
            x, residual = heavy_tailed(9001, 3, spread=1.0), heavy_tailed(9001, 4, spread=1.0)
            x[8000] = float("inf")
            before, feedback = residual.clone(), ErrorFeedback(codec, Kept(), parts[0], residual=residual)
            payloads = feedback.compress(x, parts)
            assert not torch.equal(residual, before)
            feedback.undo(x, payloads, parts)
            torch.testing.assert_close(residual, before, rtol=1e-5, atol=1e-5)
            results.append(residual)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@ALL
@pytest.mark.parametrize("has_residual", [True, False])
def test_scales_are_fitted_as_on_the_cpu(case: str, has_residual: bool) -> None:
    codec, found = make_compressor({"compressor": "ternary", "block_size": None}), []
    for is_fused in (False, True):
        blocks, x, residual = drawn(case)
        x[x.isinf()] = 1
        payloads = in_a_row([((torch.int32, 1), *codec.layout(blocks))], CPU)
        given = residual if has_residual else None
        with fused() if is_fused else nullcontext():
            codec.compress_(
                x, given, [blocks.having(keys=blocks.drawn(0, "test", 0, np.zeros(9, int)))], [payloads[0].tensors[1:]]
            )
            scales = payloads[0].tensors[1].clone()
            codec.fit_payloads_(payloads, x, given, [blocks])
        assert not same(scales, payloads[0].tensors[1])
        found.append((payloads[0].tensors[1], residual))
    (scales, residual), (found_scales, found_residual) = found
    torch.testing.assert_close(scales, found_scales, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(residual, found_residual, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", ["sign", "sign_l2", "int8", "qsgd", "ternary", "natural", "fp16", "bf16"])
def test_several_messages_are_written_and_read_at_once(name: str) -> None:
    """As one after the other on the CPU: the headers, what is void, and sums of what has the same blocks, in order."""
    codec = make_compressor(name)
    results = []
    bucket = Bucket(torch.zeros(9001), ("a", "b", "c"), (0, 5000, 5003))
    parts = codec.table(ParameterIndex(bucket.names, (5000, 3, 3998)), 3).parts(bucket)
    for is_fused in (False, True):
        with fused() if is_fused else nullcontext():
            x, residual = heavy_tailed(9001, 3), heavy_tailed(9001, 4)
            keyed = [blocks.having(keys=blocks.drawn(0, "test", 1, np.arange(3))) for blocks in parts.by_owner]
            keyed = [blocks.having(words=noise.words(0, "test", 1, np.arange(3))) for blocks in keyed]
            feedback = ErrorFeedback(codec, Kept(contracts=False), parts.by_owner[0], residual=residual)
            good, mean = feedback.compress(x, keyed), torch.zeros(9001)
            codec.decompress_payloads_(good, parts.by_owner, mean)
            received = [feedback.compress(x, [keyed[1]])[0] for _ in range(3)]
            served = torch.linspace(0, 1, parts.served[1].elements)
            codec.decompress_payloads_(received, [parts.served[1]] * 3, served, alpha=1 / 3, add=True)
            x[5001] = float("nan")
            bad = feedback.compress(x, keyed)
            x[5001] = 0.5
            heads = [
                payload.tensors[0].item()
                for payload in (*good, *bad, *feedback.compress(x, keyed, bad if is_fused else ()))
            ]
            results.append((heads[:6], [payload.buffer for payload in (*good, *received)], residual, mean, served))
            assert heads[6:] == ([1, 1, 1] if is_fused else [-1, -1, -1])
    (heads, codes, *values), (found_heads, found_codes, *found) = results
    assert heads == found_heads == [-1, -1, -1, 1, 1, 1]
    if name.startswith("sign"):  # scales that are rounded otherwise may later change the sign of a sum close to zero
        torch.testing.assert_close(values[1], found[1], rtol=1e-6, atol=0)
        return
    assert all(torch.equal(one, other) for one, other in zip(codes, found_codes, strict=True))
    assert all(map(same, values, found))


@ALL
@pytest.mark.parametrize("ranks", [1, 3, 4])
@pytest.mark.parametrize("width", [1, 3])
def test_votes_are_those_of_the_cpu(case: str, ranks: int, width: int) -> None:
    blocks, x, _ = drawn(case)
    flips = np.asarray([1])
    bits = [torch.zeros(blocks.sign_bytes, dtype=torch.uint8) for _ in range(ranks)]
    payloads = in_a_row([(((torch.int32, 1), (torch.uint8, blocks.sign_bytes)))] * ranks, CPU)
    for rank, own in enumerate(bits):
        values = x.roll(rank)
        row = torch.zeros(4 + blocks.sign_bytes, dtype=torch.uint8)
        assert blocks.words is not None
        bad = cpu_votes.pack_votes_(values, [blocks], (blocks.words, np.full(1, 255, np.uint8)), row, (0,))
        own.copy_(row[4:])
        first = headers.noted_in([payloads[rank]])
        votes.pack_all_(values, [payloads[rank]], [blocks], flips, first)
        assert torch.equal(payloads[rank].tensors[1], own)
        headers.write_(first, [payloads[rank]])
        assert payloads[rank].tensors[0].item() == bad
    rows = [*bits, coin_bits(blocks, np.full(len(blocks), 255, np.uint8), CPU)]
    voters, width_of = (rows, 1) if width == 1 and ranks % 2 == 0 else (bits, width)
    planes = torch.zeros(width_of * blocks.sign_bytes, dtype=torch.uint8)
    votes.count_all_(payloads, blocks, flips if voters is rows else None, width_of, planes)
    digits = len(voters).bit_length()
    expected = (
        count_votes(voters, 3) if width == 3 else count_votes(voters, digits, 2 ** (digits - 1) - ranks // 2 - 1)[-1:]
    )
    assert torch.equal(planes, torch.cat(expected))
    answers = in_a_row([((torch.uint8, width * blocks.sign_bytes),)], CPU)
    answers[0].tensors[0].copy_(planes)
    found = torch.zeros(2, len(x))
    values = torch.arange(2.0**width)
    cpu_votes.unpack_counts_(planes, (0,), width, [blocks], values, found[0])
    votes.unpack_all_(answers, [blocks], width, values, found[1])
    assert torch.equal(found[0], found[1])


def test_the_table_of_blocks_is_made_once_for_each_layout() -> None:
    blocks, _, _ = drawn("short")
    first = Pieces.of([blocks], 1, CPU, [(0, 0)])
    with_words = blocks.having(words=None)
    assert Pieces.of([with_words], 1, CPU, [(0, 0)]) is first
    moved = blocks.having(starts=blocks.starts + 1)
    assert torch.equal(Pieces.of([moved], 1, CPU, [(0, 0)]).columns[0], first.columns[0] + 1)
    assert Pieces.of([blocks], 1, CPU, [(0, 0)]) is first


CEILINGS = {"sm_80": 96, "sm_90": 104, "gfx942": 64}  # registers of a thread; from 128 on half the threads fit
HISTOGRAM = 144  # 2,048 bins for each of a few hundred threads
OF_CHUNKS = {"sm_80": 128, "sm_90": 128, "gfx942": 96}  # which a program has 4,096 elements of
if version("triton").startswith("3.8."):
    OF_CHUNKS |= {"sm_80": 168, "sm_90": 136}


@pytest.mark.timeout(300)  # half a minute of one core, on a machine that may be busy
def test_every_kernel_compiles_for_each_target_without_spills(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "bench" / "registers.py"
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    found = tmp_path / "found.json"
    words = [sys.executable, str(script), "--quick", "--json", str(found)]
    subprocess.run(words, env=variables | {"TRITON_CACHE_DIR": str(tmp_path)}, check=True, capture_output=True)
    rows = json.loads(found.read_text())["kernels"]
    jitted = {"signs": 3, "quantize": 5, "votes": 3, "headers": 2, "residuals": 4, "factors": 1, "chunks": 4, "cast": 2}
    jitted |= {
        "select": 4,
        "indices": 4,
        "entries": 1,
        "sparse": 5,
        "draws": 5,
        "apply": 5,
        "estimates": 3,
        "ternary": 5,
    }
    for module, count in jitted.items():
        assert len({row["kernel"] for row in rows if row["kernel"].startswith(module)}) == count
    assert {row["target"] for row in rows} == set(CEILINGS)
    page = (script.parents[2] / "docs" / "gpu.md").read_text()
    assert [row for row in rows if f"| {row['codec']} | {row['kernel']} |" not in page] == [], "registers.py --markdown"
    assert [row for row in rows if row["spilled_bytes"]] == []
    ceilings = {row["kernel"]: OF_CHUNKS if row["kernel"].startswith("chunks") else CEILINGS for row in rows}
    ceilings["select.count_digits"] = dict.fromkeys(CEILINGS, HISTOGRAM)
    assert [row for row in rows if row["registers"] > ceilings[row["kernel"]][row["target"]]] == []
