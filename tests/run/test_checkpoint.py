"""Saving and resuming: bit for bit at the same size, with nothing lost at another."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from commopt import build
from commopt.errors import CheckpointError
from commopt.frameworks import ddp, plain
from commopt.groups import LocalGroup, TorchGroup
from commopt.run import checkpoint
from commopt.run.base import Attachment

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("dense", {}),
    ("ef_sign", {}),
    ("ef_sign", {"scale": "l2"}),
    ("onebit_adam", {"freeze_step": 3}),
    ("onebit_adam", {"freeze_step": 8}),
    ("onebit_adam", {"freeze_step": "auto", "betas": [0.9, 0.75]}),
]


def attached(
    pg: Any, name: str, options: dict[str, Any], wrapper: str, seed: int = 0, width: int = 33
) -> tuple[nn.Module, Attachment]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(21, width), nn.Dropout(0.1), nn.Tanh(), nn.Linear(width, 7))
    method = build(name, model.named_parameters(), **options)
    own = isinstance(method, torch.optim.Optimizer)
    optimizer = None if own else torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if wrapper == "plain":
        return model, plain.attach(model, method, optimizer, TorchGroup(pg))
    wrapped = DistributedDataParallel(model, process_group=pg, bucket_cap_mb=1)
    return wrapped, ddp.attach(wrapped, method, optimizer, TorchGroup(pg))


def train(model: nn.Module, attachment: Attachment, first: int, last: int) -> None:
    for step in range(first, last):
        data = torch.Generator().manual_seed(100 * step + attachment.group.rank)
        x = torch.randn(8, 21, generator=data)
        attachment.optimizer.zero_grad()
        (model(x) - x[:, :7]).square().mean().backward()
        attachment.optimizer.step()


def parameters(attachment: Attachment) -> Tensor:
    return torch.cat([p.detach().view(-1).clone() for p in attachment.parameters.values()])


def continued_and_resumed(pg: Any, folder: str, name: str, options: dict[str, Any], wrapper: str) -> tuple[bool, bool]:
    model, attachment = attached(pg, name, options, wrapper)
    train(model, attachment, 0, 5)
    checkpoint.save(folder, attachment, extra={"step": 5})
    train(model, attachment, 5, 12)
    torch.manual_seed(99)
    again, resumed = attached(pg, name, options, wrapper, seed=7)
    extra = checkpoint.load(folder, resumed)
    assert extra == {"step": 5}
    train(again, resumed, 5, 12)
    states = [a.method.comm_state()["local"] for a in (attachment, resumed)]
    same_residuals = all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    attachment.detach()
    resumed.detach()
    return torch.equal(parameters(attachment), parameters(resumed)), same_residuals


@pytest.mark.parametrize("wrapper", ["plain", "ddp"])
@pytest.mark.parametrize(("name", "options"), METHODS)
def test_resume_is_bitwise(pool: Pool, tmp_path: Path, name: str, options: dict[str, Any], wrapper: str) -> None:
    for n in (1, 3):
        results = pool.run(n, continued_and_resumed, str(tmp_path / f"c{n}"), name, options, wrapper)
        assert results == [(True, True)] * n


def saved_total(pg: Any, folder: str) -> Tensor:
    model, attachment = attached(pg, "ef_sign", {}, "plain")
    train(model, attachment, 0, 4)
    checkpoint.save(folder, attachment)
    total = still_to_send(attachment)
    attachment.detach()
    return total


def loaded_total(pg: Any, folder: str) -> Tensor:
    _, attachment = attached(pg, "ef_sign", {}, "plain", seed=3)
    checkpoint.load(folder, attachment)
    total = still_to_send(attachment)
    attachment.detach()
    return total


def still_to_send(attachment: Attachment) -> Tensor:
    """(d,) mean worker residual plus the server residuals at the places that they are served from."""
    method: Any = attachment.method
    total: Tensor = method.worker.residual.clone()
    attachment.group.all_reduce(total)
    total /= attachment.group.size
    served = torch.zeros_like(total)
    start = 0
    for home, n in zip(*(lambda b: (b.starts, b.lengths))(method.table.at_home(attachment.group.rank)), strict=True):
        served[home : home + n] = method.server.residual[start : start + n]
        start += n
    attachment.group.all_reduce(served)
    return total + served


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 5), (3, 1), (1, 3)])
def test_another_world_size_loses_no_residual(pool: Pool, tmp_path: Path, before: int, after: int) -> None:
    saved = pool.run(before, saved_total, str(tmp_path / "c"))[0]
    loaded = pool.run(after, loaded_total, str(tmp_path / "c"))[0]
    assert before == 1 or saved.abs().max() > 0
    torch.testing.assert_close(loaded, saved, rtol=1e-5, atol=1e-7)


def refusals(pg: Any, folder: str) -> list[str]:
    model, attachment = attached(pg, "ef_sign", {}, "plain")
    train(model, attachment, 0, 2)
    checkpoint.save(folder, attachment)
    messages = []
    others: list[tuple[str, dict[str, Any], int, str]] = [
        ("dense", {}, 33, folder),
        ("ef_sign", {}, 34, folder),
        ("ef_sign", {"block_size": 512}, 33, folder),
        ("ef_sign", {}, 33, folder + "-none"),
    ]
    for name, options, width, where in others:
        _, other = attached(pg, name, options, "plain", width=width)
        before = parameters(other)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(where, other)
        assert torch.equal(before, parameters(other))
        messages.append(str(caught.value))
        other.detach()
    extra = {"a": print} if attachment.group.rank == 0 else {}
    for where, what in ((folder, extra), (__file__, {}), (__file__ + "/c", {})):
        with pytest.raises(CheckpointError) as caught:
            checkpoint.save(where, attachment, extra=what)
        messages.append(str(caught.value))
    attachment.detach()
    return messages


def test_what_does_not_belong_is_refused_and_changes_nothing(pool: Pool, tmp_path: Path) -> None:
    ranks = pool.run(2, refusals, str(tmp_path / "c"))
    method, model, form, missing, extra, is_file, in_file = ranks[0]
    assert "was saved under ef_sign, not dense" in method
    assert "0.weight of shape (33, 21)" in model
    assert "BlockSign(block_size=512)" in form
    assert "no complete checkpoint here" in missing
    assert "weights_only" in extra
    assert "is as it was" in extra
    assert "other ranks failed" in ranks[1][4]
    assert "is a file" in is_file
    assert "could not be written" in in_file


def scheduled(pg: Any, folder: str) -> bool:
    model, attachment = attached(pg, "onebit_adam", {"freeze_step": 3, "lr": 0.01}, "plain")
    options: dict[str, Any] = {"max_lr": 0.1, "total_steps": 12}
    schedule = torch.optim.lr_scheduler.OneCycleLR(attachment.optimizer, **options)
    steps = torch.optim.lr_scheduler.MultiStepLR(attachment.optimizer, milestones=[7, 9])
    for step in range(5):
        train(model, attachment, step, step + 1)
        schedule.step()
        steps.step()
    checkpoint.save(folder, attachment, extra={"cycle": schedule.state_dict(), "steps": steps.state_dict()})
    again, resumed = attached(pg, "onebit_adam", {"freeze_step": 3, "lr": 0.01}, "plain", seed=5)
    cycle = torch.optim.lr_scheduler.OneCycleLR(resumed.optimizer, **options)
    more = torch.optim.lr_scheduler.MultiStepLR(resumed.optimizer, milestones=[7, 9])
    extra = checkpoint.load(folder, resumed)
    cycle.load_state_dict(extra["cycle"])
    more.load_state_dict(extra["steps"])
    torch_state = torch.get_rng_state()
    for a, b, c, d in ((model, attachment, schedule, steps), (again, resumed, cycle, more)):
        torch.set_rng_state(torch_state)
        for step in range(5, 11):
            train(a, b, step, step + 1)
            c.step()
            d.step()
    attachment.detach()
    resumed.detach()
    return torch.equal(parameters(attachment), parameters(resumed))


def test_learning_rate_schedules_go_on(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(2, scheduled, str(tmp_path / "c")) == [True, True]


def failed_save(pg: Any, folder: str) -> tuple[str, bool]:
    model, attachment = attached(pg, "ef_sign", {}, "plain")
    checkpoint.save(folder, attachment, extra={"step": 0})
    train(model, attachment, 0, 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # what a write meets on a full disk, at the kilobyte
    try:
        with pytest.raises(CheckpointError) as caught:
            checkpoint.save(folder, attachment, extra={"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept = checkpoint.load(folder, attachment) == {"step": 0}
    attachment.detach()
    return str(caught.value), kept and not Path(folder).with_name("c.partial").exists()


def test_a_full_disk_leaves_the_checkpoint_before(pool: Pool, tmp_path: Path) -> None:
    for message, kept in pool.run(2, failed_save, str(tmp_path / "c")):
        assert "could not be written" in message
        assert "is as it was" in message
        assert kept


def test_a_job_killed_between_two_renames_goes_on_from_the_checkpoint_before(tmp_path: Path) -> None:
    folder, model = tmp_path / "c", nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attachment = plain.attach(model, build("ef_sign"), optimizer, LocalGroup())
    checkpoint.save(folder, attachment, extra={"step": 1})
    folder.rename(tmp_path / "c.old")  # as far as the kill let it come
    assert checkpoint.load(folder, attachment) == {"step": 1}
    checkpoint.save(folder, attachment, extra={"step": 2})
    assert checkpoint.load(folder, attachment) == {"step": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]
