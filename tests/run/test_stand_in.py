"""The optimizer that steps for an update method: the groups, schedules and state_dict of the one whose place it takes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from rig import make_model, train_step
from torch import nn
from torch.optim import lr_scheduler

from commopt import Run, attach
from commopt.errors import AttachError
from commopt.groups import LocalGroup
from commopt.optim import LAMB, Lion
from commopt.run.stand_in import StandIn

ONEBIT = {"name": "onebit_adam", "freeze_step": 2}
STEPS = 6
halving = partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.5**step)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    first, *rest = model.parameters()
    groups: list[dict[str, Any]] = [{"params": [first], "lr": np.float64(0.02)}, {"params": rest}, {"params": []}]
    return torch.optim.Adam(groups, lr=0.01)


def started(make: Callable[[nn.Module], torch.optim.Optimizer] = adam) -> tuple[nn.Module, torch.optim.Optimizer, Run]:
    model = make_model()
    optimizer = make(model)
    return model, optimizer, attach(model, ONEBIT, optimizer, group=LocalGroup())


def train(model: nn.Module, optimizer: Any, steps: int, schedule: Any = None) -> list[float]:
    """The first group's rate before each step."""
    rates = []
    for step in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        train_step(model, optimizer, 0, step)
        if schedule is not None:
            schedule.step()
    return rates


def test_its_groups_are_those_of_the_optimizer() -> None:
    _, optimizer, run = started()
    assert isinstance(run.optimizer, StandIn)
    assert run.optimizer.param_groups is optimizer.param_groups
    optimizer.param_groups[0]["lr"] = 0.5
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.5, 0.01, 0.01]
    assert run.method.settings("0.weight")["lr"] == 0.5  # type: ignore[attr-defined]


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=STEPS + 1)  # which moves betas, too


def a_sequence(optimizer: torch.optim.Optimizer) -> Any:
    parts = [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


@pytest.mark.parametrize("when", ["before", "after", "after, of run.optimizer"])
@pytest.mark.parametrize("make_schedule", [halving, one_cycle, a_sequence])
def test_a_schedule_works_whenever_it_was_made(make_schedule: Callable[[Any], Any], when: str) -> None:
    model, other = make_model(), make_model()
    optimizer = adam(model)
    schedule = make_schedule(optimizer) if when == "before" else None
    run = attach(model, ONEBIT, optimizer, group=LocalGroup())
    if schedule is None:
        schedule = make_schedule(optimizer if when == "after" else run.optimizer)
    alone = adam(other)
    expected = train(other, alone, STEPS, make_schedule(alone))
    assert train(model, run.optimizer, STEPS, schedule) == expected  # and no warning of a step that was not made
    assert len(set(expected)) > 2


def test_a_state_dict_brings_state_and_settings_back() -> None:
    model, _, run = started()
    train(model, run.optimizer, 3)
    run.optimizer.param_groups[1]["lr"] = 0.003
    saved, weights = run.optimizer.state_dict(), model.state_dict()
    other, optimizer, twin = started()
    twin.optimizer.load_state_dict(saved)
    other.load_state_dict(weights)
    assert optimizer.param_groups[1]["lr"] == 0.003
    train(model, run.optimizer, 3)
    train(other, twin.optimizer, 3)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


GOES_ON: list[tuple[str, dict[str, Any], Any]] = [
    ("onebit_adam", {"freeze_step": 5}, torch.optim.AdamW),
    ("zero_one_adam", {"var_freeze_step": 5}, torch.optim.Adam),
    ("onebit_lamb", {"freeze_step": 5}, LAMB),
    ("distributed_lion", {}, Lion),
]


@pytest.mark.parametrize("is_attached_first", [True, False])
@pytest.mark.parametrize(("name", "options", "kind"), GOES_ON, ids=[name for name, *_ in GOES_ON])
def test_an_optimizers_run_goes_on_under_a_method(
    name: str, options: dict[str, Any], kind: Any, is_attached_first: bool
) -> None:
    model = make_model()
    alone = kind(model.parameters(), lr=0.01)
    train(model, alone, 4)
    other = copy.deepcopy(model)
    optimizer = kind(other.parameters(), lr=0.5 if is_attached_first else 0.01)
    if not is_attached_first:
        optimizer.load_state_dict(alone.state_dict())
    run: Any = attach(other, {"name": name, **options}, optimizer, group=LocalGroup())
    if is_attached_first:
        train(other, run.optimizer, 6)  # and forget all of it
        other.load_state_dict(model.state_dict())
        run.optimizer.load_state_dict(alone.state_dict())
    train(model, alone, 1)
    train(other, run.optimizer, 1)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    if options:  # the steps before count as a warm-up
        assert (run.method.applied_steps, run.method.is_frozen) == (5, True)
    train(other, run.optimizer, 3)


@pytest.mark.parametrize(
    ("name", "own", "theirs"),
    [
        ("onebit_adam", torch.optim.Adam, partial(torch.optim.SGD, momentum=0.9)),
        ("onebit_adam", torch.optim.Adam, partial(torch.optim.Adam, amsgrad=True)),
        ("zero_one_adam", torch.optim.Adam, partial(Lion, lr=1e-3)),
        ("distributed_lion", Lion, torch.optim.AdamW),
        ("demo", torch.optim.SGD, torch.optim.AdamW),
    ],
)
def test_a_state_that_a_method_has_no_place_for_is_refused_and_changes_nothing(
    name: str, own: Any, theirs: Any
) -> None:
    model = make_model()
    alone = theirs(model.parameters())
    train(model, alone, 1)
    run = attach(model, name, own(model.parameters(), lr=0.5), group=LocalGroup())
    with pytest.raises(
        ValueError, match=f"{name} cannot go on from a state of .*: it takes over .*; load only the model"
    ):
        run.optimizer.load_state_dict(alone.state_dict())
    assert run.optimizer.param_groups[0]["lr"] == 0.5


def test_groups_of_other_sizes_are_refused() -> None:
    run, other = started()[2], started(lambda model: torch.optim.Adam([{"params": [p]} for p in model.parameters()]))[2]
    with pytest.raises(ValueError, match="parameter group that doesn't match"):
        run.optimizer.load_state_dict(other.optimizer.state_dict())


def test_the_optimizer_refuses_to_step_and_to_load_until_close() -> None:
    model, optimizer, run = started()
    saved = optimizer.state_dict()
    with pytest.raises(AttachError, match=r"onebit_adam has taken the place of this Adam: step run\.optimizer"):
        optimizer.step()
    with pytest.raises(AttachError, match=r"onebit_adam has taken the place of this Adam: load into run\.optimizer"):
        optimizer.load_state_dict(saved)
    run.close()
    optimizer.load_state_dict(saved)
    train(model, optimizer, 1)
    with pytest.raises(AttachError, match=r"step\(\) after close\(\)"):
        run.optimizer.step()
