"""Saving and resuming: bit for bit at the same size, with nothing lost at another."""

from __future__ import annotations

import math
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from presets import ADAM, PRESETS, SGD, Preset
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from commopt import Run, attach
from commopt.errors import CheckpointError
from commopt.groups import Group, LocalGroup, SimGroup, SimWorld, TorchGroup
from commopt.optim import make_optimizer

EF_SIGN = Preset("ef_sign")
IN_JOBS = [
    Preset("dense"),
    EF_SIGN,
    Preset("onebit_adam", {"freeze_step": 3}, ADAM),
    Preset("onebit_adam", {"freeze_step": "auto"}, {**ADAM, "betas": [0.9, 0.75]}),
]


def attached(
    group: Group, preset: Preset, *, in_ddp: Any = None, seed: int = 0, width: int = 33
) -> tuple[nn.Module, Run]:
    """in_ddp: the process group of a DDP model."""
    model: nn.Module = nn.Sequential(nn.Linear(21, width), nn.Tanh(), nn.Linear(width, 7))
    fill(model, seed)
    if in_ddp is not None:
        model = DistributedDataParallel(model, process_group=in_ddp, bucket_cap_mb=1)
    return model, attach(model, preset.method(), preset.optimizer(model), group=group)


def fill(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)


def train(model: nn.Module, run: Run, first: int, last: int, dtype: torch.dtype = torch.float32) -> None:
    for step in range(first, last):
        data = torch.Generator().manual_seed(100 * step + run.rank)
        x = torch.randn(8, 21, generator=data).to(dtype)
        run.optimizer.zero_grad()
        (model(x) - x[:, :7]).square().mean().backward()
        run.optimizer.step()


def parameters(run: Run) -> Tensor:
    return torch.cat([p.detach().view(-1).clone() for p in run.parameters.values()])


def continued_and_resumed(group: Group, folder: Path, preset: Preset, in_ddp: Any = None) -> list[str]:
    """What differs between a run that went on and one that was resumed."""
    model, run = attached(group, preset, in_ddp=in_ddp)
    train(model, run, 0, 5)
    run.save(folder, extra={"step": 5})
    train(model, run, 5, 12)
    again, resumed = attached(group, preset, in_ddp=in_ddp, seed=7)
    assert resumed.load(folder) == {"step": 5}
    train(again, resumed, 5, 12)
    saved, other = run.method.saved(), resumed.method.saved()
    wrong = [key for held in saved for key in saved[held] if not torch.equal(saved[held][key], other[held][key])]
    run.close()
    resumed.close()
    return wrong + ([] if torch.equal(parameters(run), parameters(resumed)) else ["parameters"])


@pytest.mark.parametrize("preset", PRESETS, ids=str)
def test_every_method_resumes_bitwise(tmp_path: Path, preset: Preset) -> None:
    for n in (1, 3):
        folder = tmp_path / f"c{n}"
        found = SimWorld[list[str]](n).run(lambda group, folder=folder: continued_and_resumed(group, folder, preset))  # type: ignore[misc]
        assert found == [[]] * n


def resumed_in_a_job(pg: Any, folder: str, preset: Preset, in_ddp: bool) -> list[str]:
    return continued_and_resumed(TorchGroup(pg), Path(folder), preset, pg if in_ddp else None)


@pytest.mark.parametrize("in_ddp", [False, True], ids=["plain", "ddp"])
@pytest.mark.parametrize("preset", IN_JOBS, ids=str)
def test_a_job_resumes_bitwise(pool: Pool, tmp_path: Path, preset: Preset, in_ddp: bool) -> None:
    for n in (1, 3):
        assert pool.run(n, resumed_in_a_job, str(tmp_path / f"c{n}"), preset, in_ddp) == [[]] * n


# -- another number of ranks


