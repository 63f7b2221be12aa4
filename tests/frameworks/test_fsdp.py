"""Methods between the replicas of an FSDP2 model, on four ranks as two replicas of two shards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsdp_rig import TwoReplicas, attached, batch, cut, mesh_of, sgd, sharded, shards, train, train_alone
from pool import Pool
from rig import loss_of
from torch import nn

import commopt
from commopt.errors import CheckpointError, CommoptError, GradientsChanged
from commopt.groups import TorchGroup

STEPS = 5
CASES: dict[str, dict[str, Any]] = {
    "ef_sign": {"name": "ef_sign", "block_size": 64},
    "two_way": {"name": "two_way(int8)"},
    "8-bit residuals": {"name": "two_way(4bit)", "residual_bits": 8},
    "dgc": {"name": "dgc", "density": 0.1, "warmup_steps": 2},
    "top_k": {"name": "top_k", "density": 0.1},
    "qsgd": {"name": "qsgd"},
    "powersgd": {"name": "powersgd", "rank": 2},
    "fp16": {"name": "fp16"},
}


def train_sharded(method: dict[str, Any], momentum: float) -> Any:
    mesh = mesh_of(2, 2)
    with attached(mesh, method, lambda model: sgd(model, momentum)) as (model, optimizer, run):
        train(model, optimizer, dist.get_rank(), STEPS)
        assert run.replicas_are_equal()
        return shards(model)


@pytest.mark.parametrize("case", CASES)
def test_a_method_between_replicas_is_the_method_on_each_shard(fsdp_ranks: Pool, case: str) -> None:
    momentum = 0.0 if case == "dgc" else 0.9
    expected = train_alone(TwoReplicas(CASES[case]).mean, STEPS, momentum)
    for rank, found in enumerate(fsdp_ranks.run(4, train_sharded, CASES[case], momentum)):
        for name, p in expected.named_parameters():
            assert torch.equal(found[name], cut(p.detach(), 2, rank % 2)), f"{name} on rank {rank}"


def train_dense(options: dict[str, Any], micro_batches: str) -> Any:
    """(with commopt, by FSDP alone)"""
    mesh = mesh_of(2, 2)
    results = []
    for is_ours in (True, False):
        model = sharded(mesh, **options)
        optimizer = sgd(model)
        run = commopt.attach(model, "dense", optimizer) if is_ours else None
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
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        results.append(shards(model))
        if run is not None:
            calls = sum(n for (_, operation, _), n in run.traffic.calls.items() if operation == "all_reduce")
            assert calls == 3 * 3 * (3 if micro_batches == "every backward" else 1)
            run.close()
    return results


@pytest.mark.parametrize("micro_batches", ["", "every backward", "no sync", "no all-reduce"])
def test_dense_is_what_fsdp_does_between_replicas(fsdp_ranks: Pool, micro_batches: str) -> None:
    for ours, theirs in fsdp_ranks.run(4, train_dense, {}, micro_batches):
        assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


def train_a_small_unit() -> Any:
    """(with commopt, by FSDP alone), with a unit of which the second shard has nothing"""
    mesh = mesh_of(2, 2)
    model, other = (sharded(mesh, ("first", "second", "last")) for _ in range(2))
    optimizer, others = sgd(model), sgd(other)
    commopt.attach(model, "dense", optimizer)
    train(model, optimizer, dist.get_rank(), 2)
    train(other, others, dist.get_rank(), 2)
    return shards(model), shards(other)


def test_a_shard_may_have_nothing_of_a_unit(fsdp_ranks: Pool) -> None:
    for ours, theirs in fsdp_ranks.run(4, train_a_small_unit):
        assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


def exchange_twice() -> None:
    mesh = mesh_of(2, 2)
    with attached(mesh, "two_way(int8)") as (model, _optimizer, _run):
        x, y = batch(dist.get_rank(), 0)
        loss_of(model(x), y).backward()
        with pytest.raises(GradientsChanged, match=r"call model\.set_requires_gradient_sync\(False\)"):
            loss_of(model(x), y).backward()


def test_a_second_exchange_before_the_step_is_refused_where_state_is_kept(fsdp_ranks: Pool) -> None:
    fsdp_ranks.run(4, exchange_twice)


def train_in_bfloat16() -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return train_dense({"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)}, "")


def test_dense_follows_the_mixed_precision_policy(fsdp_ranks: Pool) -> None:
    for ours, theirs in fsdp_ranks.run(4, train_in_bfloat16):
        assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


def compress_half_precision() -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    mesh = mesh_of(2, 2)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)
    with attached(mesh, "two_way(int8)", mp_policy=policy) as (model, optimizer, run):
        train(model, optimizer, dist.get_rank(), 3)
        return run.replicas_are_equal(), run.method.worker.residual.abs().max().item()


def test_half_precision_gradients_are_compressed_with_float32_residuals(fsdp_ranks: Pool) -> None:
    assert all(equal and residual > 0 for equal, residual in fsdp_ranks.run(4, compress_half_precision))


def give_back() -> Any:
    mesh = mesh_of(2, 2)
    model, other = sharded(mesh), sharded(mesh)
    optimizer, others = sgd(model), sgd(other)
    commopt.attach(model, "ef_sign", optimizer).close()
    train(model, optimizer, dist.get_rank(), 3)
    train(other, others, dist.get_rank(), 3)
    return shards(model), shards(other)


def test_close_gives_the_exchange_back_to_fsdp(fsdp_ranks: Pool) -> None:
    for ours, theirs in fsdp_ranks.run(4, give_back):
        assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


def train_over_a_group() -> Any:
    """Shard over two ranks alone, and give attach the other dimension as a group."""
    mesh = mesh_of(2, 2)
    group = TorchGroup(mesh.get_group("replicate"))
    with attached(mesh["shard"], "two_way(int8)", group=group) as (model, optimizer, run):
        train(model, optimizer, dist.get_rank(), STEPS)
        found = shards(model)
        model.set_requires_all_reduce(False)
        with pytest.raises(CommoptError, match="set_requires_gradient_sync"):
            train(model, optimizer, dist.get_rank(), 1)
        return found, run.group is group


def test_replicas_may_be_a_group_that_fsdp_does_not_know(fsdp_ranks: Pool) -> None:
    expected = train_alone(TwoReplicas(CASES["two_way"]).mean, STEPS)
    for rank, (found, is_ours) in enumerate(fsdp_ranks.run(4, train_over_a_group)):
        assert is_ours
        for name, p in expected.named_parameters():
            assert torch.equal(found[name], cut(p.detach(), 2, rank % 2))


def resume() -> Any:
    mesh = mesh_of(2, 2)
    rank = dist.get_rank()
    with attached(mesh, CASES["dgc"], lambda model: sgd(model, 0.0)) as (model, optimizer, run):
        train(model, optimizer, rank, 3)
        kept = copy.deepcopy(run.method.saved())
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        with pytest.raises(CheckpointError, match=r"torch\.distributed\.checkpoint"):
            run.save("nowhere")
        train(model, optimizer, rank, 3, first=3)
        straight = shards(model)
    with attached(mesh, CASES["dgc"], lambda model: sgd(model, 0.0)) as (model, optimizer, run):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(weights[name])
        run.method.load(kept)
        train(model, optimizer, rank, 3, first=3)
        return straight, shards(model)


def test_training_goes_on_from_a_saved_state_bit_for_bit(fsdp_ranks: Pool) -> None:
    for straight, resumed in fsdp_ranks.run(4, resume):
        assert all(torch.equal(x, resumed[name]) for name, x in straight.items())


def start_apart() -> Any:
    mesh = mesh_of(2, 2)
    model = sharded(mesh)
    with torch.no_grad():
        for p in model.parameters():
            p.to_local().add_(mesh.get_local_rank("replicate"))
    before = shards(model)
    run = commopt.attach(model, "ef_sign", sgd(model))
    equal = run.replicas_are_equal()
    after = shards(model)
    with torch.no_grad():
        if dist.get_rank() == 3:
            next(model.parameters()).to_local().add_(1)
    return equal, run.replicas_are_equal(), before, after


def test_replicas_start_as_the_first_and_every_rank_hears_of_a_drift(fsdp_ranks: Pool) -> None:
    answers = fsdp_ranks.run(4, start_apart)
    assert [(equal, later) for equal, later, *_ in answers] == [(True, False)] * 4
    for rank, (*_, after) in enumerate(answers):
        assert all(torch.equal(x, answers[rank % 2][2][name]) for name, x in after.items())


def train_with_nan(is_clipped: bool) -> Any:
    """In step 1 one rank has a NaN in one row of one weight, of which only the second shard hears."""
    mesh = mesh_of(2, 2)
    with attached(mesh, "two_way(int8)") as (model, optimizer, run):
        rank, history = dist.get_rank(), [shards(model)]
        for step in range(3):
            x, y = batch(rank, step)
            optimizer.zero_grad()
            model.is_poisoned = step == 1 and rank == 2
            loss_of(model(x), y).backward()
            if is_clipped:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            history.append(shards(model))
        return history, run.voided, run.replicas_are_equal()


@pytest.mark.parametrize("is_clipped", [False, True], ids=["", "clipped"])
def test_a_nan_in_one_shard_leaves_the_same_parameters_out_on_all(fsdp_ranks: Pool, is_clipped: bool) -> None:
    for rank, (history, voided, equal) in enumerate(fsdp_ranks.run(4, train_with_nan, is_clipped)):
        assert equal
        assert voided == ([(1, "second.weight")] if rank % 2 else [])
        first, second, third = history[1:]
        for name in first:
            is_out = is_clipped or name.startswith("second")
            assert first[name].numel() == 0 or torch.equal(first[name], second[name]) == is_out, name
            assert third[name].isfinite().all()
            assert third[name].numel() == 0 or not torch.equal(second[name], third[name])


def accumulate_with_nan() -> Any:
    """The first of two exchanged backwards has a NaN, the second has none."""
    mesh = mesh_of(2, 2)
    with attached(mesh, "dense") as (model, optimizer, _run):
        before = shards(model)
        for scale in (float("inf"), 1.0):
            x, y = batch(dist.get_rank(), 0)
            loss_of(model(x), y).mul(scale).backward()
        optimizer.step()
        skipped = shards(model)
        optimizer.zero_grad()
        loss_of(model(x), y).mul(float("inf")).backward()  # and is given up
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
        return before, skipped, shards(model)


def test_a_void_backward_stays_void_until_the_step_or_zero_grad(fsdp_ranks: Pool) -> None:
    for before, skipped, after in fsdp_ranks.run(4, accumulate_with_nan):
        assert all(torch.equal(x, skipped[name]) for name, x in before.items())
        assert all(not torch.equal(x, after[name]) for name, x in before.items() if x.numel())


def use_a_part() -> Any:
    """`scale` is used by all, then on one replica, then nowhere."""
    mesh = mesh_of(2, 2)
    with attached(mesh, "ef_sign", lambda model: sgd(model, 0.0)) as (model, optimizer, run):
        for step, uses in enumerate([range(4), range(2), range(0)]):
            x, y = batch(dist.get_rank(), step)
            optimizer.zero_grad()
            loss_of(model(x, dist.get_rank() in uses), y).backward()
            optimizer.step()
        return model.scale.grad is not None, run.replicas_are_equal()


def test_a_parameter_that_is_not_used_gets_zeros(fsdp_ranks: Pool) -> None:
    assert fsdp_ranks.run(4, use_a_part) == [(True, True)] * 4


def count_bytes() -> Any:
    mesh = mesh_of(2, 2)
    with attached(mesh, {"name": "two_way(int8)"}) as (model, optimizer, run):
        sent = run.traffic.payload_bytes
        train(model, optimizer, dist.get_rank(), 2)
        return (run.traffic.payload_bytes - sent) / 2, sum(x.numel() for x in shards(model).values())


def test_a_rank_sends_what_its_shard_takes(fsdp_ranks: Pool) -> None:
    for sent, elements in fsdp_ranks.run(
        4, count_bytes
    ):  # half of the shard out, the other half's answer back; a scale a block
        assert elements <= sent <= elements * 1.1 + 8 * 2 * 7


def change_after_attach() -> None:
    mesh = mesh_of(2, 2)
    with attached(mesh, "ef_sign") as (model, optimizer, _run):
        model.set_force_sum_reduction_for_comms(True)
        with pytest.raises(CommoptError, match="come before attach"):
            train(model, optimizer, dist.get_rank(), 1)
    with attached(mesh, "ef_sign") as (model, optimizer, _run):
        train(model, optimizer, dist.get_rank(), 1)
        with pytest.raises(CommoptError, match="attached to this model already"):
            commopt.attach(model, "ef_sign", optimizer)
        model.first.bias.requires_grad_(False)
        with pytest.raises(CommoptError, match="frozen or thawed"):
            train(model, optimizer, dist.get_rank(), 1)


def test_changes_after_attach_are_refused_in_the_next_backward(fsdp_ranks: Pool) -> None:
    fsdp_ranks.run(4, change_after_attach)
