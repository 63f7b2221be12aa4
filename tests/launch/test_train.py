"""What the training program promises about its data."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import torch

TRAIN = runpy.run_path(str(Path(__file__).parents[2] / "launch" / "train.py"))
DATA = torch.randint(256, (1 << 20,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def stream(rank: int) -> Any:
    return TRAIN["Stream"](DATA, 2, 16, 1000 + rank)


def batch(one: Any, step: int) -> tuple[int, ...]:
    windows, _ = one.at(step)
    return tuple(windows.flatten().tolist())


def test_no_two_ranks_and_no_two_steps_train_on_the_same_batch() -> None:
    seen = {batch(one, step) for one in map(stream, range(5)) for step in range(40)}
    assert len(seen) == 5 * 40


def test_a_step_draws_the_same_wherever_training_starts_and_whatever_was_left_out() -> None:
    whole, late = stream(2), stream(2)
    all_steps = [batch(whole, step) for step in range(30)]
    assert [batch(late, step) for step in (7, 8, 20, 29)] == [all_steps[step] for step in (7, 8, 20, 29)]
