"""Time the CPU kernels against a plain copy of the same floats, on one core; ratios within this run are what counts.

python scripts/bench/kernels.py [--elements 25000000] [--repeats 15] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from commopt.compress.sign import BlockSign, TensorSign
from commopt.kernels.cpu import signs as cpu
from commopt.kernels.reference import signs as reference
from commopt.wire.bucket import Bucket, ParameterIndex


def main(elements: int, repeats: int, json_file: Path | None) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    index = ParameterIndex(("x",), (elements,))
    x, other, residual = torch.randn(elements), torch.empty(elements), torch.zeros(elements)
    blocks = BlockSign().table(index, 1).all_of(Bucket(x, ("x",), (0,)))
    tensor = TensorSign().table(index, 1).all_of(Bucket(x, ("x",), (0,)))
    scales, bits = torch.zeros(len(blocks)), torch.zeros(blocks.sign_bytes, dtype=torch.uint8)
    cases: dict[str, Callable[[], object]] = {
        "copy": lambda: other.copy_(x),
        "EF-sign, L1 per block": lambda: cpu.compress_signs_(x, residual, blocks, scales, bits, squared=False),
        "EF-sign, L2 per tensor": lambda: cpu.compress_signs_(x, residual, tensor, scales, bits, squared=True),
        "decode": lambda: cpu.unpack_signs_(bits, scales, blocks, other, alpha=1.0, add=False),
        "decode and add": lambda: cpu.unpack_signs_(bits, scales, blocks, other, alpha=0.25, add=True),
    }
    slow = {
        "EF-sign in plain torch": lambda: reference.compress_signs_(x, residual, blocks, scales, bits, squared=False)
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*cases, *slow)}
    for _ in range(repeats + 1):  # in turn, so that a busy neighbour meets all of them alike
        for name, run in cases.items():
            seconds[name].append(timed(run))
    for _ in range(2):
        for name, run in slow.items():
            seconds[name].append(timed(run))
    median = {name: statistics.median(all_s[1:]) for name, all_s in seconds.items()}
    print(f"{elements:,} float32 on one core; median of {repeats}")
    for name, median_s in median.items():
        print(f"{name:24} {1e3 * median_s:9.2f} ms {median_s / median['copy']:8.2f} x copy")
    if json_file is not None:
        rows = [{"name": name, "seconds": s, "ratio_to_copy": s / median["copy"]} for name, s in median.items()]
        json_file.write_text(
            json.dumps({"schema": 1, "elements": elements, "repeats": repeats, "kernels": rows}, indent=1)
        )


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=25_000_000, help="how many float32")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each kernel")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    given = parser.parse_args()
    main(given.elements, given.repeats, given.json)
