"""The same text trains with any method: plain, under DDP, with Accelerate and with the Trainer."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest


@pytest.mark.timeout(300)
def test_the_same_text_trains_with_each_method_in_each_framework(tmp_path: Path) -> None:
    script = Path(__file__).with_name("same_script.py")
    words = ["torchrun", "--standalone", "--nproc-per-node=2", str(script), str(tmp_path)]
    subprocess.run(words, check=True)
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert len(losses) == 4 * 6 - 2  # outer methods are there to do without DDP
    for name, (first, last) in losses.items():
        assert last < 0.97 * first, name
        framework, _, method = name.partition(" ")
        if framework in ("ddp", "accelerate"):
            assert last == losses[f"plain {method}"][1], name
