"""Memory that has been freed goes back to the system."""

from __future__ import annotations

from pathlib import Path

import torch

from commopt.run.machine import give_back_memory


def resident_bytes() -> int:
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


def test_memory_between_what_is_used_is_given_back() -> None:
    every = [torch.ones(20_000) for _ in range(1000)]  # of 80 KB, which are in the heap
    kept = every[::10]
    del every
    before = resident_bytes()
    give_back_memory()
    assert resident_bytes() < before - 50e6
    assert all(bool((one == 1).all()) for one in kept)
