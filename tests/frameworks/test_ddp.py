"""DDP with unused parameters, several buckets and scalers, and gradients that others change."""

from __future__ import annotations

import io
import math
import re
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool, twin_of
from rig import METHODS, UPDATE, flat, loss_of, make_batch, make_model, run_ddp, scaled_step, state_of, train, wrapped
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from commopt.errors import AttachError, CommoptError, GroupError
from commopt.groups import Group, SimWorld, TorchGroup
from commopt.run.checks import connect

STEPS = 6


class Branches(nn.Module):
    """`shared` is always used, `sometimes` on rank 0 in odd steps only, and `never` nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.never, self.shared, self.sometimes = nn.Linear(12, 3), nn.Linear(12, 4), nn.Linear(4, 4)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))

    def forward(self, x: Tensor, detour: bool) -> Tensor:
        y: Tensor = self.shared(x)
        return self.sometimes(y) if detour else y


def branch(model: nn.Module, optimizer: torch.optim.Optimizer, run: Any, rank: int) -> tuple[Tensor, list[Tensor]]:
    for step in range(8):
        x, y = make_batch(rank, step)
        optimizer.zero_grad()
        loss_of(model(x, rank == 0 and step % 2 == 1), y).backward()
        optimizer.step()
    return flat(model), [x.clone() for x in state_of(run)]


def branch_in_ddp(process_group: dist.ProcessGroup, case: str, overlap: bool) -> tuple[Tensor, list[Tensor]]:
    options: dict[str, Any] = {"model": Branches(), "find_unused_parameters": True, "overlap": overlap}
    with wrapped(process_group, case, **options) as (model, optimizer, run):
        return branch(model, optimizer, run, dist.get_rank(process_group))


def branch_in_plain(group: Group, case: str) -> tuple[Tensor, list[Tensor]]:
    model = Branches()
    run = METHODS[case].attach(model, group)
    return branch(model, run.optimizer, run, group.rank)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("case", METHODS)
def test_unused_parameters_and_their_state_are_as_without_ddp(pool: Pool, case: str, overlap: bool) -> None:
    expected = SimWorld[Any](2).run(lambda group: branch_in_plain(group, case))
    first = flat(Branches())
    for (values, state), (plain_values, plain_state) in zip(
        pool.run(2, branch_in_ddp, case, overlap), expected, strict=True
    ):
        assert torch.equal(values, plain_values)
        assert len(state) == len(plain_state)
        assert all(torch.equal(a, b) for a, b in zip(state, plain_state, strict=True))
        never = 12 * 3 + 3
        assert torch.equal(values[:never], first[:never])
        assert (values[never:] != first[never:]).any()


def misuse(process_group: dist.ProcessGroup, case: str, what: str) -> str:
    """The error of a training step in which gradients are treated in some unusual way, or nothing."""
    with wrapped(process_group, case) as (model, optimizer, _):
        rank = dist.get_rank(process_group)
        train(model, optimizer, rank, 4)
        x, y = make_batch(rank, 9)
        try:
            optimizer.zero_grad()
            if what == "no sync":
                with model.no_sync():
                    loss_of(model(x), y).backward()
            else:
                loss_of(model(x), y).backward()
            if what == "backward twice":
                loss_of(model(x), y).backward()
            if what == "clip":
                nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            if what == "look at the norm":
                nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            if what == "scale by hand":
                for p in model.parameters():
                    if p.grad is not None:
                        p.grad /= 2
            optimizer.step()
        except (CommoptError, RuntimeError) as error:  # out of backward, autograd makes a RuntimeError of everything
            return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("cases", "what", "said"),
    [
        ((*UPDATE, "dgc"), "clip", "GradientsChanged: 0.weight: the gradient was changed after backward"),
        (UPDATE, "scale by hand", "GradientsChanged: 0.weight: the gradient was changed after backward"),
        (
            UPDATE,
            "no sync",
            "GradientsChanged: 0.weight: step() without an exchange; was the last backward under no_sync()",
        ),
        (UPDATE, "backward twice", "under model.no_sync()"),
        ((*UPDATE, "dgc"), "look at the norm", ""),
        (("dense", "ef_sign l1"), "clip", ""),
        (("dense", "ef_sign l1"), "scale by hand", ""),
    ],
)
def test_only_plain_gradients_may_be_changed(pool: Pool, cases: tuple[str, ...], what: str, said: str) -> None:
    """Those of an update method are more, and those that dgc sends have waited for many steps."""
    for case in cases:
        for answer in pool.run(2, misuse, case, what):
            assert said in answer if said else answer == "", case


def clipped_in_ddp(process_group: dist.ProcessGroup, case: str, max_norm: float) -> tuple[Tensor, Tensor, float]:
    """The gradient that the optimizer gets in one step with max_norm, this rank's own, and grad_norm."""
    rank = dist.get_rank(process_group)
    x, y = make_batch(rank, 0)
    own = make_model()
    loss_of(own(x), y).backward()
    with wrapped(process_group, case, overlap=False, max_norm=max_norm) as (model, _, run):
        loss_of(model(x), y).backward()
        return gradient_of(model.module), gradient_of(own), run.grad_norm


