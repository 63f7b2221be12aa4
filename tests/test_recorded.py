"""Every method's results are those recorded with version 0.1, bit for bit.

Bits depend on the processor and on torch's version. If plain torch does not reproduce its recorded bits here, losses are
compared instead: the first to 1e-4 and the last to 2 %, because one rounding may flip a sign on the way.
After a change that is meant to change results, run `python tests/recording.py` to record again.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from pool import Pool
from recording import CASES, RECORDED, label, on_gloo, plain_digest, summary, train

from commopt.groups import SimWorld

RECORD = json.loads(RECORDED.read_text(encoding="utf-8"))
IS_BITWISE = plain_digest() == RECORD["cases"]["dense"]["simulated"][0][2]


def check(found: list[list[Any]], recorded: list[list[Any]]) -> None:
    if IS_BITWISE:
        assert found == recorded
        return
    for one, other in zip(found, recorded, strict=True):
        assert one[0] == pytest.approx(other[0], rel=1e-4)
        assert one[1] == pytest.approx(other[1], rel=2e-2)


def test_every_case_is_recorded() -> None:
    assert [label(case) for case in range(len(CASES))] == list(RECORD["cases"])


@pytest.mark.parametrize("case", range(len(CASES)), ids=label)
def test_simulated_ranks_train_as_recorded(case: int) -> None:
    check(summary(SimWorld[Any](3).run(lambda group: train(group, case))), RECORD["cases"][label(case)]["simulated"])


@pytest.mark.parametrize("case", range(len(CASES)), ids=label)
def test_ranks_of_a_job_train_as_recorded(pool: Pool, case: int) -> None:
    check(summary(pool.run(2, on_gloo, case)), RECORD["cases"][label(case)]["gloo"])
