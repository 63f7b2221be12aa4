"""Saving and resuming: bit for bit at the same size, with nothing lost at another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from block_values import still_to_send
from pool import Pool
from presets import ADAM, PRESETS, Preset
from rig import flat, make_model, train
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from commopt import Run
from commopt.errors import CheckpointError
from commopt.groups import Group, LocalGroup, SimGroup, SimWorld, TorchGroup

EF_SIGN = Preset("ef_sign")
IN_JOBS = [
    Preset("dense"),
    EF_SIGN,
    Preset("onebit_adam", {"freeze_step": 3}, ADAM),
    Preset("onebit_adam", {"freeze_step": "auto"}, {**ADAM, "betas": [0.9, 0.75]}),
]


def attached(group: Group, preset: Preset, model: nn.Module | None = None) -> tuple[nn.Module, Run]:
    model = make_model() if model is None else model
    return model, preset.attach(model, group)


def another(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same model with other parameters."""
    model = make_model(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.neg_()
    return model


def steps(model: nn.Module, run: Run, first: int, last: int, schedules: Sequence[Any] = ()) -> None:
    for step in range(first, last):
        train(model, run.optimizer, run.rank, 1, step)
        for schedule in schedules:
            schedule.step()


def continued_and_resumed(
    group: Group,
    folder: Path,
    preset: Preset,
    in_ddp: Any = None,
    dtype: torch.dtype = torch.float32,
    schedules_of: Callable[[torch.optim.Optimizer], Sequence[Any]] = lambda _: (),
) -> list[str]:
    """What differs between a run that went on and one that was resumed; in_ddp: the process group of a DDP model."""

    def wrapped(model: nn.Module) -> nn.Module:
        return model if in_ddp is None else DistributedDataParallel(model, process_group=in_ddp, bucket_cap_mb=1)

    model, run = attached(group, preset, wrapped(make_model(dtype)))
    schedules = schedules_of(run.optimizer)
    steps(model, run, 0, 5, schedules)
    run.save(folder, extra={"schedules": [one.state_dict() for one in schedules]})
    steps(model, run, 5, 12, schedules)
    again, resumed = attached(group, preset, wrapped(another(dtype)))
    schedules = schedules_of(resumed.optimizer)
    for one, state in zip(schedules, resumed.load(folder)["schedules"], strict=True):
        one.load_state_dict(state)
    assert resumed.join() == resumed.steps == 5
    steps(again, resumed, 5, 12, schedules)
    assert flat(again).dtype == dtype
    saved, other = run.method.saved(), resumed.method.saved()
    wrong = [key for held in saved for key in saved[held] if not torch.equal(saved[held][key], other[held][key])]
    run.close()
    resumed.close()
    return wrong + ([] if torch.equal(flat(model), flat(again)) else ["parameters"])


@pytest.mark.parametrize("preset", PRESETS, ids=str)
def test_every_method_resumes_bitwise(tmp_path: Path, preset: Preset) -> None:
    assert SimWorld[list[str]](3).run(lambda group: continued_and_resumed(group, tmp_path / "c", preset)) == [[]] * 3


def resumed_in_ddp(pg: Any, folder: str, preset: Preset) -> list[str]:
    return continued_and_resumed(TorchGroup(pg), Path(folder), preset, pg)


@pytest.mark.parametrize("preset", IN_JOBS, ids=str)
def test_a_job_resumes_bitwise(pool: Pool, tmp_path: Path, preset: Preset) -> None:
    for n in (1, 3):
        assert pool.run(n, resumed_in_ddp, str(tmp_path / f"c{n}"), preset) == [[]] * n


# -- another number of ranks


RESIDUALS = [EF_SIGN, Preset("ef_sign", {"block_size": 16}), Preset("ef_sign", {"scale": "l2"})]
RESIDUALS += [Preset("two_way", {"worker": "sign", "server": "bf16"})]


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 5), (3, 1), (1, 3)])
@pytest.mark.parametrize("preset", RESIDUALS, ids=str)
def test_another_world_size_loses_no_residual(tmp_path: Path, preset: Preset, before: int, after: int) -> None:
    def save(group: SimGroup) -> Any:
        model, run = attached(group, preset)
        steps(model, run, 0, 4)
        run.save(tmp_path / "c")
        return run.method

    def load(group: SimGroup) -> Any:
        _, run = attached(group, preset, another())
        run.load(tmp_path / "c")
        return run.method

    saved, loaded = still_to_send(SimWorld[Any](before).run(save)), still_to_send(SimWorld[Any](after).run(load))
    assert before == 1 or saved.abs().max() > 0
    torch.testing.assert_close(loaded, saved, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("preset", PRESETS, ids=str)
def test_every_method_goes_on_with_another_number_of_ranks(tmp_path: Path, preset: Preset) -> None:
    def save(group: SimGroup) -> Tensor:
        model, run = attached(group, preset)
        steps(model, run, 0, 6)
        run.finish()  # local steps have moved replicas apart
        run.save(tmp_path / "c")
        return flat(model)

    def load(group: SimGroup) -> tuple[Tensor, bool]:
        model, run = attached(group, preset, another())
        run.load(tmp_path / "c")
        loaded = flat(model)
        assert run.steps == 6
        steps(model, run, 6, 9)
        run.finish()
        return loaded, run.replicas_are_equal() and bool(flat(model).isfinite().all())

    saved = SimWorld[Tensor](3).run(save)[0]
    for loaded, is_sound in SimWorld[Any](2).run(load):
        assert torch.equal(loaded, saved)
        assert is_sound


# -- what does not belong


OTHERS: list[tuple[Preset, Callable[[], nn.Module], str]] = [
    (Preset("dense"), another, "was saved under ef_sign, not dense"),
    (
        EF_SIGN,
        lambda: nn.Sequential(nn.Linear(12, 41), nn.Linear(41, 4)),
        r"is of another model: .*0.weight of shape \(40, 12\)",
    ),
    (Preset("ef_sign", {"block_size": 512}), another, r"was saved with .*512"),
    (Preset("ef_sign", {}, {"name": "adam", "lr": 0.1}), another, "was saved with the optimizer SGD, not Adam"),
]


@pytest.mark.parametrize(("preset", "make", "said"), OTHERS, ids=[said[:25] for _, _, said in OTHERS])
def test_what_does_not_belong_is_refused_on_all_ranks_and_changes_nothing(
    tmp_path: Path, preset: Preset, make: Callable[[], nn.Module], said: str
) -> None:
    def work(group: SimGroup) -> None:
        model, run = attached(group, EF_SIGN)
        steps(model, run, 0, 2)
        run.save(tmp_path / "c")
        other_model, other = attached(group, preset, make())
        steps(other_model, other, 0, 1)
        before = flat(other_model)
        state = {key: x.clone() for tensors in other.method.saved().values() for key, x in tensors.items()}
        with pytest.raises(CheckpointError, match=said):
            other.load(tmp_path / "c")
        assert torch.equal(before, flat(other_model))
        assert other.steps == 1
        after = {key: x for tensors in other.method.saved().values() for key, x in tensors.items()}
        assert all(torch.equal(state[key], after[key]) for key in after)

    SimWorld[None](2).run(work)


def test_a_rank_that_differs_stops_all_of_them(tmp_path: Path) -> None:
    def work(group: SimGroup) -> str:
        model, run = attached(group, EF_SIGN)
        run.save(tmp_path / "c")
        if group.rank == 1:
            model.register_buffer("late", torch.zeros(3))
        with pytest.raises(CheckpointError) as caught:
            run.load(tmp_path / "c")
        return str(caught.value)

    for said in SimWorld[str](2).run(work):
        assert "rank 1: " in said
        assert "is of another model: it has nothing where this one has late of shape (3,)" in said


def test_what_cannot_be_stored_is_refused_on_all_ranks(tmp_path: Path) -> None:
    def work(group: SimGroup) -> str:
        _, run = attached(group, EF_SIGN)
        run.save(tmp_path / "c", extra={"step": 1})
        with pytest.raises(CheckpointError) as caught:
            run.save(tmp_path / "c", extra={"a": print} if group.rank == 0 else {})
        assert run.load(tmp_path / "c") == {"step": 1}
        return str(caught.value)

    for said in SimWorld[str](2).run(work):
        assert "/a: builtin_function_or_method cannot be stored; use numbers, texts, lists, dicts and tensors" in said


@pytest.mark.parametrize(("preset", "is_lost"), [(IN_JOBS[0], False), (EF_SIGN, True), (IN_JOBS[2], True)], ids=str)
def test_a_resume_from_state_dict_alone_says_once_what_is_lost(
    preset: Preset, is_lost: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def work(group: SimGroup, loads: bool) -> None:
        model, run = attached(group, preset)
        steps(model, run, 0, 5)
        run.save(tmp_path)
        run.optimizer.load_state_dict(run.optimizer.state_dict())
        if loads:
            run.load(tmp_path)
        steps(model, run, 5, 7)

    SimWorld[None](2).run(lambda group: work(group, True))
    assert caplog.text == ""
    SimWorld[None](2).run(lambda group: work(group, False))
    assert caplog.text.count(f"without that of {preset.name}, whose residuals are lost") == is_lost
    assert len(caplog.records) == is_lost


# -- what a checkpoint holds


class Counter(nn.Module):
    """Counts its forwards, in a state that is a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(12, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        y: Tensor = self.linear(x)
        return y

    def get_extra_state(self) -> dict[str, Any]:
        return {"seen": self.seen, "last": torch.tensor([1.5, self.seen])}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        assert torch.equal(state["last"], torch.tensor([1.5, state["seen"]]))
        self.seen = state["seen"]


def test_a_models_extra_state_comes_back(tmp_path: Path) -> None:
    model, run = attached(LocalGroup(), EF_SIGN, Counter())
    steps(model, run, 0, 3)
    run.save(tmp_path / "c")
    again, resumed = attached(LocalGroup(), EF_SIGN, Counter())
    resumed.load(tmp_path / "c")
    assert again.seen == 3
    assert torch.equal(flat(model), flat(again))


@pytest.mark.parametrize(("dtype", "name"), [(torch.float64, "dense"), (torch.bfloat16, "ef_sign")], ids=str)
def test_parameters_keep_their_bits_in_any_precision(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    assert continued_and_resumed(LocalGroup(), tmp_path / "c", Preset(name), dtype=dtype) == []


def two_schedules(optimizer: torch.optim.Optimizer) -> list[Any]:
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=13)
    return [cycle, torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[7, 9])]


def test_learning_rate_schedules_go_on(tmp_path: Path) -> None:
    def work(group: SimGroup) -> list[str]:
        return continued_and_resumed(group, tmp_path / "c", IN_JOBS[2], schedules_of=two_schedules)

    assert SimWorld[list[str]](2).run(work) == [[], []]