def gradient_of(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.reshape(-1).clone() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("max_norm", [0.05, 1e6])
def test_dense_clips_by_the_norm_of_the_mean_as_torch_does(pool: Pool, max_norm: float) -> None:
    results = pool.run(3, clipped_in_ddp, "dense", max_norm)
    mean = nn.Parameter(torch.zeros_like(results[0][1]))
    mean.grad = torch.stack([own for _, own, _ in results]).mean(0)
    norm = nn.utils.clip_grad_norm_([mean], max_norm)
    for got, _, grad_norm in results:
        torch.testing.assert_close(got, mean.grad)
        assert grad_norm == pytest.approx(float(norm), rel=1e-6)


def test_signs_are_clipped_by_one_norm_for_all_ranks(pool: Pool) -> None:
    unclipped = pool.run(3, clipped_in_ddp, "ef_sign l1", 1e6)
    clipped = pool.run(3, clipped_in_ddp, "ef_sign l1", 0.05)
    rms = torch.stack([own.norm() for _, own, _ in unclipped]).square().mean().sqrt()
    for (got, _, norm), (whole, _, _) in zip(clipped, unclipped, strict=True):
        torch.testing.assert_close(got, whole * (0.05 / rms), rtol=1e-4, atol=1e-8)
        assert norm == pytest.approx(float(rms), rel=1e-6)


@pytest.mark.parametrize("case", ["dense", "onebit_adam l1"])
def test_grad_norm_is_of_unscaled_gradients(pool: Pool, case: str) -> None:
    assert pool.run(2, norm_under_scale, case, 1024.0) == pytest.approx(pool.run(2, norm_under_scale, case, None))


def norm_under_scale(process_group: dist.ProcessGroup, case: str, scale: float | None) -> float:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    with wrapped(process_group, case, max_norm=0.05, grad_scaler=scaler) as (model, _, run):
        scaled_step(scaler, model, run, 0)
        return float(run.grad_norm)


def train_scaled(
    process_group: dist.ProcessGroup,
    case: str,
    scale: float,
    overflow_at: int,
    overlap: bool | None = None,
    is_told: bool = True,
) -> tuple[Tensor, list[float], list[int], bool, bool]:
    """A user's usual loop with a GradScaler; one step overflows on rank 1."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    options: dict[str, Any] = {"grad_scaler": scaler} if is_told else {}
    with wrapped(process_group, case, overlap=overlap, **options) as (model, _, run):
        scales, moved = [], []
        for step in range(STEPS):
            before = flat(model.module)
            scaled_step(scaler, model, run, step, math.inf if (step, run.rank) == (overflow_at, 1) else 1.0)
            scales.append(scaler.get_scale())
            moved.append(int(not torch.equal(before, flat(model.module))))
        finite = all(bool(x.isfinite().all()) for x in state_of(run))
        return flat(model.module), scales, moved, finite, run.replicas_are_equal()


SCALED = [case for case in METHODS if case != "fp16"]


@pytest.mark.parametrize("overlap", [None, False])
@pytest.mark.parametrize("case", SCALED)
def test_a_scaled_run_is_the_unscaled_one(pool: Pool, case: str, overlap: bool | None) -> None:
    expected = pool.run(2, run_ddp, case, STEPS, {"overlap": overlap})[0]
    for values, scales, moved, finite, equal in pool.run(2, train_scaled, case, 1024.0, -1, overlap):
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)
        assert scales == [1024.0] * STEPS
        assert moved == [1] * STEPS
        assert finite
        assert equal


@pytest.mark.parametrize(
    ("case", "overlap", "is_told"),
    [
        *((case, False, True) for case in SCALED),  # with overlap: in test_unapplied, where something is kept
        *((case, None, is_told) for case in ("dense", "ef_sign l1") for is_told in (True, False)),
    ],
)
@pytest.mark.parametrize("overflow_at", [0, 4])
def test_an_overflow_makes_all_ranks_skip_and_lower_the_scale(
    pool: Pool, case: str, overflow_at: int, overlap: bool | None, is_told: bool
) -> None:
    for _, scales, moved, finite, equal in pool.run(2, train_scaled, case, 1024.0, overflow_at, overlap, is_told):
        assert scales == [1024.0] * overflow_at + [512.0] * (STEPS - overflow_at)
        assert moved == [int(step != overflow_at) for step in range(STEPS)]
        assert finite
        assert equal


def clip_by_hand_in_a_bad_step(process_group: dist.ProcessGroup, case: str) -> tuple[bool, bool, int]:
    rank = dist.get_rank(process_group)
    with wrapped(process_group, case, bucket_cap_mb=0.0001) as (model, optimizer, run):
        train(model, optimizer, rank, 3)
        x, y = make_batch(rank, 3)
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        bias = model.module[4].bias
        (loss_of(model(x), y) + bias.sum() * (float("nan") if rank == 1 else 1.0)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        return bool(flat(model.module).isfinite().all()), run.replicas_are_equal(), len(run.voided)


@pytest.mark.parametrize("case", ["dense", "ef_sign l1"])
def test_clipping_by_hand_does_not_spread_a_bad_value_to_the_parameters(pool: Pool, case: str) -> None:
    assert pool.run(2, clip_by_hand_in_a_bad_step, case) == [(True, True, 1)] * 2


def scaler_misuse(process_group: dist.ProcessGroup, knows: bool, said: str) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    options: dict[str, Any] = {"grad_scaler": scaler} if knows else {}
    with wrapped(process_group, "onebit_adam l1", **options) as (model, optimizer, _):
        x, y = make_batch(dist.get_rank(process_group), 0)
        scaler.scale(loss_of(model(x), y)).backward()
        if knows:
            scaler.unscale_(optimizer)
        with pytest.raises(CommoptError, match=re.escape(said)):
            scaler.step(optimizer)


@pytest.mark.parametrize(
    ("knows", "said"), [(False, "attach(..., grad_scaler=scaler)"), (True, "clip by attach(..., max_norm=...)")]
)
def test_an_update_method_says_how_to_use_a_scaler(pool: Pool, knows: bool, said: str) -> None:
    pool.run(2, scaler_misuse, knows, said)


def copied(process_group: dist.ProcessGroup) -> tuple[int, bool, bool]:
    rank = dist.get_rank(process_group)
    model = DistributedDataParallel(make_model())  # in the default group, which DDP wants of a model that is pickled
    run = METHODS["ef_sign l1"].attach(model, TorchGroup(twin_of(process_group)))
    train(model, run.optimizer, rank, 1)
    torch.save(model, io.BytesIO())
    before, averaged = flat(model), AveragedModel(model)
    other = METHODS["dense"].attach(averaged.module, TorchGroup(process_group))
    train(averaged.module, other.optimizer, rank, 2)
    is_untouched = torch.equal(flat(model), before)
    train(model, run.optimizer, rank, 1, 1)
    return run.steps + other.steps, is_untouched, run.replicas_are_equal() and other.replicas_are_equal()


def test_a_model_with_a_method_can_be_copied_averaged_and_pickled(pool: Pool) -> None:
    assert pool.run(5, copied) == [(4, True, True)] * 5


def uneven(process_group: dist.ProcessGroup) -> str:
    with wrapped(process_group, "dense") as (model, optimizer, run):
        train(model, optimizer, run.rank, 2)
        with pytest.raises(AttachError) as caught, model.join():
            train(model, optimizer, run.rank, run.rank)  # rank 0 has no batch at all
        return str(caught.value)


def test_uneven_inputs_are_refused_on_all_ranks(pool: Pool) -> None:
    for said in pool.run(2, uneven):
        assert "DDP's join() with dense" in said
        assert "give every rank as many batches" in said


def train_jointly(process_group: dist.ProcessGroup, *overlaps: bool | None) -> tuple[Tensor, list[bool]]:
    """Two models in one backward, over one process group."""
    models = [DistributedDataParallel(make_model(), bucket_cap_mb=0.001, process_group=process_group) for _ in overlaps]
    group, method = TorchGroup(twin_of(process_group)), METHODS["ef_sign l1"]
    runs = [method.attach(model, group, overlap=overlap) for model, overlap in zip(models, overlaps, strict=True)]
    for step in range(10):
        x, y = make_batch(runs[0].rank, step)
        for run in runs:
            run.optimizer.zero_grad()
        loss_of(models[0](x) + models[1](x.flip(0)).flip(0), y).backward()
        for run in runs:
            run.optimizer.step()
    are_equal = [run.replicas_are_equal() for run in runs]
    for run in runs:
        run.close()
    return torch.cat([flat(model) for model in models]), are_equal


@pytest.mark.parametrize("overlaps", [(None, None), (None, False), (False, None)], ids=str)
def test_models_with_a_joint_backward_may_share_a_group(pool: Pool, overlaps: tuple[bool | None, ...]) -> None:
    (expected, _), _ = pool.run(2, train_jointly, False, False)
    for trained, are_equal in pool.run(2, train_jointly, *overlaps):
        assert are_equal == [True, True]
        assert torch.equal(trained, expected)


def connected(process_group: dist.ProcessGroup, has_one_more: bool) -> str:
    """The sum over a group that `connect` makes, or its error; has_one_more: rank 0 has made a group before, alone."""
    if has_one_more and dist.get_rank(process_group) == 0:
        dist.new_group([0], use_local_synchronization=True)
    try:
        group = connect(process_group)
    except GroupError as error:
        return str(error)
    x = torch.ones(1)
    group.all_reduce(x)
    return str(x.item())


def sum_of_all(_: dist.ProcessGroup) -> float:
    dist.all_reduce(x := torch.ones(1), group=dist.new_group(timeout=timedelta(seconds=30)))
    return x.item()


def test_attach_makes_a_group_of_its_own_for_a_sub_group_or_says_why_it_cannot() -> None:
    ranks = Pool()  # its ranks cannot make further groups of their own afterwards
    try:
        assert ranks.run(2, connected, False) == ["2.0", "2.0"]
        assert ranks.run(5, sum_of_all) == [5] * 5  # the job's ranks can still make groups together
        assert all("torch.distributed.new_group" in answer for answer in ranks.run(2, connected, True))
    finally:
        ranks.close()
