"""Gradients that backward exchanges and no step applies: they leave no trace, or raise at once and say what to write."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool, twin_of
from presets import PRESETS, Preset, sgd
from rig import flat, loss_of, make_batch, make_model, state_of, train
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from commopt import Run, attach
from commopt.errors import AttachError
from commopt.groups import SimGroup, SimWorld, TorchGroup

WARM = 3  # steps before anything unusual
every_preset = pytest.mark.parametrize("preset", PRESETS, ids=str)


def in_ddp(process_group: dist.ProcessGroup, **options: Any) -> tuple[DistributedDataParallel, TorchGroup]:
    model = DistributedDataParallel(make_model(), process_group=process_group, **options)
    return model, TorchGroup(twin_of(process_group))


def backward(model: nn.Module, rank: int, step: int, scale: float = 1.0) -> None:
    x, y = make_batch(rank, step)
    (loss_of(model(x), y) * scale).backward()


def in_parts(
    group: SimGroup, preset: Preset, steps: Sequence[Sequence[tuple[int, float]]], outlier_at: int = -1
) -> Tensor:
    """Parameters after steps of several backwards each: (batch, scale of its loss). An outlier before one of them is skipped."""
    model = make_model()
    run = preset.attach(model, group)
    for step, parts in enumerate(steps):
        run.optimizer.zero_grad()
        if step == outlier_at:
            backward(model, group.rank, 50, 1e4)  # and no step
            run.optimizer.zero_grad()
        for batch, scale in parts:
            backward(model, group.rank, batch, scale)
        run.optimizer.step()
    return flat(model)


# -- in DDP, which exchanges in backward


@contextlib.contextmanager
def noted(said: list[str]) -> Iterator[None]:
    """Note what is raised: what a hook raises may come out of backward as a RuntimeError."""
    try:
        yield
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")


def skip_a_batch(process_group: dist.ProcessGroup, preset: Preset, scale: float | None) -> tuple[list[str], Tensor]:
    """What the backward after a skipped batch says, and the parameters in the end; scale: of the skipped loss."""
    said: list[str] = []
    model, group = in_ddp(process_group)
    run = preset.attach(model, group)
    train(model, run.optimizer, run.rank, WARM)
    with noted(said):
        if scale is not None:
            run.optimizer.zero_grad()
            backward(model, run.rank, 50, scale)  # an outlier: no step
        train(model, run.optimizer, run.rank, 2, WARM)
    run.close()
    return said, flat(model.module)


@every_preset
def test_a_skipped_batch_leaves_no_trace_or_is_refused(pool: Pool, preset: Preset) -> None:
    outlier = pool.run(2, skip_a_batch, preset, 1e4)
    if not is_repeatable(preset):
        for (said,), _ in outlier:
            assert "GradientsChanged" in said
            assert f"{preset.name} exchanges a second time before optimizer.step()" in said
            assert "run the other backwards under model.no_sync()" in said
            assert "To skip a step, decide before backward" in said
        return
    assert [said for said, _ in outlier] == [[], []]
    other = pool.run(2, skip_a_batch, preset, 1.0)
    assert all(torch.equal(one, outlier[0][1]) for _, one in (*outlier, *other))
    if preset.method().is_linear:  # type: ignore[attr-defined]
        assert torch.equal(outlier[0][1], pool.run(2, skip_a_batch, preset, None)[0][1])


def is_repeatable(preset: Preset) -> bool:
    run: Any = preset.attach(make_model())
    return bool(run.method.is_repeatable)


def test_what_is_kept_decides_what_is_refused() -> None:
    free = [preset.name for preset in PRESETS if is_repeatable(preset)]
    assert free == ["dense", "fp16", "qsgd", "natural", "terngrad"]


def backward_twice(process_group: dist.ProcessGroup, preset: Preset | None, is_quiet: bool) -> tuple[list[str], Tensor]:
    """Steps after two backwards each; the first under no_sync if `is_quiet`. preset: None for DDP without any method."""
    rank, said = dist.get_rank(process_group), list[str]()
    views = {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.001} if is_quiet else {}
    model, group = in_ddp(process_group, **views)
    run = None if preset is None else preset.attach(model, group)
    optimizer = Preset("dense").optimizer(model) if run is None else run.optimizer
    with noted(said):
        for step in range(WARM):
            optimizer.zero_grad()
            with model.no_sync() if is_quiet else contextlib.nullcontext():
                backward(model, rank, 2 * step, 0.5)
            backward(model, rank, 2 * step + 1, 0.5)
            optimizer.step()
    if run is not None:
        run.close()
    return said, flat(model.module)


@pytest.mark.parametrize(("name", "tolerance"), [("dense", 0.0), ("fp16", 1e-3)])
def test_a_second_backward_is_ddps_where_nothing_is_kept(pool: Pool, name: str, tolerance: float) -> None:
    expected = pool.run(2, backward_twice, None, False)[0][1]
    for said, got in pool.run(2, backward_twice, Preset(name), False):
        assert said == []
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


@every_preset
def test_accumulation_under_no_sync_is_free(pool: Pool, preset: Preset) -> None:
    halves = [[(2 * step, 0.5), (2 * step + 1, 0.5)] for step in range(WARM)]
    expected = SimWorld[Tensor](2).run(lambda group: in_parts(group, preset, halves))[0]
    for said, got in pool.run(2, backward_twice, preset, True):
        assert said == []
        assert torch.equal(got, expected)


def train_gan(process_group: dist.ProcessGroup, method: Any, is_quiet: bool) -> tuple[list[str], float]:
    """A generator's step puts a gradient into the discriminator; how far that moves, whose own gradient is zero."""
    torch.manual_seed(0)
    generator, critic = (
        DistributedDataParallel(model, process_group=process_group)
        for model in (nn.Linear(8, 16), nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1)))
    )
    groups = TorchGroup(twin_of(process_group)), TorchGroup.like(process_group)
    runs = [
        attach(model, method, torch.optim.SGD(model.parameters(), lr=0.05), group=group, overlap=False)
        for model, group in zip((generator, critic), groups, strict=True)
    ]
    before, said = flat(critic), list[str]()
    data = torch.Generator().manual_seed(dist.get_rank(process_group))
    with noted(said):
        for _ in range(4):
            z, x = torch.randn(16, 8, generator=data), torch.randn(16, 16, generator=data)
            runs[1].optimizer.zero_grad()
            (critic(x).mean() * 0.0).backward()
            runs[1].optimizer.step()
            runs[0].optimizer.zero_grad()
            with critic.no_sync() if is_quiet else contextlib.nullcontext():
                (-critic(generator(z)).mean()).backward()
            runs[0].optimizer.step()
    for run in runs:
        run.close()
    return said, float((flat(critic) - before).norm())


