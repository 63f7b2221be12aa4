"""What the training program promises about its data."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch

TRAIN = runpy.run_path(str(Path(__file__).parent.parent / "launch" / "train.py"))


def test_no_two_ranks_and_no_two_steps_train_on_the_same_batch() -> None:
    data = torch.randint(256, (1 << 20,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    generator, seen = torch.Generator(), set()
    for rank in range(5):
        for step in range(40):
            generator.manual_seed(TRAIN["data_seed"](1, rank, step))
            windows, _ = TRAIN["draw"](data, 2, 16, generator)
            seen.add(tuple(windows.flatten().tolist()))
    assert len(seen) == 5 * 40


def test_a_step_draws_the_same_wherever_training_starts() -> None:
    assert TRAIN["data_seed"](1, 2, 30) == TRAIN["data_seed"](1, 2, 30) != TRAIN["data_seed"](2, 2, 30)
