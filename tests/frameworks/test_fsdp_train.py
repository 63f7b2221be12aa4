"""The FSDP2 example that people copy from."""

from __future__ import annotations

import re

from framework_ranks import run_program
from pool import Pool


def test_the_example_trains_two_replicas(fsdp_ranks: Pool) -> None:
    words = ("--shards", "1", "--layers", "1", "--steps", "4", "--method", '"ef_sign"')
    printed, nothing = fsdp_ranks.run(2, run_program, "fsdp_train.py", *words)
    assert nothing == ""
    found = re.search(
        r"validation loss (\S+) after 4 steps .*; (\S+) MB sent a step by rank 0, replicas equal", printed
    )
    assert found is not None, printed
    assert 2.0 < float(found[1]) < 6.0
    assert 0.03 < float(found[2]) < 0.05  # an eighth of a byte for each of 272,640 parameters, twice over half of them