@pytest.mark.parametrize("method", ["ef_sign", {"name": "dgc", "density": 0.1}, "dense"], ids=str)
def test_another_loss_that_reaches_a_model_is_refused_or_leaves_no_trace(pool: Pool, method: Any) -> None:
    assert pool.run(2, train_gan, method, True) == [([], 0.0)] * 2
    for said, moved in pool.run(2, train_gan, method, False):
        assert moved == 0.0
        if method == "dense":
            assert said == []
        else:
            assert "if another loss reaches these parameters, run the other backwards under model.no_sync()" in said[0]


# -- in a plain script, which exchanges in the step


@every_preset
def test_a_plain_script_may_skip_and_accumulate(preset: Preset) -> None:
    halves, whole = [[(step, 0.5)] * 2 for step in range(8)], [[(step, 1.0)] for step in range(8)]
    unusual = SimWorld[Tensor](2).run(lambda group: in_parts(group, preset, halves, outlier_at=5))
    usual = SimWorld[Tensor](2).run(lambda group: in_parts(group, preset, whole))
    assert all(torch.equal(one, other) for one, other in zip(unusual, usual, strict=True))


# -- a momentum that reaches the optimizer after attach

OWN_MOMENTUM = [
    Preset("dgc", {"density": 1.0}, sgd(0.01)),
    Preset("signum", {}, sgd(0.01)),
    Preset("ef21", {}, sgd(0.01)),
]


@pytest.mark.parametrize("how", ["OneCycleLR", "load_state_dict", "by hand"])
@pytest.mark.parametrize("preset", OWN_MOMENTUM, ids=str)
def test_a_momentum_that_comes_later_is_refused_at_the_next_step(preset: Preset, how: str) -> None:
    model = make_model()
    optimizer = preset.attach(model).optimizer
    train(model, optimizer, 0, 2)
    if how == "OneCycleLR":
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=80)
    elif how == "load_state_dict":
        optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9).state_dict())
    else:
        optimizer.param_groups[0]["momentum"] = 0.5
    before = flat(model)
    with pytest.raises(AttachError, match="momentum"):
        train(model, optimizer, 0, 1, 2)
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("preset", OWN_MOMENTUM, ids=str)
def test_a_schedule_that_leaves_momentum_alone_may_come_later(preset: Preset) -> None:
    model = make_model()
    optimizer = preset.attach(model).optimizer
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=80, cycle_momentum=False)
    for step in range(3):
        train(model, optimizer, 0, 1, step)
        schedule.step()


