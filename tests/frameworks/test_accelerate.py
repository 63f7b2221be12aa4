"""Any method in a loop of Accelerate: two real ranks, against the same training by DDP or without a wrapper."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from framework_ranks import new_accelerator
from pool import Pool
from rig import flat, loss_of, make_batch, make_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from commopt import attach, build
from commopt.errors import CommoptError, MissingExtra
from commopt.run.stand_in import StandIn

ONEBIT = {"name": "onebit_adam", "freeze_step": 3, "scale": "l1", "block_size": 64}
EF = {"name": "ef_sign", "scale": "l1", "block_size": 64}
STEPS = 7


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.0)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def half(step: int) -> float:
    return float(0.9**step)


def train(accelerator: Any, model: Any, optimizer: Any, steps: range, clip: float = 0.0, schedule: Any = None) -> None:
    for step in steps:
        with accelerator.accumulate(model):
            x, y = make_batch(accelerator.process_index, step)
            accelerator.backward(loss_of(model(x), y))
            if clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if schedule is not None:
                schedule.step()
            optimizer.zero_grad()


def optimizer_for(method: dict[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    return adam(model) if method["name"].endswith("_adam") else sgd(model)


def reference(
    method: dict[str, Any],
    *,
    clip: float = 0.0,
    every: int = 1,
    make_schedule: Any = None,
    scaler: Any = None,
    steps: int = STEPS,
) -> tuple[Tensor, float]:
    """The same training by DDP in a loop of its own: parameters, and bytes sent."""
    model = make_model()
    optimizer = optimizer_for(method, model)
    schedule: Any = make_schedule(optimizer) if make_schedule else None
    wrapped = DistributedDataParallel(model)
    run = attach(wrapped, method, optimizer, grad_scaler=scaler)
    optimizer = run.optimizer
    for step in range(steps):
        x, y = make_batch(dist.get_rank(), step)
        is_last = (step + 1) % every == 0
        wrapped.require_backward_grad_sync = is_last
        loss = loss_of(wrapped(x), y) / every
        (scaler.scale(loss) if scaler else loss).backward()
        if not is_last:
            continue
        if clip:
            if scaler:
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        for _ in range(2 if schedule is not None else 0):  # as Accelerate, which counts every rank's batch
            schedule.step()
        optimizer.zero_grad()
    run.close()
    return flat(model), run.traffic.payload_bytes


def trained(
    method: dict[str, Any], *, built: bool = True, clip: float = 0.0, every: int = 1, make_schedule: Any = None
) -> tuple[Tensor, float, bool]:
    """By Accelerate: parameters, bytes, and whether replicas are equal."""
    accelerator = new_accelerator(gradient_accumulation_steps=every)
    model: Any = make_model()
    optimizer: Any = optimizer_for(method, model)
    schedule = make_schedule(optimizer) if make_schedule else None
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    run = attach(model, build(method) if built else method, optimizer)
    assert optimizer.optimizer is run.optimizer
    assert isinstance(run.optimizer, StandIn) == (run.method.kind == "update")
    train(accelerator, model, optimizer, range(STEPS), clip, schedule)
    equal = run.replicas_are_equal()
    run.close()
    assert not isinstance(optimizer.optimizer, StandIn)
    return flat(model.module), run.traffic.payload_bytes - 32, equal


def against_ddp(method: dict[str, Any], options: dict[str, Any], built: bool) -> tuple[bool, bool, float, bool]:
    parameters, nbytes, equal = trained(method, built=built, **options)
    expected, expected_nbytes = reference(method, **options)
    return torch.equal(parameters, expected), nbytes == expected_nbytes, nbytes, equal


@pytest.mark.parametrize("built", [True, False], ids=["built", "named"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (ONEBIT, {}),
        (EF, {"clip": 0.5}),
        ({"name": "dgc", "density": 0.1, "warmup_steps": 2}, {}),
        (ONEBIT, {"every": 2}),
        (EF, {"every": 3}),
    ],
    ids=["onebit_adam", "ef_sign, clipped", "dgc", "onebit_adam, accumulated", "ef_sign, accumulated"],
)
def test_training_is_that_of_ddp(huggingface_ranks: Pool, method: Any, options: Any, built: bool) -> None:
    for same, same_bytes, nbytes, equal in huggingface_ranks.run(2, against_ddp, method, options, built):
        assert same
        assert equal
        assert same_bytes
        assert nbytes > 0


def lambda_schedule(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, half)


def one_cycle(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=3 * STEPS)


def sequence(optimizer: Any) -> Any:
    kinds = torch.optim.lr_scheduler
    parts = [kinds.ConstantLR(optimizer, 0.5, 2), kinds.LambdaLR(optimizer, half)]
    return kinds.SequentialLR(optimizer, parts, milestones=[4])


@pytest.mark.parametrize("make_schedule", [lambda_schedule, one_cycle, sequence])
def test_a_schedule_goes_on_with_the_method_that_took_adams_place(huggingface_ranks: Pool, make_schedule: Any) -> None:
    for same, *_ in huggingface_ranks.run(2, against_ddp, ONEBIT, {"make_schedule": make_schedule}, False):
        assert same


def with_a_scaler(method: dict[str, Any], clip: float) -> tuple[bool, bool]:
    def scaler() -> Any:
        return torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)

    accelerator = new_accelerator()
    accelerator.scaler = scaler()  # which Accelerate makes on devices with float16 only
    model: Any = make_model()
    model = accelerator.prepare_model(model)
    optimizer = accelerator.prepare_optimizer(adam(model) if method == ONEBIT else sgd(model))
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"  # so that clipping unscales
    run: Any = attach(model, method, optimizer)
    train(accelerator, model, optimizer, range(STEPS), clip)
    is_known = run.grad_scaler is accelerator.scaler
    run.close()
    expected, _ = reference(method, clip=clip, scaler=scaler())
    return is_known, torch.equal(flat(model.module), expected)


@pytest.mark.parametrize(("method", "clip"), [(ONEBIT, 0.0), (EF, 0.5)], ids=["onebit_adam", "ef_sign, clipped"])
def test_accelerates_scaler_is_found(huggingface_ranks: Pool, method: Any, clip: float) -> None:
    for is_known, same in huggingface_ranks.run(2, with_a_scaler, method, clip):
        assert is_known
        assert same


def in_bf16() -> tuple[bool, bool, str]:
    accelerator = new_accelerator(mixed_precision="bf16")
    model: Any = make_model()
    model, optimizer = accelerator.prepare(model, adamw(model))
    run = attach(model, ONEBIT, optimizer)
    before = flat(model.module)
    train(accelerator, model, optimizer, range(STEPS))
    return run.replicas_are_equal(), torch.equal(before, flat(model.module)), str(next(model.parameters()).dtype)


def test_autocast_leaves_replicas_equal(huggingface_ranks: Pool) -> None:
    assert huggingface_ranks.run(2, in_bf16) == [(True, False, "torch.float32")] * 2


# -- checkpoints


def prepared(method: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """(accelerator, model, optimizer, run)"""
    accelerator = new_accelerator()
    is_outer = method["name"] in ("noloco", "diloco")
    model: Any = make_model()
    optimizer: Any = adamw(model) if method["name"].endswith("_adam") else sgd(model)
    model = accelerator.prepare_model(model, evaluation_mode=is_outer)
    optimizer = accelerator.prepare(optimizer)
    return accelerator, model, optimizer, attach(model, method, optimizer)


def resumed(method: dict[str, Any], folder: str) -> tuple[bool, bool]:
    """Whether training goes on bit for bit, and whether it had anything to go on with."""
    accelerator, model, optimizer, run = prepared(method)
    run.join()
    train(accelerator, model, optimizer, range(5))
    accelerator.save_state(folder)
    accelerator.wait_for_everyone()
    train(accelerator, model, optimizer, range(5, 11))
    after = flat(model)
    run.close()
    accelerator, model, optimizer, run = prepared(method)
    untouched = flat(model)
    accelerator.load_state(folder)
    has_moved = not torch.equal(untouched, flat(model))
    run.join()
    train(accelerator, model, optimizer, range(5, 11))
    run.close()
    return torch.equal(after, flat(model)), has_moved and run.steps == 11


LOCAL_STEPS = {"name": "zero_one_adam", "var_freeze_step": 2, "local_step_scaler": 2, "local_step_clipper": 4}


@pytest.mark.parametrize(
    "method",
    [ONEBIT, EF, LOCAL_STEPS, {"name": "noloco", "every": 2, "delay": 1}],
    ids=["onebit_adam", "ef_sign", "zero_one_adam", "noloco"],
)
def test_training_goes_on_bit_for_bit_from_save_state(huggingface_ranks: Pool, method: Any, tmp_path: Path) -> None:
    assert huggingface_ranks.run(2, resumed, method, str(tmp_path)) == [(True, True)] * 2
    assert (tmp_path / "commopt").is_dir()
    assert not list(tmp_path.glob("custom_checkpoint_*"))  # which Accelerate would unpickle without a safeguard


TOP_K = {"name": "top_k", "density": 0.1}


def saved(folder: str) -> Tensor:
    accelerator, model, optimizer, run = prepared(TOP_K)
    train(accelerator, model, optimizer, range(5))
    accelerator.save_state(folder)
    accelerator.wait_for_everyone()
    run.close()
    return residuals(run)


def residuals(run: Any) -> Tensor:
    saved: dict[str, Tensor] = run.method.saved()["rank"]
    return saved["worker_residual"].reshape(-1).clone()


def loaded(folder: str) -> Tensor:
    accelerator, _, _, run = prepared(TOP_K)
    accelerator.load_state(folder)
    run.close()
    return residuals(run)


def test_another_number_of_ranks_takes_the_mean_of_what_was_to_be_sent(
    huggingface_ranks: Pool,
    tmp_path: Path,
) -> None:
    first, second = huggingface_ranks.run(2, saved, str(tmp_path))
    (own,) = huggingface_ranks.run(1, loaded, str(tmp_path))
    assert first.any()
    assert torch.equal(own, (first + second) / 2)


def load_refused(folder: str, method: dict[str, Any]) -> str:
    accelerator, model, _, run = prepared(method)
    before = flat(model)
    try:
        accelerator.load_state(folder)
    except CommoptError as error:
        assert torch.equal(before, flat(model))
        return f"{type(error).__name__}: {error}"
    finally:
        run.close()
    return ""


def test_a_missing_state_is_an_error_on_every_rank(huggingface_ranks: Pool, tmp_path: Path) -> None:
    huggingface_ranks.run(2, saved, str(tmp_path))
    for answer in huggingface_ranks.run(2, load_refused, str(tmp_path), EF):
        assert re.match("CheckpointError: .* was saved under top_k, not ef_sign", answer), answer
    (tmp_path / "commopt" / "rank1.safetensors").unlink()
    for answer in huggingface_ranks.run(2, load_refused, str(tmp_path), TOP_K):
        assert re.match("CheckpointError: .*rank1.safetensors", answer), answer


def saved_without(folder: str) -> str:
    accelerator = new_accelerator()
    model: Any = make_model()
    accelerator.prepare(model, sgd(model))
    accelerator.save_state(folder)
    accelerator.wait_for_everyone()
    return load_refused(folder, TOP_K)


def test_a_state_without_a_method_is_an_error(huggingface_ranks: Pool, tmp_path: Path) -> None:
    for answer in huggingface_ranks.run(2, saved_without, str(tmp_path)):
        assert re.match("CheckpointError: .* was saved without a method; take another", answer), answer


def two_models(folder: str) -> list[bool]:
    """Whether each of two runs of one Accelerator gets its own block back."""

    def make() -> tuple[Any, list[Any]]:
        accelerator = new_accelerator()
        runs = []
        for method in (TOP_K, ONEBIT):
            model: Any = make_model()
            model, optimizer = accelerator.prepare(model, optimizer_for(method, model))
            runs.append(attach(model, method, optimizer))
            train(accelerator, model, optimizer, range(2 if folder else 0))
        return accelerator, runs

    accelerator, runs = make()
    accelerator.save_state(folder)
    accelerator.wait_for_everyone()
    before = [run.method.saved() for run in runs]
    accelerator, others = make()
    accelerator.load_state(folder)
    return [
        all(torch.equal(x, other.method.saved()[held][key]) for held in saved for key, x in saved[held].items())
        for saved, other in zip(before, others, strict=True)
    ]


def test_each_of_two_models_has_a_block_of_its_own(huggingface_ranks: Pool, tmp_path: Path) -> None:
    assert huggingface_ranks.run(2, two_models, str(tmp_path)) == [[True, True]] * 2


# -- outer methods, and one process


def by_an_outer_method(method: dict[str, Any]) -> tuple[bool, float]:
    accelerator, model, optimizer, run = prepared(method)
    run.join()
    train(accelerator, model, optimizer, range(STEPS))
    run.finish()
    parameters = flat(model)
    run.close()
    dist.barrier()
    other = make_model()
    inner = sgd(other)
    twin = attach(other, method, inner)
    for step in twin.range(STEPS):
        x, y = make_batch(dist.get_rank(), step)
        inner.zero_grad()
        loss_of(other(x), y).backward()
        inner.step()
    twin.finish()
    twin.close()
    dist.barrier()
    return torch.equal(parameters, flat(other)), run.traffic.payload_bytes


def test_an_outer_method_trains_as_without_accelerate(huggingface_ranks: Pool) -> None:
    for same, nbytes in huggingface_ranks.run(2, by_an_outer_method, {"name": "diloco", "every": 3}):
        assert same
        assert nbytes > 0


def in_one_process(method: dict[str, Any]) -> bool:
    accelerator = new_accelerator(gradient_accumulation_steps=2)
    model: Any = make_model()
    model, optimizer = accelerator.prepare(model, optimizer_for(method, model))
    attach(model, method, optimizer, overlap=False)
    train(accelerator, model, optimizer, range(STEPS))
    other = make_model()
    run = attach(other, method, optimizer_for(method, other))
    for step in range(STEPS):
        x, y = make_batch(0, step)
        (loss_of(other(x), y) / 2).backward()
        if step % 2:
            run.optimizer.step()
            run.optimizer.zero_grad()
    return torch.equal(flat(model), flat(other))


@pytest.mark.parametrize("method", [ONEBIT, EF], ids=["onebit_adam", "ef_sign"])
def test_one_process_trains_as_without_accelerate(huggingface_ranks: Pool, method: Any) -> None:
    assert huggingface_ranks.run(1, in_one_process, method) == [True]


def parameters_with(scale: float | None, method: dict[str, Any], clip: float) -> Tensor:
    accelerator = new_accelerator()
    if scale is not None:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    model: Any = make_model()
    model = accelerator.prepare_model(model)
    optimizer = accelerator.prepare_optimizer(optimizer_for(method, model))
    if scale is not None:
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"  # so that clipping unscales
    attach(model, method, optimizer)
    train(accelerator, model, optimizer, range(STEPS), clip)
    return flat(model)


@pytest.mark.parametrize(("method", "clip"), [(ONEBIT, 0.0), (EF, 0.5)], ids=["onebit_adam", "ef_sign, clipped"])
def test_one_process_trains_alike_with_a_scaler(huggingface_ranks: Pool, method: Any, clip: float) -> None:
    plain, scaled = (huggingface_ranks.run(1, parameters_with, scale, method, clip)[0] for scale in (None, 256.0))
    assert torch.equal(plain, scaled)  # the scale is a power of two


# -- what does not fit


def refused(case: str) -> str:
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    options: dict[str, Any] = {}
    if case == "hook":
        options["kwargs_handlers"] = [DistributedDataParallelKwargs(comm_hook="fp16")]
    if case == "sync_each_batch":
        plugin = GradientAccumulationPlugin(num_steps=2, sync_each_batch=True)
        options["gradient_accumulation_plugin"] = plugin
    accelerator = new_accelerator(**options)
    own = make_model()
    optimizer: Any = adamw(own)
    wrapped = accelerator.prepare_model(own, evaluation_mode=case == "without ddp")
    try:
        CASES[case][0](accelerator, wrapped, own, optimizer)
    except CommoptError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def go(choice: Any, **options: Any) -> Callable[..., None]:
    def attempt(accelerator: Any, wrapped: Any, own: Any, optimizer: Any) -> None:
        attach(wrapped, choice, accelerator.prepare(optimizer), **options)

    return attempt


def after_a_step(accelerator: Any, wrapped: Any, own: Any, optimizer: Any) -> None:
    optimizer = accelerator.prepare(optimizer)
    train(accelerator, wrapped, optimizer, range(1))
    attach(wrapped, ONEBIT, optimizer)


def unprepared_model(accelerator: Any, wrapped: Any, own: Any, optimizer: Any) -> None:
    attach(make_model(), EF, accelerator.prepare(optimizer))


def unprepared_optimizer(accelerator: Any, wrapped: Any, own: Any, optimizer: Any) -> None:
    from accelerate.optimizer import AcceleratedOptimizer

    attach(wrapped, EF, AcceleratedOptimizer(optimizer))


def another_on_rank_1(accelerator: Any, wrapped: Any, own: Any, optimizer: Any) -> None:
    attach(wrapped, "onebit_adm" if dist.get_rank() == 1 else EF, accelerator.prepare(optimizer))


def clipping_an_update(accelerator: Any, wrapped: Any, own: Any, optimizer: Any) -> None:
    optimizer = accelerator.prepare(optimizer)
    attach(wrapped, ONEBIT, optimizer)
    train(accelerator, wrapped, optimizer, range(1), clip=0.1)


def stepping_what_was_replaced(accelerator: Any, wrapped: Any, own: Any, optimizer: Any) -> None:
    attach(wrapped, ONEBIT, accelerator.prepare(optimizer))
    optimizer.step()


def twice(accelerator: Any, wrapped: Any, own: Any, optimizer: Any) -> None:
    optimizer = accelerator.prepare(optimizer)
    attach(wrapped, EF, optimizer)
    attach(wrapped, EF, optimizer)


CASES: dict[str, tuple[Callable[..., None], str]] = {
    "hook": (go(EF), r"AttachError: DistributedDataParallelKwargs\(comm_hook='fp16'\): .* leave it out"),
    "sync_each_batch": (go(EF), "AttachError: sync_each_batch: it exchanges"),
    "optimizer": (unprepared_optimizer, "AttachError: an AcceleratedOptimizer without its Accelerator: .*prepare"),
    "model": (unprepared_model, "AttachError: a model that was not prepared: "),
    "outer": (go({"name": "noloco"}), r"AttachError: noloco on a .*prepare_model\(model, evaluation_mode=True\)"),
    "without ddp": (go(EF), "AttachError: ef_sign on a Sequential without DDP: .* pass what accelerator.prepare"),
    "unknown": (go("ef_sgn"), "ConfigError: unknown method 'ef_sgn'; did you mean 'ef_sign'"),
    "one rank": (another_on_rank_1, "(ConfigError: unknown|AttachError: rank 1 could not attach: .*onebit_adm)"),
    "no stand-in": (go("distributed_lion"), "AttachError: distributed_lion stands in for Lion, not for AdamW"),
    "stepped": (after_a_step, "AttachError: onebit_adam cannot take the place of AdamW after steps"),
    "clipped": (clipping_an_update, r"GradientsChanged: .* clip by attach\(..., max_norm=...\)"),
    "replaced": (stepping_what_was_replaced, "AttachError: onebit_adam has taken the place of this AdamW"),
    "scaler": (go(EF, grad_scaler=torch.amp.GradScaler("cpu")), "AttachError: grad_scaler under Accelerate: .*leave"),
    "twice": (twice, "AttachError: .*(hook|attached to this model already)"),
    "max_norm": (go(EF, max_norm=1.0, overlap=True), "AttachError: overlap=True with max_norm: .*overlap=False"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_refused_on_every_rank(huggingface_ranks: Pool, case: str) -> None:
    for answer in huggingface_ranks.run(2, refused, case):
        assert re.match(CASES[case][1], answer), answer


def exchanging_twice() -> str:
    accelerator = new_accelerator()
    model: Any = make_model()
    model, optimizer = accelerator.prepare(model, sgd(model))
    attach(model, EF, optimizer)
    try:
        for step in range(2):
            x, y = make_batch(dist.get_rank(), step)
            accelerator.backward(loss_of(model(x), y))
    except RuntimeError as error:  # autograd's own, around ours
        return str(error)
    return ""


def test_a_second_exchange_is_told_what_accelerate_has_for_it(huggingface_ranks: Pool) -> None:
    for answer in huggingface_ranks.run(2, exchanging_twice):
        assert "exchanges a second time" in answer
        assert "under accelerator.accumulate(model)" in answer


def sharded(**options: Any) -> str:
    """What a model by fully_shard is handed on to; on CPUs Accelerate itself shards nothing, so its state is set by hand."""
    from accelerate.utils import DistributedType
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    accelerator = new_accelerator()
    model = make_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = accelerator.prepare_optimizer(sgd(model), device_placement=False)
    accelerator._models.append(model)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = types.SimpleNamespace(fsdp_version=2)
    try:
        run = attach(model, "two_way", optimizer, **options)
    except CommoptError as error:
        return str(error)
    x, y = make_batch(dist.get_rank(), 0)
    accelerator.backward(loss_of(model(x), y))
    optimizer.step()
    return f"{type(run).__name__}, {run.steps}"


def sharded_with_overlap() -> str:
    return sharded(overlap=True)


def test_fsdp2_is_handed_on(huggingface_ranks: Pool) -> None:
    assert huggingface_ranks.run(2, sharded) == ["ShardRun, 1"] * 2
    assert [text.partition(":")[0] for text in huggingface_ranks.run(2, sharded_with_overlap)] == [
        "overlap=True with FSDP2"
    ] * 2


def after_a_refusal() -> tuple[bool, bool]:
    """Whether the prepared optimizer and its schedule are as they were, and can be used."""
    accelerator = new_accelerator()
    model: Any = make_model()
    adam = adamw(model)
    wrapped, optimizer, schedule = accelerator.prepare(model, adam, lambda_schedule(adam))
    try:
        attach(wrapped, "onebit_adam", optimizer, max_norm=1.0, overlap=True)
    except CommoptError:
        is_restored = optimizer.optimizer is adam and schedule.scheduler.optimizer is adam
    x, y = make_batch(accelerator.process_index, 0)
    accelerator.backward(loss_of(wrapped.module(x), y))
    before = flat(model)
    optimizer.step()
    return is_restored, not torch.equal(before, flat(model))


def test_a_refusal_leaves_optimizer_and_schedule_as_they_were(huggingface_ranks: Pool) -> None:
    assert huggingface_ranks.run(2, after_a_refusal) == [(True, True)] * 2


def test_without_the_package_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delitem(sys.modules, "commopt.frameworks.accelerate", raising=False)
    with pytest.raises(MissingExtra, match=r"accelerate, which is not installed: pip install 'commopt\[accelerate\]'"):
        import commopt.frameworks.accelerate  # noqa: F401
