"""An outer run that is interrupted and resumed ends bit for bit where the uninterrupted one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from outer_rig import train_outer
from rig import flat, make_model, train
from torch import Tensor, nn

from commopt import Run, attach
from commopt.errors import CheckpointError
from commopt.groups import SimGroup, SimWorld
from commopt.optim import SAVIC

Case = tuple[str, dict[str, Any]]
STEPS, SAVED_AT = 18, 8
TOP_K = {"compressor": "top_k", "density": 0.1}
DILOCO: Case = ("diloco", {})
CASES: list[Case] = [
    ("noloco", {}),
    ("noloco", {"delay": 4}),  # the round that began after step 6 is under way at 8
    ("noloco", {"gamma": 0.9, "delay": 4}),
    ("noloco", {"gamma": 1.0}),
    ("noloco", {"two_tensors": True}),
    ("noloco", {"group_size": 3}),
    ("noloco", {"message": "int8"}),
    ("noloco", {"message": TOP_K}),
    ("noloco", {"message": "sign", "delay": 4}),
    DILOCO,
    ("diloco", {"delay": 4}),
    ("diloco", {"outer": "yogi"}),
    ("diloco", {"outer": "adam"}),
    ("diloco", {"fragments": 2}),
    ("diloco", {"fragments": 2, "delay": 3, "message": "int8"}),
    ("diloco", {"message": "sign"}),
    ("diloco", {"message": "4bit", "fragments": 2}),
    ("diloco", {"message": TOP_K}),
    ("diloco", {"participation": 0.67}),
    ("local_sgd", {"average_state": ["exp_avg_sq"]}),
]


def start(group: SimGroup, case: Case) -> tuple[nn.Module, Run]:
    model = make_model()
    return model, attach(model, method_of(case), torch.optim.Adam(model.parameters(), lr=0.01), group=group)


def method_of(case: Case) -> dict[str, Any]:
    name, options = case
    return {"name": name, "every": 6, **options}


def trained(case: Case, kind: Any = torch.optim.Adam, **options: Any) -> list[Tensor]:
    """What three ranks end with."""
    return SimWorld[Tensor](3).run(lambda group: train_outer(group, method_of(case), STEPS, kind, **options)[0])


def check(case: Case, folder: Path, kind: Any = torch.optim.Adam, *moments: int) -> None:
    saves = {at: folder / str(at) for at in moments or (6, SAVED_AT)}  # a round has just ended, or is two steps old
    uninterrupted = trained(case, kind, saves=saves)
    for at, saved in saves.items():
        assert all(map(torch.equal, trained(case, kind, load_from=saved), uninterrupted)), at


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


def test_savic_takes_the_averaged_scale_after_a_checkpoint_right_after_a_round(tmp_path: Path) -> None:
    check(("local_sgd", {"every": 7, "average_state": ["exp_avg_sq"]}), tmp_path, SAVIC, 14)


def test_saving_changes_nothing(tmp_path: Path) -> None:
    case = ("noloco", {"message": "sign", "delay": 4})
    assert all(map(torch.equal, trained(case, saves={SAVED_AT: tmp_path / "saved"}), trained(case)))


def test_a_rank_that_resumes_behind_the_others_catches_up(tmp_path: Path) -> None:
    """One rank lost its checkpoint: it starts at step 0, sees where the others are, and takes over their place."""
    trained(DILOCO, saves={SAVED_AT: tmp_path / "saved"})

    def resume(group: SimGroup) -> int:
        model, run = start(group, DILOCO)
        if group.rank != 1:
            run.load(tmp_path / "saved")
        first = run.join()
        for step in run.range(STEPS):
            train(model, run.optimizer, group.rank, 1, step)
            group.advance(0.01)
        run.finish()
        return first

    first, late, third = SimWorld[int](3).run(resume)
    assert first == third == SAVED_AT < late


def test_another_outer_method_or_form_is_refused_before_anything_changes(tmp_path: Path) -> None:
    trained(DILOCO, saves={SAVED_AT: tmp_path / "saved"})

    def load(group: SimGroup) -> list[str]:
        said = []
        for case in (("noloco", {}), ("diloco", {"message": "int8"})):
            model, run = start(group, case)
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