# -- steps that a GradScaler skips; where nothing is kept, buckets are decided one by one

KEEPING = [preset for preset in PRESETS if preset.name not in ("dense", "fp16", "auto")]


def overflow(
    process_group: dist.ProcessGroup, preset: Preset, has_overflow: bool
) -> tuple[list[str], dict[str, Tensor]]:
    """Six steps in several buckets, and maybe a seventh with an inf in one parameter on rank 1; what that changed."""
    changed: list[str] | None = None
    model, group = in_ddp(process_group, bucket_cap_mb=0.001)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    run: Any = preset.attach(model, group, grad_scaler=scaler)

    def step(number: int, spoils: bool = False) -> None:
        x, y = make_batch(run.rank, number)
        run.optimizer.zero_grad()
        loss = loss_of(model(x), y)
        bias = model.module.get_parameter("2.bias")
        scaler.scale(loss + bias.sum() * (math.inf if spoils and run.rank == 1 else 0.0)).backward()
        scaler.step(run.optimizer)
        scaler.update()

    for k in range(6):
        if has_overflow and k >= WARM and changed is None and not run.method.is_local:
            before = everything(run)
            step(90, spoils=True)
            changed = differing(before, everything(run))
            assert scaler.get_scale() == 512.0
            assert [name for _, name in run.voided] == ["2.bias"] * len(run.voided) != []
        step(k)
    result = everything(run)
    assert run.replicas_are_equal() == run.method.is_synchronised
    run.close()
    assert not has_overflow or changed is not None
    return changed or [], result


def everything(run: Run) -> dict[str, Tensor]:
    """All that a skipped step must leave alone."""
    saved, kept = run.method.saved(), {f"state {k}": x for k, x in enumerate(state_of(run))}
    tensors = {**saved["shared"], **saved["rank"], **run.parameters, **kept, "run.steps": torch.tensor(run.steps)}
    return {key: x.detach().clone() for key, x in tensors.items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [key for key in a if not torch.equal(a[key], b[key])]


@pytest.mark.parametrize("preset", KEEPING, ids=str)
def test_a_step_that_a_scaler_skips_is_as_if_it_had_not_been(pool: Pool, preset: Preset) -> None:
    control = pool.run(3, overflow, preset, False)
    for (changed, result), (_, expected) in zip(pool.run(3, overflow, preset, True), control, strict=True):
        assert changed == []
        assert differing(result, expected) == []


# -- ranks that step unequally often: all are told, and which rank it was

EVEN_STEPS = 60  # more than lie between two comparisons


def step_unevenly(model: nn.Module, run: Run, times: int, by_hand: bool = False) -> list[str]:
    """What is raised if rank 1 makes its sixth step so many times."""
    said: list[str] = []
    with noted(said):
        for step in range(EVEN_STEPS):
            run.optimizer.zero_grad()
            backward(model, run.rank, step)
            if by_hand:
                run.exchange_gradients()  # type: ignore[attr-defined]
            for _ in range(times if run.rank == 1 and step == 5 else 1):
                run.optimizer.step()
    return said


def step_unevenly_in_ddp(process_group: dist.ProcessGroup, name: str, times: int, overlap: bool) -> list[str]:
    model, group = in_ddp(process_group, bucket_cap_mb=0.001)
    run = Preset(name).attach(model, group, overlap=overlap)
    said = step_unevenly(model, run, times)
    run.close()
    return said


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("times", [0, 2])
@pytest.mark.parametrize("name", ["dense", "ef_sign"])
def test_unequal_steps_in_ddp_raise_on_all_ranks(pool: Pool, name: str, times: int, overlap: bool) -> None:
    for (said,) in pool.run(3, step_unevenly_in_ddp, name, times, overlap):
        assert re.search(
            r"optimizer steps since attach: (\d+) on ranks 0, 2 and (\d+) on rank 1; all ranks must call", said
        )


@pytest.mark.parametrize(
    ("times", "by_hand", "counted"),
    [(2, False, "steps by gradients that are applied already"), (0, True, "optimizer steps since attach")],
)
@pytest.mark.parametrize("name", ["dense", "ef_sign"])
def test_unequal_steps_in_a_plain_script_raise_on_all_ranks(name: str, times: int, by_hand: bool, counted: str) -> None:
    def work(group: SimGroup) -> list[str]:
        model = make_model()
        return step_unevenly(model, Preset(name).attach(model, group), times, by_hand)

    for (said,) in SimWorld[list[str]](3).run(work):
        assert re.match(rf"GroupError: {counted}: \d+ on ranks 0, 2 and \d+ on rank 1; all ranks must call", said)
