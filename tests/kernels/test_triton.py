"""The kernels for GPUs: by triton's interpreter with the bits of the CPU's, and compiled for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from block_values import blocks_of, heavy_tailed
from torch import Tensor

from commopt.kernels.cpu import quantize as cpu_quantize
from commopt.kernels.cpu import signs as cpu_signs
from commopt.kernels.cpu import votes as cpu_votes
from commopt.wire.bucket import Blocks

pytest.importorskip("triton", reason="triton is not installed: pip install triton")
if torch.cuda.is_available():
    pytest.skip("these kernels run on the GPU itself, in tests/gpu", allow_module_level=True)

from commopt.kernels.cuda import quantize, signs, votes
from commopt.kernels.cuda.pieces import Pieces

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


@ALL
def test_votes_are_those_of_the_cpu(case: str) -> None:
    found = []
    blocks, x, _ = drawn(case)
    planes = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 3 * blocks.sign_bytes, dtype=np.uint8))
    for kernel in (cpu_votes, votes):
        bits = torch.full((blocks.sign_bytes,), 171, dtype=torch.uint8)
        flips = np.where(np.arange(len(blocks)) % 2, 255, 0).astype(np.uint8)
        is_bad = kernel.pack_votes_(x, blocks, flips, bits)
        out = torch.zeros(len(x))
        kernel.unpack_counts_(planes, 3, blocks, torch.arange(8.0), out)
        found.append((bits, is_bad, out))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_the_table_of_blocks_is_made_once_for_each_layout() -> None:
    blocks, x, _ = drawn("short")
    first = Pieces.of(blocks, 1, x.device)
    with_keys = blocks.having(keys=None)
    assert Pieces.of(with_keys, 1, x.device) is first
    moved = blocks.having(starts=blocks.starts + 1)
    assert torch.equal(Pieces.of(moved, 1, x.device).places[0], first.places[0] + 1)
    assert Pieces.of(blocks, 1, x.device) is first


CEILINGS = {"sm_80": 96, "sm_90": 104, "gfx942": 64}  # registers of a thread; from 128 on half the threads fit


def test_every_kernel_compiles_for_each_target_without_spills(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "bench" / "registers.py"
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    found = tmp_path / "found.json"
    words = [sys.executable, str(script), "--json", str(found)]
    subprocess.run(words, env=variables | {"TRITON_CACHE_DIR": str(tmp_path)}, check=True, capture_output=True)
    rows = json.loads(found.read_text())["kernels"]
    jitted = {"signs": 3, "quantize": 4, "votes": 2}
    for module, count in jitted.items():
        assert len({row["kernel"] for row in rows if row["kernel"].startswith(module)}) == count
    assert {row["target"] for row in rows} == set(CEILINGS)
    assert [row for row in rows if row["spilled_bytes"]] == []
    assert [row for row in rows if row["registers"] > CEILINGS[row["target"]]] == []
