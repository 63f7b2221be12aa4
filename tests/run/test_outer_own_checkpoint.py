"""Checkpoints that a script makes itself: `join` is told how many steps they have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from outer_rig import EVERY, STEP_S, Diary
from rig import make_model

from commopt import attach
from commopt.errors import AttachError, ConfigError
from commopt.groups import SimGroup, SimWorld


def test_a_run_begins_at_the_step_of_the_scripts_own_checkpoint() -> None:
    diaries = [Diary(), Diary()]

    def train(group: SimGroup) -> None:
        model = make_model()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(group.rank)  # as replicas differ in a job's middle
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        run: Any = attach(model, {"name": "noloco", "every": EVERY}, optimizer, group=group)
        own = run.flat()
        assert run.join(step=27) == run.steps == 27
        assert torch.equal(run.flat(), own)
        assert torch.equal(run.method.state["slow"], own)
        diary = diaries[group.rank]
        diary.run = run
        for step in run.range(40):
            diary.seen.append(step)
            optimizer.step()
        run.finish()

    SimWorld[None](2).run(train)
    for diary in diaries:
        assert diary.seen == list(range(27, 40))
        assert [(report.step, report.round, report.members) for report in diary.reports] == [
            (30, 5, [0, 1]),
            (35, 6, [0, 1]),
            (40, 7, [0, 1]),
        ]


def test_a_member_that_is_behind_the_others_checkpoint_catches_up() -> None:
    seen: list[list[int]] = [[], []]

    def train(group: SimGroup) -> None:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        run: Any = attach(model, {"name": "noloco", "every": EVERY}, optimizer, group=group)
        run.join(step=[27, 12][group.rank])
        for step in run.range(60):
            seen[group.rank].append(step)
            group.advance(STEP_S)
            optimizer.step()

    SimWorld[None](2).run(train)
    assert seen[0] == list(range(27, 60))
    assert seen[1][0] >= 27


@pytest.mark.parametrize("method", ["noloco", "dense", "onebit_adam"])
def test_any_method_begins_at_that_step(method: str) -> None:
    model = make_model()
    run: Any = attach(model, method, torch.optim.Adam(model.parameters()))
    assert run.join(step=5) == 5
    assert next(iter(run.range(7))) == 5
    with pytest.raises(AttachError, match=r"join: step=7, but this run has made or loaded 5 steps; leave step out"):
        run.join(step=7)
    for wrong in (-1, 1.5, True, "5"):
        with pytest.raises(ConfigError, match=r"step: .* is out of range; write a whole number of optimizer steps"):
            run.join(step=wrong)
    run.close()
