"""Any method in a loop of Accelerate: two real ranks, against the same training by DDP or without a wrapper."""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from framework_ranks import error_of, new_accelerator, train_by_ddp
from pool import Pool
from rig import flat, loss_of, make_batch, make_model, mean_norm
from rig import sgd_of as sgd
from told import Quick, assert_chosen
from torch import Tensor, nn

from commopt import attach, build
from commopt.errors import CheckpointError, CommoptError
from commopt.run.checkpoint import has_block
from commopt.run.stand_in import StandIn

ONEBIT = {"name": "onebit_adam", "freeze_step": 3, "scale": "l1", "block_size": 64}
EF = {"name": "ef_sign", "scale": "l1", "block_size": 64}
STEPS = 7
on_two_ranks, alone = (pytest.mark.ranks("huggingface", n) for n in (2, 1))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def train(accelerator: Any, model: Any, optimizer: Any, steps: range, clip: float = 0.0) -> None:
    for step in steps:
        with accelerator.accumulate(model):
            x, y = make_batch(accelerator.process_index, step)
            accelerator.backward(loss_of(model(x), y))
            if clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            for schedule in accelerator._schedulers:
                schedule.step()
            optimizer.zero_grad()


def optimizer_for(method: dict[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    return adamw(model) if method["name"].endswith("_adam") else sgd(model)


def one_cycle(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.05, total_steps=4 * STEPS, cycle_momentum=isinstance(optimizer, torch.optim.AdamW)
    )


def new_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)


def prepared(
    method: dict[str, Any],
    make: Callable[[Any], Any] = dict,
    *,
    is_scaled: bool = False,
    max_norm: Any = None,
    **options: Any,
) -> tuple[Any, Any, Any, Any]:
    """(accelerator, model, optimizer, run), with a schedule; is_scaled: Accelerate makes scalers on devices with float16 only."""
    accelerator = new_accelerator(**options)
    accelerator.scaler = new_scaler() if is_scaled else None
    model: Any = make_model()
    optimizer: Any = optimizer_for(method, model)
    model = accelerator.prepare_model(model, evaluation_mode=method["name"] == "noloco")
    optimizer, _ = accelerator.prepare(optimizer, one_cycle(optimizer))
    if is_scaled:
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"  # so that clipping unscales
    return accelerator, model, optimizer, attach(model, make(method), optimizer, max_norm=max_norm)


# case: method, how it is given, options of `prepared`, and what they are by hand
CASES: dict[str, tuple[dict[str, Any], Callable[[Any], Any], dict[str, Any], dict[str, Any]]] = {
    "onebit_adam": (ONEBIT, dict, {}, {}),
    "ef_sign, clipped": (EF, dict, {}, {"clip": 0.5}),
    "built": (EF, build, {}, {"clip": 0.5}),
    "dgc": ({"name": "dgc", "density": 0.1, "warmup_steps": 2}, dict, {}, {}),
    "onebit_adam, built, accumulated": (ONEBIT, build, {"gradient_accumulation_steps": 2}, {"every": 2}),
    "ef_sign, accumulated": (EF, dict, {"gradient_accumulation_steps": 3}, {"every": 3}),
    "onebit_adam, scaled": (ONEBIT, dict, {"is_scaled": True}, {}),
    "ef_sign, scaled and clipped": (EF, dict, {"is_scaled": True}, {"clip": 0.5}),
    "onebit_adam, bfloat16": (ONEBIT, dict, {"mixed_precision": "bf16"}, {"dtype": torch.bfloat16}),
}


@pytest.mark.parametrize("case", CASES)
@on_two_ranks
def test_training_is_that_of_ddp(case: str) -> None:
    method, make, options, by_hand = CASES[case]
    accelerator, model, optimizer, run = prepared(method, make, **options)
    assert optimizer.optimizer is run.optimizer
    assert isinstance(run.optimizer, StandIn) == (run.method.kind == "update")
    assert run.grad_scaler is accelerator.scaler
    train(accelerator, model, optimizer, range(STEPS), by_hand.get("clip", 0.0))
    nbytes = run.traffic.payload_bytes
    assert run.replicas_are_equal()
    run.close()
    assert not isinstance(optimizer.optimizer, StandIn)
    other = make_model()
    scaler = new_scaler() if "is_scaled" in options else None
    expected, expected_nbytes = trained_by_hand(other, method, optimizer_for(method, other), scaler=scaler, **by_hand)
    assert torch.equal(flat(model.module), expected)
    assert nbytes == expected_nbytes > 0


def trained_by_hand(model: nn.Module, method: Any, optimizer: torch.optim.Optimizer, **options: Any) -> Any:
    """Parameters, and bytes sent."""
    schedule = one_cycle(optimizer)

    def step_twice() -> None:  # as Accelerate, which counts every rank's batch
        for _ in range(2):
            schedule.step()

    batches = [make_batch(dist.get_rank(), step) for step in range(STEPS)]
    return train_by_ddp(model, method, optimizer, batches, schedule=step_twice, **options)


@on_two_ranks
def test_the_runs_grad_norm_is_that_of_the_mean() -> None:
    accelerator, model, optimizer, run = prepared(ONEBIT, max_norm=0.05)
    train(accelerator, model, optimizer, range(1))
    assert run.grad_norm == pytest.approx(mean_norm(2, 0), rel=1e-6)


@pytest.mark.parametrize(("method", "clip"), [(ONEBIT, 0.0), (EF, 0.5)], ids=["onebit_adam", "ef_sign, clipped"])
@alone
def test_one_process_trains_alike_with_a_scaler(method: Any, clip: float) -> None:
    results = []
    for is_scaled in (False, True):  # by a power of two
        accelerator, model, optimizer, _ = prepared(method, is_scaled=is_scaled)
        train(accelerator, model, optimizer, range(STEPS), clip)
        results.append(flat(model))
    assert torch.equal(*results)


# -- checkpoints


LOCAL_STEPS = {"name": "zero_one_adam", "var_freeze_step": 2, "local_step_scaler": 2, "local_step_clipper": 4}


@pytest.mark.parametrize(
    "method",
    [ONEBIT, EF, LOCAL_STEPS, {"name": "noloco", "every": 2, "delay": 1}],
    ids=["onebit_adam", "ef_sign", "zero_one_adam", "noloco"],
)
@on_two_ranks
def test_training_goes_on_bit_for_bit_from_save_state(method: Any, tmp_path: Path) -> None:
    accelerator, model, optimizer, run = prepared(method)
    run.join()
    train(accelerator, model, optimizer, range(5))
    accelerator.save_state(tmp_path)
    accelerator.wait_for_everyone()
    assert (tmp_path / "commopt").is_dir()
    assert not list(tmp_path.glob("custom_checkpoint_*"))  # which Accelerate would unpickle without a safeguard
    train(accelerator, model, optimizer, range(5, 11))
    after = flat(model)
    run.close()
    accelerator, model, optimizer, run = prepared(method)
    untouched = flat(model)
    accelerator.load_state(tmp_path)
    assert not torch.equal(untouched, flat(model))
    run.join()
    train(accelerator, model, optimizer, range(5, 11))
    run.close()
    assert torch.equal(after, flat(model))
    assert run.steps == 11


@on_two_ranks
def test_auto_chooses_and_goes_on_with_its_choice_from_save_state(tmp_path: Path) -> None:
    accelerator, model, optimizer, run = prepared({"name": "auto"}, lambda _: Quick)
    train(accelerator, model, optimizer, range(5))
    accelerator.save_state(tmp_path)
    accelerator.wait_for_everyone()
    train(accelerator, model, optimizer, range(5, STEPS))
    assert_chosen(run)
    run.close()
    other = make_model()
    expected, _ = trained_by_hand(other, Quick, sgd(other))
    assert torch.equal(flat(model), expected)
    accelerator, model, optimizer, run = prepared({"name": "auto"}, lambda _: Quick)
    accelerator.load_state(tmp_path)
    train(accelerator, model, optimizer, range(5, STEPS))
    run.close()
    assert (run.method.choice, run.events) == ("two_way(int8)", [])
    assert torch.equal(flat(model), expected)


TOP_K = {"name": "top_k", "density": 0.1}


def saved(folder: Path) -> Tensor:
    accelerator, model, optimizer, run = prepared(TOP_K)
    train(accelerator, model, optimizer, range(5))
    accelerator.save_state(folder)
    accelerator.wait_for_everyone()
    run.close()
    return residuals(run)


def residuals(run: Any) -> Tensor:
    saved: dict[str, Tensor] = run.method.saved()["rank"]
    return saved["worker_residual"].reshape(-1).clone()


def loaded(folder: Path) -> Tensor:
    accelerator, _, _, run = prepared(TOP_K)
    accelerator.load_state(folder)
    run.close()
    return residuals(run)


def test_another_number_of_ranks_takes_the_mean_of_what_was_to_be_sent(huggingface_ranks: Pool, tmp_path: Path) -> None:
    first, second = huggingface_ranks.run(2, saved, tmp_path)
    (own,) = huggingface_ranks.run(1, loaded, tmp_path)
    assert first.any()
    assert torch.equal(own, (first + second) / 2)


def assert_load_refused(folder: Path, method: dict[str, Any], said: str) -> None:
    accelerator, model, _, run = prepared(method)
    before = flat(model)
    with pytest.raises(CheckpointError, match=said):
        accelerator.load_state(folder)
    assert torch.equal(before, flat(model))
    run.close()


@on_two_ranks
def test_a_missing_state_is_an_error_on_every_rank(tmp_path: Path) -> None:
    saved(tmp_path)
    assert_load_refused(tmp_path, EF, "was saved under top_k, not ef_sign")
    if dist.get_rank() == 0:
        (tmp_path / "commopt" / "rank1.safetensors").unlink()
    dist.barrier()
    assert_load_refused(tmp_path, TOP_K, "rank1.safetensors")
    accelerator = new_accelerator()
    model: Any = make_model()
    accelerator.prepare(model, sgd(model))
    accelerator.save_state(tmp_path / "other")
    accelerator.wait_for_everyone()
    assert_load_refused(tmp_path / "other", TOP_K, "holds no state of top_k: it was saved without a method")


@on_two_ranks
def test_each_of_two_models_has_a_block_of_its_own(tmp_path: Path) -> None:
    states = []
    for is_loaded in (False, True):
        accelerator, runs = new_accelerator(), []
        for method in (TOP_K, ONEBIT):
            model: Any = make_model()
            model, optimizer = accelerator.prepare(model, optimizer_for(method, model))
            runs.append(attach(model, method, optimizer))
            train(accelerator, model, optimizer, range(0 if is_loaded else 2))
        if is_loaded:
            accelerator.load_state(tmp_path)
        else:
            accelerator.save_state(tmp_path)
            accelerator.wait_for_everyone()
        states.append([run.method.saved() for run in runs])
    for before, after in zip(*states, strict=True):
        for held, tensors in before.items():
            assert all(torch.equal(x, after[held][key]) for key, x in tensors.items())


@pytest.mark.parametrize("method", [ONEBIT, EF], ids=["onebit_adam", "ef_sign"])
@alone
def test_one_process_trains_as_without_accelerate(method: Any) -> None:
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
    assert torch.equal(flat(model), flat(other))


# -- what does not fit


def go(choice: Any, **options: Any) -> Callable[..., object]:
    return lambda _, wrapped, optimizer: attach(wrapped, choice, optimizer, **options)


def unprepared_optimizer(accelerator: Any, wrapped: Any, optimizer: Any) -> None:
    from accelerate.optimizer import AcceleratedOptimizer

    attach(wrapped, EF, AcceleratedOptimizer(optimizer.optimizer))


def clipping_an_update(accelerator: Any, wrapped: Any, optimizer: Any) -> None:
    attach(wrapped, ONEBIT, optimizer)
    train(accelerator, wrapped, optimizer, range(1), clip=0.1)


def another_on_rank_1(accelerator: Any, wrapped: Any, optimizer: Any) -> None:
    attach(wrapped, "onebit_adm" if dist.get_rank() == 1 else EF, optimizer)


REFUSED: dict[str, tuple[Callable[..., object], str]] = {
    "hook": (go(EF), r"AttachError: DistributedDataParallelKwargs\(comm_hook='fp16'\): .* leave it out"),
    "sync_each_batch": (go(EF), "AttachError: sync_each_batch: it exchanges"),
    "optimizer": (unprepared_optimizer, "AttachError: an AcceleratedOptimizer without its Accelerator: .*prepare"),
    "model": (lambda *given: attach(make_model(), EF, given[-1]), "AttachError: a model that was not prepared: "),
    "outer": (go({"name": "noloco"}), r"AttachError: noloco on a .*prepare_model\(model, evaluation_mode=True\)"),
    "without ddp": (go(EF), "AttachError: ef_sign on a Sequential without DDP: .* pass what accelerator.prepare"),
    "one rank": (another_on_rank_1, "(ConfigError: unknown|AttachError: rank 1 could not attach: .*onebit_adm)"),
    "clipped": (clipping_an_update, r"GradientsChanged: .* clip by attach\(..., max_norm=...\)"),
    "scaler": (go(EF, grad_scaler=torch.amp.GradScaler("cpu")), "AttachError: grad_scaler under Accelerate: .*leave"),
}


@pytest.mark.parametrize("case", REFUSED)
@on_two_ranks
def test_what_does_not_fit_is_refused_on_every_rank(case: str) -> None:
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    options: dict[str, Any] = {}
    if case == "hook":
        options["kwargs_handlers"] = [DistributedDataParallelKwargs(comm_hook="fp16")]
    if case == "sync_each_batch":
        plugin = GradientAccumulationPlugin(num_steps=2, sync_each_batch=True)
        options["gradient_accumulation_plugin"] = plugin
    accelerator = new_accelerator(**options)
    model: Any = make_model()
    optimizer = accelerator.prepare(adamw(model))
    wrapped = accelerator.prepare_model(model, evaluation_mode=case == "without ddp")
    work, said = REFUSED[case]
    told = error_of(work, accelerator, wrapped, optimizer)
    assert re.match(said, told), told


@on_two_ranks
def test_a_second_exchange_is_told_what_accelerate_has_for_it() -> None:
    accelerator = new_accelerator()
    model: Any = make_model()
    model, optimizer = accelerator.prepare(model, sgd(model))
    attach(model, EF, optimizer)
    x, y = make_batch(dist.get_rank(), 0)
    accelerator.backward(loss_of(model(x), y))
    loss = loss_of(model(x), y)
    # RuntimeError is autograd's own, around ours
    with pytest.raises(RuntimeError, match=r"exchanges a second time(.|\n)*under accelerator.accumulate\(model\)"):
        accelerator.backward(loss)


@on_two_ranks
def test_fsdp2_is_handed_on(tmp_path: Path) -> None:
    """On CPUs Accelerate itself shards nothing, so its state is set by hand."""
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
    with pytest.raises(CommoptError, match=r"^overlap=True with FSDP2:"):
        attach(model, "two_way", optimizer, overlap=True)
    run = attach(model, "two_way", optimizer)
    x, y = make_batch(dist.get_rank(), 0)
    accelerator.backward(loss_of(model(x), y))
    optimizer.step()
    assert type(run).__name__ == "ShardRun"
    assert run.steps == 1
    for hook in accelerator._save_model_state_pre_hook.values():
        hook([model], [], tmp_path)
    assert has_block(tmp_path)


@on_two_ranks
def test_a_refusal_leaves_optimizer_and_schedule_as_they_were() -> None:
    accelerator = new_accelerator()
    model: Any = make_model()
    adam = adamw(model)
    wrapped, optimizer, schedule = accelerator.prepare(model, adam, one_cycle(adam))
    with pytest.raises(CommoptError):
        attach(wrapped, "onebit_adam", optimizer, max_norm=1.0, overlap=True)
    assert optimizer.optimizer is schedule.scheduler.optimizer is adam
    x, y = make_batch(accelerator.process_index, 0)
    accelerator.backward(loss_of(wrapped.module(x), y))
    before = flat(model)
    optimizer.step()
    assert not torch.equal(before, flat(model))
