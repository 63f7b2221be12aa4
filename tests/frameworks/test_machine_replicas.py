"""Two machines of two ranks: outer methods with DDP or FSDP2 inside each, and other methods at two levels under DDP."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import level_rig
import pytest
import torch
import torch.distributed as dist
from fsdp_rig import mesh_of
from presets import Preset, sgd
from rig import flat, loss_of, make_batch, make_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import commopt
from commopt.errors import AttachError
from commopt.groups import SimGroup, SimWorld

STEPS, SAVED_AT = 8, 4
on_four_ranks = pytest.mark.ranks("fsdp", 4)


def wrapped(kind: str) -> tuple[nn.Module, nn.Module]:
    """The model as it is attached, and the one whose parameters train."""
    model = make_model()
    if kind == "ddp":
        return DistributedDataParallel(model, process_group=mesh_of(2, 2).get_group("shard")), model
    mesh = mesh_of(2, 2)["shard"] if kind == "fsdp" else _both_inside()
    for part in (*model, model):
        fully_shard(part, mesh=mesh)
    return model, model


@functools.cache
def _both_inside() -> Any:
    """A mesh of the two ranks of a machine, which hold the same shard."""
    return init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("machines", "replicate", "shard"))["replicate", "shard"]


def whole(model: nn.Module) -> Tensor:
    return torch.cat(
        [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().flatten() for p in model.parameters()]
    )


def train(model: Any, run: Any, batches: list[int], steps: range, save_at: Path | None = None) -> None:
    for step in steps:
        if step == SAVED_AT and save_at is not None:
            run.save(save_at)
        run.optimizer.zero_grad()
        for batch in batches:
            x, y = make_batch(batch, step)
            loss_of(model(x), y).backward()
        for p in model.parameters() if len(batches) > 1 else ():
            p.grad = p.grad / len(batches)
        run.optimizer.step()


def attached(model: nn.Module, inner: nn.Module, name: str, group: Any = None) -> Any:
    method = {"name": name, "every": 4}
    return commopt.attach(model, method, torch.optim.Adam(inner.parameters(), lr=0.01), group=group)


def alone(name: str, group: SimGroup, folder: Path | None = None) -> Tensor:
    """A machine's training in one process, from a checkpoint if there is a folder."""
    model = make_model()
    run = attached(model, model, name, group)
    if folder is not None:
        run.load(folder)
    train(model, run, [2 * group.rank, 2 * group.rank + 1], range(run.join(), STEPS))
    return flat(model)


@on_four_ranks
@pytest.mark.parametrize(
    ("name", "kind"), [("noloco", "ddp"), ("noloco", "fsdp"), ("noloco", "hsdp"), ("diloco", "ddp"), ("diloco", "fsdp")]
)
def test_a_machine_is_one_replica_and_goes_on_from_a_checkpoint(name: str, kind: str, tmp_path: Path) -> None:
    rank, expected = dist.get_rank(), SimWorld[Tensor](2).run(lambda group: alone(name, group))
    for first, folder in ((0, tmp_path), (SAVED_AT, None)):
        model, inner = wrapped(kind)
        run = attached(model, inner, name)
        assert (run.rank, run.ranks, run.replica) == (rank, 4, rank // 2)
        if first:
            run.load(tmp_path)
        assert run.join() == first
        train(model, run, [rank], range(first, STEPS), folder)
        assert torch.equal(whole(inner), expected[rank // 2])
        run.close()


@on_four_ranks
def test_what_one_framework_saved_the_other_continues_on_other_ranks(tmp_path: Path) -> None:
    expected = SimWorld[Tensor](2).run(lambda group: alone("noloco", group))
    model, inner = wrapped("fsdp")
    run = attached(model, inner, "noloco")
    run.join()
    train(model, run, [dist.get_rank()], range(STEPS), tmp_path)
    run.close()
    resumed = SimWorld[Tensor](2).run(lambda group: alone("noloco", group, tmp_path))
    assert all(torch.equal(x, y) for x, y in zip(resumed, expected, strict=True))


@on_four_ranks
def test_one_machine_of_all_ranks_has_no_other_to_average_with() -> None:
    model = make_model()
    with pytest.raises(
        AttachError, match=r"noloco on a DistributedDataParallel model.*commopt.wrap\(model, 'noloco'\)"
    ):
        attached(DistributedDataParallel(model), model, "noloco")
    model = make_model()
    fully_shard(model, mesh=mesh_of(4))
    with pytest.raises(AttachError, match="noloco on a model that FSDP2 shards over all ranks"):
        attached(model, model, "noloco")


# -- two levels under DDP, as torchrun numbers machines


@on_four_ranks
@pytest.mark.parametrize("case", [("ef_sign", {}), ("dgc", {"density": 0.1}), ("powersgd", {"rank": 2})])
def test_levels_are_found_as_the_launcher_numbers_machines(case: tuple[str, dict[str, Any]]) -> None:
    preset, net, rank = Preset(*case, sgd(0.05)), level_rig.Net(), dist.get_rank()
    model = DistributedDataParallel(net, bucket_cap_mb=0.01)
    with level_rig.machine(rank // 2):
        run = commopt.attach(model, preset.method(), preset.optimizer(net))
    assert (run.group.per_machine, run.rank, run.ranks) == (2, rank, 4)
    for step in range(4):
        run.optimizer.zero_grad()
        model(*(level_rig.gradient(rank, step, k, p.shape) for k, p in enumerate(net.parameters()))).backward()
        run.optimizer.step()
    assert run.replicas_are_equal()
    run.close()
    one_each = SimWorld[Tensor](2).run(
        lambda group: level_rig.train(level_rig.start(preset, group), range(4), [2 * group.rank, 2 * group.rank + 1])[0]
    )
    torch.testing.assert_close(flat(net), one_each[0], rtol=0, atol=1e-6)


@on_four_ranks
def test_machines_of_different_sizes_and_one_alone_exchange_between_single_ranks() -> None:
    for number in (min(dist.get_rank() // 3, 1), 0):
        net = level_rig.Net()
        with level_rig.machine(number):
            run = commopt.attach(net, "dense", torch.optim.SGD(net.parameters(), lr=0.1))
        assert run.group.per_machine == 1
        run.close()
