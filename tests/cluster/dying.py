"""launch/elastic_train.py, in which rank 1 is killed before step 7, the first time: `dying.py FLAG [OPTIONS]...`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from script import module

training = module("elastic_train", Path(__file__).parents[2] / "launch")
rank = int(os.environ["RANK"])
flag, draw = Path(sys.argv[1]), training.draw


def draw_or_die(rank: int, step: int) -> object:
    if (rank, step) == (1, 7) and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(rank, step)


training.draw = draw_or_die
if flag.exists() and rank == 0:
    time.sleep(1)  # the other is back first, and must not find the address that this one had before
training.main(training.arguments(sys.argv[2:]))