def still_to_send(run: Any) -> Tensor:
    """(d,) mean worker residual plus the server residuals at the places that they are served from."""
    method = run.method
    total: Tensor = method.worker.residual.clone()
    run.group.all_reduce(total)
    total /= run.group.size
    served = torch.zeros_like(total)
    start = 0
    home = method.table.at_home(run.group.rank)
    for at, n in zip(home.starts, home.lengths, strict=True):
        served[at : at + n] = method.server.residual[start : start + n]
        start += n
    run.group.all_reduce(served)
    return total + served


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 5), (3, 1), (1, 3)])
def test_another_world_size_loses_no_residual(tmp_path: Path, before: int, after: int) -> None:
    def save(group: SimGroup) -> Tensor:
        model, run = attached(group, EF_SIGN)
        train(model, run, 0, 4)
        run.save(tmp_path / "c")
        return still_to_send(run)

    def load(group: SimGroup) -> Tensor:
        _, run = attached(group, EF_SIGN, seed=3)
        run.load(tmp_path / "c")
        return still_to_send(run)

    saved, loaded = SimWorld[Tensor](before).run(save)[0], SimWorld[Tensor](after).run(load)[0]
    assert before == 1 or saved.abs().max() > 0
    torch.testing.assert_close(loaded, saved, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("preset", PRESETS, ids=str)
def test_every_method_goes_on_with_another_number_of_ranks(tmp_path: Path, preset: Preset) -> None:
    def save(group: SimGroup) -> Tensor:
        model, run = attached(group, preset)
        train(model, run, 0, 6)
        run.finish()  # local steps have moved replicas apart
        run.save(tmp_path / "c")
        return parameters(run)

    def load(group: SimGroup) -> tuple[Tensor, bool]:
        model, run = attached(group, preset, seed=3)
        run.load(tmp_path / "c")
        loaded = parameters(run)
        assert run.steps == 6
        train(model, run, 6, 9)
        run.finish()
        return loaded, run.replicas_are_equal() and bool(parameters(run).isfinite().all())

    saved = SimWorld[Tensor](3).run(save)[0]
    for loaded, is_sound in SimWorld[Any](2).run(load):
        assert torch.equal(loaded, saved)
        assert is_sound


# -- what does not belong


OTHERS: list[tuple[Preset, dict[str, Any], str]] = [
    (Preset("dense"), {}, "was saved under ef_sign, not dense"),
    (EF_SIGN, {"width": 34}, r"is of another model: .*0.weight of shape \(33, 21\)"),
    (Preset("ef_sign", {"block_size": 512}), {}, r"was saved with .*512"),
    (Preset("ef_sign", {}, {"name": "adam", "lr": 0.1}), {}, "was saved with the optimizer SGD, not Adam"),
]


@pytest.mark.parametrize(("preset", "options", "said"), OTHERS, ids=[said[:25] for _, _, said in OTHERS])
def test_what_does_not_belong_is_refused_on_all_ranks_and_changes_nothing(
    tmp_path: Path, preset: Preset, options: dict[str, Any], said: str
) -> None:
    def work(group: SimGroup) -> None:
        model, run = attached(group, EF_SIGN)
        train(model, run, 0, 2)
        run.save(tmp_path / "c")
        other_model, other = attached(group, preset, seed=5, **options)
        train(other_model, other, 0, 1)
        before = parameters(other)
        state = {key: x.clone() for tensors in other.method.saved().values() for key, x in tensors.items()}
        with pytest.raises(CheckpointError, match=said):
            other.load(tmp_path / "c")
        assert torch.equal(before, parameters(other))
        assert other.steps == 1
        after = {key: x for tensors in other.method.saved().values() for key, x in tensors.items()}
        assert all(torch.equal(state[key], after[key]) for key in after)

    SimWorld[None](2).run(work)


def test_a_rank_that_differs_stops_all_of_them(tmp_path: Path) -> None:
    def work(group: SimGroup) -> str:
        model, run = attached(group, EF_SIGN)
        train(model, run, 0, 2)
        run.save(tmp_path / "c")
        if group.rank == 1:
            model.register_buffer("late", torch.zeros(3))
        before = parameters(run)
        with pytest.raises(CheckpointError) as caught:
            run.load(tmp_path / "c")
        assert torch.equal(before, parameters(run))
        return str(caught.value)

    for said in SimWorld[str](2).run(work):
        assert "rank 1: " in said
        assert "is of another model: it has nothing where this one has late of shape (3,)" in said


def test_what_cannot_be_stored_is_refused_on_all_ranks(tmp_path: Path) -> None:
    def work(group: SimGroup) -> list[str]:
        _, run = attached(group, EF_SIGN)
        run.save(tmp_path / "c", extra={"step": 1})
        said = []
        extra = {"a": print} if group.rank == 0 else {}
        for where, what in ((tmp_path / "c", extra), (Path(__file__), {}), (Path(__file__) / "c", {})):
            with pytest.raises(CheckpointError) as caught:
                run.save(where, extra=what)
            said.append(str(caught.value))
        assert run.load(tmp_path / "c") == {"step": 1}
        return said

    ranks = SimWorld[list[str]](2).run(work)
    assert (
        "/a: builtin_function_or_method cannot be stored; use numbers, texts, lists, dicts and tensors" in ranks[0][0]
    )
    assert all(len(said) == 3 for said in ranks)


# -- what a checkpoint holds


class Counter(nn.Module):
    """Counts its forwards, in a state that is a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(21, 7), 0

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
    model, again = Counter(), Counter()
    run = attach(model, "ef_sign", make_optimizer(SGD, model.parameters()), group=LocalGroup())
    train(model, run, 0, 3)
    run.save(tmp_path / "c")
    resumed = attach(again, "ef_sign", make_optimizer(SGD, again.parameters()), group=LocalGroup())
    resumed.load(tmp_path / "c")
    assert again.seen == 3
    assert torch.equal(parameters(run), parameters(resumed))


def test_extra_comes_back_as_it_was(tmp_path: Path) -> None:
    _, run = attached(LocalGroup(), EF_SIGN)
    half = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    extra: dict[str, Any] = {
        "losses": [1.0, math.inf, -math.inf],
        "betas": (0.9, (0.99, None)),
        "by step": {3: "three", (1, 2): [True]},
        "ema": {"weight": half, "bias": torch.zeros(0), "steps": torch.tensor(7)},
        "raw": b"\x00\xff",
        "float": {"float": "of the same name as a mark"},
    }
    run.save(tmp_path / "c", extra={**extra, "nan": math.nan})
    found = run.load(tmp_path / "c")
    assert math.isnan(found.pop("nan"))
    ema, expected = found.pop("ema"), extra.pop("ema")
    assert found == extra
    assert all(torch.equal(ema[key], expected[key]) and ema[key].dtype == expected[key].dtype for key in expected)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float64, "dense"), (torch.bfloat16, "ef_sign")], ids=str)
def test_parameters_keep_their_bits_in_any_precision(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    def made(seed: int) -> tuple[nn.Module, Run]:
        model = nn.Linear(21, 7)
        fill(model, seed)
        model.to(dtype)
        return model, attach(model, name, make_optimizer(SGD, model.parameters()), group=LocalGroup())

    model, run = made(0)
    train(model, run, 0, 3, dtype)
    run.save(tmp_path / "c")
    train(model, run, 3, 5, dtype)
    again, resumed = made(1)
    resumed.load(tmp_path / "c")
    train(again, resumed, 3, 5, dtype)
    assert parameters(resumed).dtype == dtype
    assert torch.equal(parameters(run), parameters(resumed))


def test_a_checkpoint_may_lie_behind_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    model, run = attached(LocalGroup(), EF_SIGN)
    for step in range(2):
        train(model, run, step, step + 1)
        run.save(tmp_path / "link" / "c", extra={"step": step})
    assert (tmp_path / "disk" / "c").is_dir()
    (tmp_path / "latest").symlink_to(tmp_path / "disk" / "c")
    assert run.load(tmp_path / "latest") == {"step": 1}


def test_learning_rate_schedules_go_on(tmp_path: Path) -> None:
    preset = Preset("onebit_adam", {"freeze_step": 3}, ADAM)

    def schedules(run: Run) -> list[Any]:
        cycle = torch.optim.lr_scheduler.OneCycleLR(run.optimizer, max_lr=0.1, total_steps=12)
        return [cycle, torch.optim.lr_scheduler.MultiStepLR(run.optimizer, milestones=[7, 9])]

    def go_on(model: nn.Module, run: Run, both: list[Any], first: int, last: int) -> None:
        for step in range(first, last):
            train(model, run, step, step + 1)
            for schedule in both:
                schedule.step()

    def work(group: SimGroup) -> bool:
        model, run = attached(group, preset)
        both = schedules(run)
        go_on(model, run, both, 0, 5)
        run.save(tmp_path / "c", extra={"schedules": [one.state_dict() for one in both]})
        again, resumed = attached(group, preset, seed=5)
        others = schedules(resumed)
        for one, state in zip(others, resumed.load(tmp_path / "c")["schedules"], strict=True):
            one.load_state_dict(state)
        go_on(model, run, both, 5, 11)
        go_on(again, resumed, others, 5, 11)
        return torch.equal(parameters(run), parameters(resumed))

    assert SimWorld[bool](2).run(work) == [True, True]


# -- what goes wrong


def failed_save(pg: Any, folder: str) -> tuple[str, bool]:
    model, run = attached(TorchGroup(pg), EF_SIGN)
    run.save(folder, extra={"step": 0})
    train(model, run, 0, 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # what a write meets on a full disk, at the kilobyte
    try:
        with pytest.raises(CheckpointError) as caught:
            run.save(folder, extra={"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept = run.load(folder) == {"step": 0}
    run.close()
    return str(caught.value), kept


def test_a_full_disk_leaves_the_checkpoint_before(pool: Pool, tmp_path: Path) -> None:
    for message, kept in pool.run(2, failed_save, str(tmp_path / "c")):
        assert "was not saved" in message
        assert kept
