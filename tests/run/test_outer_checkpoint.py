"""An outer run that is interrupted and resumed ends bit for bit where the uninterrupted one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rig import flat, loss_of, make_batch, make_model
from torch import Tensor

from commopt import attach
from commopt.errors import CheckpointError
from commopt.groups import SimGroup, SimWorld
from commopt.optim.savic import SAVIC

STEPS, SAVED_AT = 40, 20

CASES: list[tuple[str, dict[str, Any]]] = [
    ("noloco", {"every": 6}),
    ("noloco", {"every": 6, "delay": 4}),  # the round that began after step 18 is under way at 20
    ("noloco", {"every": 6, "gamma": 0.9, "delay": 4}),
    ("noloco", {"every": 6, "message": "int8"}),
    ("diloco", {"every": 6, "delay": 4}),
    ("diloco", {"every": 6, "fragments": 2, "delay": 2}),
    ("diloco", {"every": 6, "outer": "yogi"}),
    ("diloco", {"every": 6, "message": "sign"}),
    ("local_sgd", {"every": 6, "average_state": ["exp_avg_sq"]}),
]


def train(
    group: SimGroup,
    case: tuple[str, dict[str, Any]],
    folder: Path | None,
    resumes: bool,
    optimizer_class: type[torch.optim.Adam] | type[SAVIC] = torch.optim.Adam,
) -> Tensor:
    name, options = case
    model = make_model()
    optimizer = optimizer_class(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 9, 0.7)
    run = attach(model, {"name": name, **options}, optimizer, group=group)
    if resumes:
        assert folder is not None
        schedule.load_state_dict(run.load(folder)["schedule"])
    assert run.join(schedule=schedule) == (SAVED_AT if resumes else 0)
    for step in run.range(STEPS):
        if step == SAVED_AT and folder is not None and not resumes:
            run.save(folder, extra={"schedule": schedule.state_dict()})
            run.close()
            return flat(model)
        x, y = make_batch(group.rank, step)
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
        schedule.step()
    run.finish()
    return flat(model)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(case: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    uninterrupted = SimWorld[Tensor](3).run(lambda group: train(group, case, None, False))
    SimWorld[Tensor](3).run(lambda group: train(group, case, tmp_path / "saved", False))
    resumed = SimWorld[Tensor](3).run(lambda group: train(group, case, tmp_path / "saved", True))
    for rank in range(3):
        assert torch.equal(resumed[rank], uninterrupted[rank]), f"rank {rank}"


def test_savic_takes_the_averaged_scale_where_a_checkpoint_lies_between_the_round_and_the_next_step(
    tmp_path: Path,
) -> None:
    case: tuple[str, dict[str, Any]] = ("local_sgd", {"every": 5, "average_state": ["exp_avg_sq"]})
    uninterrupted = SimWorld[Tensor](3).run(lambda group: train(group, case, None, False, SAVIC))
    SimWorld[Tensor](3).run(lambda group: train(group, case, tmp_path / "saved", False, SAVIC))
    resumed = SimWorld[Tensor](3).run(lambda group: train(group, case, tmp_path / "saved", True, SAVIC))
    assert all(torch.equal(a, b) for a, b in zip(resumed, uninterrupted, strict=True))


def test_a_rank_without_a_checkpoint_is_told_so(tmp_path: Path) -> None:
    def load(group: SimGroup) -> None:
        model = make_model()
        attach(model, "noloco", torch.optim.SGD(model.parameters(), lr=0.1), group=group).load(tmp_path)

    with pytest.raises(
        CheckpointError, match=r"rank0: there is no such folder; check the path, or start without a checkpoint"
    ):
        SimWorld[None](1).run(load)


def test_a_rank_that_resumes_behind_the_others_catches_up(tmp_path: Path) -> None:
    """One rank lost its checkpoint: it starts at step 0, sees where the others are, and takes over their place."""
    case: tuple[str, dict[str, Any]] = ("diloco", {"every": 6})
    SimWorld[Tensor](3).run(lambda group: train(group, case, tmp_path / "saved", False))

    def resume(group: SimGroup) -> tuple[int, Tensor]:
        model = make_model()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        run = attach(model, {"name": "diloco", "every": 6}, optimizer, group=group)
        if group.rank != 1:
            run.load(tmp_path / "saved")
        first = run.join()
        for step in run.range(STEPS):
            x, y = make_batch(group.rank, step)
            optimizer.zero_grad()
            loss_of(model(x), y).backward()
            optimizer.step()
            group.advance(0.01)
        run.finish()
        return first, flat(model)

    results = SimWorld[tuple[int, Tensor]](3).run(resume)
    assert results[0][0] == results[2][0] == SAVED_AT
    assert results[1][0] > SAVED_AT


def test_another_outer_method_or_form_is_refused_before_anything_changes(tmp_path: Path) -> None:
    SimWorld[Tensor](3).run(lambda group: train(group, ("diloco", {"every": 6}), tmp_path / "saved", False))

    def load(group: SimGroup) -> list[str]:
        said = []
        for choice in ({"name": "noloco", "every": 6}, {"name": "diloco", "every": 6, "message": "int8"}):
            model = make_model()
            run = attach(model, choice, torch.optim.Adam(model.parameters()), group=group)
            before = flat(model)
            with pytest.raises(CheckpointError) as caught:
                run.load(tmp_path / "saved")
            assert torch.equal(flat(model), before)
            assert run.steps == 0
            said.append(str(caught.value))
            run.close()
        return said

    for rank, (method, form) in enumerate(SimWorld[list[str]](3).run(load)):
        assert f"saved/rank{rank}: was saved under diloco, not noloco" in method
        assert "was saved with" in form
