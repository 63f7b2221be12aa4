"""Methods between the replicas of an FSDP2 model, on four ranks as two replicas of two shards."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from framework_ranks import run_program
from fsdp_rig import (
    Flats,
    assert_equal,
    assert_shards_of,
    attached,
    batch,
    mesh_of,
    sgd,
    sharded,
    shards,
    train,
    train_replica,
)
from pool import Pool
from rig import loss_of
from told import SLOW, Told
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import commopt
from commopt.cluster.machine import free_ports
from commopt.errors import CheckpointError, CommoptError, GradientsChanged
from commopt.groups import SimWorld, TorchGroup

STEPS = 5
METHODS: dict[str, dict[str, Any]] = {
    "ef_sign": {"name": "ef_sign", "block_size": 64},
    "two_way": {"name": "two_way(int8)"},
    "8-bit residuals": {"name": "two_way(4bit)", "residual_bits": 8},
    "dgc": {"name": "dgc", "density": 0.1, "warmup_steps": 2},
    "top_k": {"name": "top_k", "density": 0.1},
    "qsgd": {"name": "qsgd"},
    "powersgd": {"name": "powersgd", "rank": 2},
    "fp16": {"name": "fp16"},
    "onebit_adam": {"name": "onebit_adam", "freeze_step": 2, "block_size": 64},
    "zero_one_adam": {"name": "zero_one_adam", "var_freeze_step": 2, "local_step_scaler": 1, "local_step_clipper": 2},
    "distributed_lion": {"name": "distributed_lion"},
}
on_four_ranks = pytest.mark.ranks("fsdp", 4)


def train_sharded(case: str) -> Any:
    with attached(mesh_of(2, 2), METHODS[case]) as (model, optimizer, run):
        train(model, optimizer, dist.get_rank(), STEPS)
        assert run.replicas_are_equal() == getattr(run.method, "is_synchronised", True)
        return shards(model)


def train_by_auto() -> Any:
    with attached(mesh_of(2, 2), Told()) as (model, optimizer, run):
        run.method.times = {
            name: replace(one, step_s=one.step_s + 0.01 * dist.get_rank()) for name, one in SLOW.items()
        }
        train(model, optimizer, dist.get_rank(), 6)
        assert run.replicas_are_equal()
        return run.events, run.method.state["step_s"][2].item()


def test_the_shards_of_a_replica_choose_alike(fsdp_ranks: Pool) -> None:
    found = fsdp_ranks.run(4, train_by_auto)
    assert [told["now"] for _, told in found[0][0]] == ["two_way(4bit)", "two_way(int8)", "two_way(int8)"]
    assert all(one == found[0] for one in found)
    assert found[0][1] == SLOW["two_way(int8)"].step_s + 0.03  # of the slowest rank


def train_over_a_group() -> Any:
    """Shard over two ranks alone, and give attach the other dimension as a group."""
    mesh = mesh_of(2, 2)
    group = TorchGroup(mesh.get_group("replicate"))
    with attached(mesh["shard"], METHODS["two_way"], group=group) as (model, optimizer, run):
        train(model, optimizer, dist.get_rank(), STEPS)
        found = shards(model)
        assert run.group is group
        model.set_requires_all_reduce(False)
        with pytest.raises(CommoptError, match="set_requires_gradient_sync"):
            train(model, optimizer, dist.get_rank(), 1)
        return found


@pytest.mark.parametrize("case", [*METHODS, "two_way over a group that FSDP does not know"])
def test_a_method_between_replicas_is_the_method_on_each_shard(fsdp_ranks: Pool, case: str) -> None:
    method = METHODS[case.partition(" over")[0]]
    replicas = SimWorld[nn.Module](2).run(lambda group: train_replica(group, method, STEPS))
    found = fsdp_ranks.run(4, partial(train_sharded, case) if case in METHODS else train_over_a_group)
    for expected, shards_of_replica in zip(replicas, (found[:2], found[2:]), strict=True):
        assert_shards_of(expected, shards_of_replica, 2)


HALF = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "micro_batches"),
    [
        ({}, ""),
        ({}, "every backward"),
        ({}, "no sync"),
        ({}, "no all-reduce"),
        ({"mp_policy": HALF}, ""),
        ({"layers": ("first", "second", "last")}, ""),  # of the last the second shard has nothing
    ],
    ids=["", "every backward", "no sync", "no all-reduce", "mixed precision", "a shard has nothing of a unit"],
)
@on_four_ranks
def test_dense_is_what_fsdp_does_between_replicas(options: dict[str, Any], micro_batches: str) -> None:
    results, norms = [], []
    for is_ours in (True, False):
        model = sharded(mesh_of(2, 2), **options)
        optimizer = sgd(model)
        run = commopt.attach(model, "dense", optimizer, max_norm=0.5) if is_ours else None
        for step in range(3):
            optimizer.zero_grad()
            for micro in range(3 if micro_batches else 1):
                is_last = micro == 2 or not micro_batches
                if micro_batches == "no sync":
                    model.set_requires_gradient_sync(is_last)
                elif micro_batches == "no all-reduce":
                    model.set_requires_all_reduce(is_last)
                x, y = batch(dist.get_rank(), 10 * step + micro)
                loss_of(model(x), y).backward()
            norm: Any = nn.utils.clip_grad_norm_(model.parameters(), 0.5) if run is None else None
            optimizer.step()
            norms.append(float(norm.full_tensor()) if run is None else run.grad_norm)
        results.append(shards(model))
        if run is not None:
            calls = sum(n for (_, operation, _), n in run.traffic.calls.items() if operation == "all_reduce")
            units = 4 if "layers" in options and dist.get_rank() % 2 == 0 else 3
            assert calls == 3 * units * (3 if micro_batches == "every backward" else 1)
            run.close()
    assert_equal(*results)
    assert norms[:3] == norms[3:]


@on_four_ranks
def test_a_second_exchange_before_the_step_is_refused_where_state_is_kept() -> None:
    with attached(mesh_of(2, 2), "two_way(int8)") as (model, _optimizer, _run):
        x, y = batch(dist.get_rank(), 0)
        loss_of(model(x), y).backward()
        with pytest.raises(GradientsChanged, match=r"call model\.set_requires_gradient_sync\(False\)"):
            loss_of(model(x), y).backward()


@on_four_ranks
def test_half_precision_gradients_are_compressed_with_float32_residuals() -> None:
    with attached(mesh_of(2, 2), "two_way(int8)", mp_policy=HALF) as (model, optimizer, run):
        train(model, optimizer, dist.get_rank(), 3)
        assert run.replicas_are_equal()
        assert run.method.worker.residual.abs().max() > 0


@pytest.mark.parametrize(
    ("shape", "overlap"), [((2, 2), None), ((4,), None), ((2, 2), False)], ids=["replicas", "shards", "a refusal"]
)
@on_four_ranks
def test_close_gives_the_exchange_back_to_fsdp_and_a_refusal_leaves_it(
    shape: tuple[int, ...], overlap: bool | None
) -> None:
    results = []
    for is_ours in (True, False):
        model = sharded(mesh_of(*shape))
        optimizer = sgd(model)
        if is_ours and overlap is None:
            commopt.attach(model, "two_way(int8)", optimizer).close()
        elif is_ours:
            with pytest.raises(CommoptError):
                commopt.attach(model, "two_way(int8)", optimizer, overlap=overlap)
        train(model, optimizer, dist.get_rank(), 3)
        results.append(shards(model))
    assert_equal(*results)


@pytest.mark.parametrize(
    ("shape", "case"),
    [
        ((4,), "8-bit residuals"),
        *(((2, 2), case) for case in ("dgc", "onebit_adam", "zero_one_adam", "distributed_lion")),
    ],
)
@on_four_ranks
def test_training_goes_on_from_a_checkpoint_bit_for_bit(shape: tuple[int, ...], case: str, tmp_path: Path) -> None:
    rank, ends = dist.get_rank(), []
    for is_resumed in (False, True):
        with attached(mesh_of(*shape), METHODS[case]) as (model, optimizer, run):
            if is_resumed:
                run.load(tmp_path / "saved")
            else:
                train(model, optimizer, rank, 3)
                run.save(tmp_path / "saved")
            train(model, optimizer, rank, 3, first=3)
            ends.append(shards(model))
    assert_equal(*ends)


@pytest.mark.parametrize("method", [{"name": "top_k", "density": 0.1}, {"name": "two_way(int8)"}], ids=str)
@on_four_ranks
def test_a_checkpoint_goes_on_over_other_shards_or_says_why_not(method: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    with attached(mesh_of(2, 2), method) as (model, optimizer, run):
        train(model, optimizer, dist.get_rank(), 3)
        run.save(folder)
        whole = [p.full_tensor() for p in model.parameters()]
        sent = [x.full_tensor() for x in (state["momentum_buffer"] for state in optimizer.state.values())]
    with attached(mesh_of(4, 1), method) as (model, optimizer, run):
        if method["name"] != "top_k":
            with pytest.raises(CheckpointError, match="continues only on as many ranks in each replica"):
                run.load(folder)
            return
        run.load(folder)
        assert run.steps == 3
        assert all(torch.equal(p.full_tensor(), x) for p, x in zip(model.parameters(), whole, strict=True))
        buffers = [state["momentum_buffer"].full_tensor() for state in optimizer.state.values()]
        assert all(torch.equal(x, y) for x, y in zip(buffers, sent, strict=True))
        train(model, optimizer, dist.get_rank(), 1, first=3)
        assert run.replicas_are_equal()


@on_four_ranks
def test_replicas_start_as_the_first_and_every_rank_hears_of_a_drift() -> None:
    mesh, every = mesh_of(2, 2), [Flats()] * 4
    model = sharded(mesh)
    with torch.no_grad():
        for p in model.parameters():
            p.to_local().add_(mesh.get_local_rank("replicate"))
    dist.all_gather_object(every, shards(model))
    run = commopt.attach(model, "ef_sign", sgd(model))
    assert run.replicas_are_equal()
    assert_equal(shards(model), every[dist.get_rank() % 2])
    with torch.no_grad():
        if dist.get_rank() == 3:
            next(model.parameters()).to_local().add_(1)
    assert not run.replicas_are_equal()


@on_four_ranks
def test_clipping_what_is_more_than_a_gradient_is_refused() -> None:
    for method in ("dgc", {"name": "onebit_adam", "freeze_step": 2}):
        with attached(mesh_of(2, 2), method) as (model, optimizer, _run):
            train(model, optimizer, dist.get_rank(), 2)
            x, y = batch(dist.get_rank(), 2)
            loss_of(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            with pytest.raises(GradientsChanged, match="the gradient was changed after backward"):
                optimizer.step()


@pytest.mark.parametrize(
    ("shape", "is_clipped"), [((2, 2), False), ((2, 2), True), ((4,), False)], ids=["", "clipped", "shards"]
)
@on_four_ranks
def test_a_nan_in_one_shard_leaves_the_same_parameters_out_on_all(shape: tuple[int, ...], is_clipped: bool) -> None:
    """In step 1 one rank has a NaN in one row of one weight; between replicas, only the second shard hears of it."""
    rank, history = dist.get_rank(), []
    with attached(mesh_of(*shape), "two_way(int8)") as (model, optimizer, run):
        for step in range(3):
            x, y = batch(rank, step)
            optimizer.zero_grad()
            model.is_poisoned = step == 1 and rank == 2
            residual = run.method.part("worker_residual", "second.weight").clone()
            loss_of(model(x), y).backward()
            if step == 1 and run.voided:
                torch.testing.assert_close(run.method.part("worker_residual", "second.weight"), residual)
            if is_clipped:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            history.append(shards(model))
        assert run.replicas_are_equal()
    assert run.voided == ([(1, "second.weight")] if rank % 2 or shape == (4,) else [])
    first, second, third = history
    for name, x in first.items():
        is_out = is_clipped or name.startswith("second")
        assert x.numel() == 0 or torch.equal(x, second[name]) == is_out, name
        assert third[name].isfinite().all()
        assert x.numel() == 0 or not torch.equal(second[name], third[name])


@on_four_ranks
def test_a_void_backward_stays_void_until_the_step_or_zero_grad() -> None:
    with attached(mesh_of(2, 2), "dense") as (model, optimizer, _run):
        before = shards(model)
        x, y = batch(dist.get_rank(), 0)
        for scale in (float("inf"), 1.0):
            loss_of(model(x), y).mul(scale).backward()
        optimizer.step()
        assert_equal(before, shards(model))
        optimizer.zero_grad()
        loss_of(model(x), y).mul(float("inf")).backward()  # and is given up
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
        after = shards(model)
    assert all(not torch.equal(x, after[name]) for name, x in before.items() if x.numel())


@on_four_ranks
def test_a_parameter_that_is_not_used_gets_zeros() -> None:
    """`scale` is used by all, then on one replica, then nowhere."""
    with attached(mesh_of(2, 2), "ef_sign") as (model, optimizer, run):
        for step, uses in enumerate([range(4), range(2), range(0)]):
            x, y = batch(dist.get_rank(), step)
            optimizer.zero_grad()
            loss_of(model(x, dist.get_rank() in uses), y).backward()
            optimizer.step()
        assert model.scale.grad is not None
        assert run.replicas_are_equal()


@on_four_ranks
def test_a_rank_sends_what_its_shard_takes() -> None:
    method = {"name": "two_way", "worker": {"compressor": "int8", "block_size": 32}}
    with attached(mesh_of(2, 2), method) as (model, optimizer, run):
        before = run.traffic.payload_bytes
        train(model, optimizer, dist.get_rank(), 2)
        sent, elements = (run.traffic.payload_bytes - before) / 2, sum(x.numel() for x in shards(model).values())
    # half of the shard out, the other half's answer back; a scale a block
    assert elements <= sent <= elements * 1.3 + 8 * 2 * 7


@on_four_ranks
def test_changes_after_attach_are_refused_in_the_next_backward() -> None:
    with attached(mesh_of(2, 2), "ef_sign") as (model, optimizer, _run):
        model.set_force_sum_reduction_for_comms(True)
        with pytest.raises(CommoptError, match="come before attach"):
            train(model, optimizer, dist.get_rank(), 1)
    with attached(mesh_of(2, 2), "ef_sign") as (model, optimizer, _run):
        train(model, optimizer, dist.get_rank(), 1)
        with pytest.raises(CommoptError, match="attached to this model already"):
            commopt.attach(model, "ef_sign", optimizer)
        model.first.bias.requires_grad_(False)
        with pytest.raises(CommoptError, match="frozen or thawed"):
            train(model, optimizer, dist.get_rank(), 1)
    with attached(mesh_of(4), "two_way(int8)") as (model, optimizer, _run):
        model.set_gradient_divide_factor(1.0)
        with pytest.raises(CommoptError, match="set_gradient_divide_factor"):
            train(model, optimizer, dist.get_rank(), 1)


def example(port: int, *words: str) -> str:
    """What the example prints on this rank; the port that its job was given may be somebody else's by now."""
    os.environ["MASTER_PORT"] = str(port)
    return run_program("fsdp_train.py", *words)


def test_the_example_trains_two_replicas(fsdp_ranks: Pool) -> None:
    words = ("--shards", "1", "--layers", "1", "--steps", "4", "--method", '"ef_sign"')
    printed, nothing = fsdp_ranks.run(2, example, free_ports(1)[0], *words)
    assert nothing == ""
    found = re.search(
        r"validation loss (\S+) after 4 steps .*; (\S+) MB sent a step by rank 0, replicas equal", printed
    )
    assert found is not None, printed
    assert 2.0 < float(found[1]) < 6.0
    assert 0.03 < float(found[2]) < 0.05  # an eighth of a byte for each of 272,640 parameters, twice over half of them
