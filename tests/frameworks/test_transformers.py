"""Any method in the Hugging Face Trainer: two real ranks, against the same training by DDP on the batches that it drew."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from framework_ranks import new_accelerator
from pool import Pool
from rig import flat, make_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from commopt import Run, attach, build
from commopt.errors import AttachError, CommoptError, MissingExtra
from commopt.run.stand_in import StandIn

ONEBIT = {"name": "onebit_adam", "freeze_step": 3, "scale": "l1", "block_size": 64}
EF = {"name": "ef_sign", "scale": "l1", "block_size": 64}
DILOCO = {"name": "diloco", "every": 3}
TOP_K = {"name": "top_k", "density": 0.1}
STEPS, RATE = 7, 0.01


class Net(nn.Module):
    """The model of the other tests, as the Trainer wants it; it remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.seen.append((x, y))
        return {"loss": nn.functional.mse_loss(self.inner(x), y)}


def data(n: int = 256) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(n, 12, generator=generator), torch.randn(n, 4, generator=generator)
    return [{"x": x[k], "y": y[k]} for k in range(n)]


def trainer_of(folder: str, *, model: Any = None, optimizers: Any = (None, None), **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments, set_seed

    new_accelerator()  # forget the states of the Trainer before
    set_seed(3)
    kept: dict[str, Any] = {
        key: options.pop(key) for key in ("model_init", "eval_dataset", "callbacks") if key in options
    }
    settings: dict[str, Any] = {"max_steps": STEPS, "learning_rate": RATE, "save_strategy": "no", "logging_steps": 2}
    settings |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False, **options}
    arguments = TrainingArguments(folder, per_device_train_batch_size=4, **settings)
    if "model_init" not in kept:
        kept["model"] = Net() if model is None else model
    return Trainer(args=arguments, train_dataset=data(), optimizers=optimizers, **kept)


def attached(folder: str, method: Any, **options: Any) -> tuple[Any, Any]:
    """(trainer, run)"""
    trainer = trainer_of(folder, **options)
    return trainer, attach(trainer, method)


def callback(trainer: Any, method: Any) -> Any:
    from commopt.frameworks.transformers import CommoptCallback

    return CommoptCallback(trainer, method)


def optimizer_for(method: dict[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    if method["name"] == "onebit_adam":
        return torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    return torch.optim.SGD(model.parameters(), lr=RATE)


def replayed(
    batches: list[tuple[Tensor, Tensor]], method: dict[str, Any], every: int, max_norm: float
) -> tuple[Tensor, float]:
    """The same batches by DDP in a loop of its own: parameters, and bytes sent."""
    from transformers import get_scheduler

    model = make_model()
    optimizer = optimizer_for(method, model)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=STEPS)
    wrapped = DistributedDataParallel(model)
    is_update = method["name"] == "onebit_adam"
    run = attach(wrapped, method, optimizer, max_norm=max_norm if max_norm and is_update else None)
    for k, (x, y) in enumerate(batches):
        wrapped.require_backward_grad_sync = is_last = (k + 1) % every == 0
        loss: Any = nn.functional.mse_loss(wrapped(x), y) / every
        loss.backward()
        if is_last:
            if max_norm and not is_update:
                torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            run.optimizer.step()
            schedule.step()
            run.optimizer.zero_grad()
    run.close()
    return flat(model), run.traffic.payload_bytes


def against_ddp(method: dict[str, Any], every: int, options: dict[str, Any]) -> dict[str, Any]:
    optim = {} if method["name"] == "onebit_adam" else {"optim": "sgd"}
    trainer, run = attached(
        "unused", method, gradient_accumulation_steps=every, ddp_find_unused_parameters=False, **optim, **options
    )
    trainer.train()
    nbytes = run.traffic.payload_bytes
    expected, expected_nbytes = replayed(trainer.model.seen, method, every, options.get("max_grad_norm", 1.0))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "same": torch.equal(flat(trainer.model), expected),
        "bytes": nbytes == expected_nbytes > 0,
        "equal": run.replicas_are_equal(),
        "steps": run.steps,
        "logged": [entry["commopt_payload_mb"] for entry in logs],
        "total": nbytes / 1e6,
        "has_norm": "grad_norm" in logs[0],
        "kind": type(run.optimizer).__name__,
    }


@pytest.mark.parametrize(
    ("method", "every", "options"),
    [
        (ONEBIT, 1, {}),
        (ONEBIT, 1, {"max_grad_norm": 0.0}),
        (EF, 1, {"max_grad_norm": 0.1}),
        (ONEBIT, 2, {}),
        (EF, 2, {}),
    ],
    ids=["onebit_adam", "onebit_adam, unclipped", "ef_sign", "onebit_adam, accumulated", "ef_sign, accumulated"],
)
def test_training_is_that_of_ddp(
    huggingface_ranks: Pool,
    method: Any,
    every: int,
    options: Any,
    tmp_path: Path,
) -> None:
    is_update = method["name"] == "onebit_adam"
    for answer in huggingface_ranks.run(2, in_folder, str(tmp_path), against_ddp, method, every, options):
        assert answer["same"]
        assert answer["equal"]
        assert answer["bytes"]
        assert answer["steps"] == STEPS
        assert len(answer["logged"]) == 3
        assert answer["logged"] == sorted(set(answer["logged"]))
        assert answer["logged"][-1] < answer["total"]
        assert answer["has_norm"] is not is_update
        assert answer["kind"] == ("StandIn" if is_update else "SGD")


def in_folder(folder: str, function: Any, *args: Any) -> Any:
    """Call a function in a working directory of its own: the Trainer makes its output folder there."""
    import os

    before = os.getcwd()
    os.chdir(folder)
    try:
        return function(*args)
    finally:
        os.chdir(before)


def by_each_door(folder: str) -> list[bool]:
    """Whether attach and the callback, with a method's block, class or object, and with an optimizer of the user's, train alike."""
    results = []
    for door in ("attach", "callback", "built", "optimizers"):
        model = Net()
        adam = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
        trainer = trainer_of(folder, model=model, optimizers=(adam if door == "optimizers" else None, None))
        if door == "callback":
            trainer.add_callback(callback(trainer, ONEBIT))
        else:
            attach(trainer, build(ONEBIT) if door == "built" else ONEBIT)
        trainer.train()
        results.append(flat(model))
    return [torch.equal(results[0], other) for other in results[1:]]


def test_every_door_leads_to_the_same_training(huggingface_ranks: Pool, tmp_path: Path) -> None:
    assert huggingface_ranks.run(2, by_each_door, str(tmp_path)) == [[True, True, True]] * 2


def before_and_after(folder: str) -> tuple[bool, str, str, bool, str]:
    trainer = trainer_of(folder, optim="sgd")
    with attach(trainer, EF) as run:
        texts = []
        for name in ("optimizer", "voided", "traffic", "method", "steps", "replicas_are_equal"):
            with pytest.raises(AttachError) as caught:
                getattr(run, name)
            texts.append(str(caught.value))
        trainer.train()
        is_his = run.optimizer is trainer.optimizer.optimizer and run.method.name == "ef_sign" and run.voided == []
    try:
        trainer.train()
        again = ""
    except AttachError as error:
        again = str(error)
    return isinstance(run, Run), texts[0], "".join(set(texts) - {texts[0]}), is_his, again


def test_attach_returns_the_run_that_begins_with_training(huggingface_ranks: Pool, tmp_path: Path) -> None:
    for is_run, text, others, is_his, again in huggingface_ranks.run(2, before_and_after, str(tmp_path)):
        assert is_run
        assert text == "ef_sign: its run begins with training; call trainer.train() first"
        assert not others
        assert is_his
        assert "ef_sign has left this Trainer's job" in again


def with_max_norm(folder: str, max_norm: float | None) -> tuple[float, bool]:
    trainer = trainer_of(folder, max_grad_norm=0.5)
    run: Any = attach(trainer, ONEBIT, max_norm=max_norm)
    trainer.train()
    return run.max_norm, run.replicas_are_equal()


@pytest.mark.parametrize(("given", "expected"), [(None, 0.5), (2.0, 2.0)])
def test_max_grad_norm_is_the_runs_unless_it_has_one(
    huggingface_ranks: Pool,
    given: float | None,
    expected: float,
    tmp_path: Path,
) -> None:
    assert huggingface_ranks.run(2, with_max_norm, str(tmp_path), given) == [(expected, True)] * 2


def resumed(folder: str, method: dict[str, Any], optim: str) -> tuple[bool, bool, int]:
    """Whether training goes on bit for bit from a checkpoint, parameters and what is still to be sent."""
    options = {"save_strategy": "steps", "save_steps": 4, "optim": optim}
    trainer, first = attached(folder, method, **options)
    trainer.train()
    after, state = flat(trainer.model), state_of(first)
    dist.barrier()
    trainer, second = attached(folder, method, **options)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-4")
    return torch.equal(after, flat(trainer.model)), torch.equal(state, state_of(second)), second.steps


def state_of(run: Any) -> Tensor:
    saved = run.method.saved()
    return torch.cat([x.reshape(-1).double() for _, part in sorted(saved.items()) for _, x in sorted(part.items())])


@pytest.mark.parametrize(
    ("method", "optim"),
    [(ONEBIT, "adamw_torch"), (EF, "sgd"), ({"name": "noloco", "every": 2, "delay": 1}, "sgd")],
    ids=["onebit_adam", "ef_sign", "noloco"],
)
def test_training_goes_on_bit_for_bit_from_a_checkpoint(
    huggingface_ranks: Pool,
    method: Any,
    optim: str,
    tmp_path: Path,
) -> None:
    assert huggingface_ranks.run(2, resumed, str(tmp_path), method, optim) == [(True, True, STEPS)] * 2
    assert (tmp_path / "checkpoint-4" / "commopt").is_dir()


def trained_with_residuals(folder: str) -> Tensor:
    trainer, run = attached(folder, TOP_K, save_strategy="steps", save_steps=STEPS, optim="sgd")
    trainer.train()
    return residual_of(run)


def residual_of(run: Any) -> Tensor:
    residual: Tensor = run.method.saved()["rank"]["worker_residual"]
    return residual.clone()


def resumed_alone(folder: str) -> tuple[Tensor, int]:
    from transformers import TrainerCallback

    seen: list[tuple[Tensor, int]] = []

    class Look(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            seen.append((residual_of(run), run.steps))

    trainer, run = attached(folder, TOP_K, optim="sgd", max_steps=STEPS + 1)
    trainer.add_callback(Look())
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS}")
    return seen[0]


def test_another_number_of_ranks_takes_the_mean_of_what_was_to_be_sent(
    huggingface_ranks: Pool,
    tmp_path: Path,
) -> None:
    first, second = huggingface_ranks.run(2, trained_with_residuals, str(tmp_path))
    ((own, steps),) = huggingface_ranks.run(1, resumed_alone, str(tmp_path))
    assert first.any()
    assert torch.equal(own, (first + second) / 2)
    assert steps == STEPS


def with_model_init(folder: str) -> tuple[bool, bool, int]:
    """Whether two trainings by one Trainer, which makes a model for each, come to the same."""
    trainer, run = attached(folder, ONEBIT, model_init=Net)
    trainer.train()
    first, model = flat(trainer.model), trainer.model
    trainer.train()
    return torch.equal(first, flat(trainer.model)), trainer.model is model, run.steps


def test_model_init_begins_a_run_for_each_model(huggingface_ranks: Pool, tmp_path: Path) -> None:
    assert huggingface_ranks.run(2, with_model_init, str(tmp_path)) == [(True, False, STEPS)] * 2


LOCAL_STEPS = {"name": "zero_one_adam", "var_freeze_step": 1, "local_step_scaler": 1, "local_step_clipper": 4}


def with_the_best(folder: str, method: dict[str, Any]) -> tuple[bool, bool]:
    """Whether the model of the first evaluation, the best by a rate that diverges, is there in the end, on every rank."""
    from safetensors.torch import load_file
    from transformers import EarlyStoppingCallback

    optim = "sgd" if method["name"] == "diloco" else "adamw_torch"
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "eval_steps": 1, "save_steps": 1}
    options |= {"eval_strategy": "steps", "save_strategy": "steps", "learning_rate": 5.0, "max_grad_norm": 0.0}
    options |= {"label_names": ["y"], "callbacks": [EarlyStoppingCallback(early_stopping_patience=2)]}
    trainer, run = attached(folder, method, eval_dataset=data(16), optim=optim, **options)
    trainer.train()
    assert run.steps == 3
    assert method["name"] == "diloco" or not run.method.is_synchronised  # what it would move the model by is left out
    best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    is_best = all(torch.equal(x, best[name]) for name, x in trainer.model.state_dict().items())
    return is_best, trainer.state.best_global_step < STEPS


@pytest.mark.parametrize("method", [LOCAL_STEPS, DILOCO], ids=["zero_one_adam", "diloco"])
def test_the_best_model_is_there_in_the_end(huggingface_ranks: Pool, method: Any, tmp_path: Path) -> None:
    assert huggingface_ranks.run(2, with_the_best, str(tmp_path), method) == [(True, True)] * 2


def by_an_outer_method(folder: str) -> dict[str, Any]:
    trainer, run = attached(folder, DILOCO, max_steps=6, average_tokens_across_devices=False)
    trainer.train()
    every: list[Any] = [None, None]
    dist.all_gather_object(every, flat(trainer.model))
    try:
        trainer.train()
        again = ""
    except CommoptError as error:
        again = str(error)
    return {
        "wrapped": type(trainer.model_wrapped).__name__,
        "equal": torch.equal(*every),
        "rounds": len(run.reports),
        "mb": trainer.state.log_history[-1]["commopt_payload_mb"],
        "again": again,
    }


def test_an_outer_method_does_without_ddp(huggingface_ranks: Pool, tmp_path: Path) -> None:
    for answer in huggingface_ranks.run(2, by_an_outer_method, str(tmp_path)):
        assert answer["wrapped"] == "Net"
        assert answer["equal"]  # after the round of the last step
        assert answer["rounds"] == 2
        assert answer["mb"] > 0
        assert "diloco has left this Trainer's job; make another Trainer" in answer["again"]


def again(folder: str) -> tuple[bool, int]:
    trainer, run = attached(folder, EF, optim="sgd")
    trainer.train()
    first = run.callback.run
    trainer.train()
    return run.callback.run is first, run.steps


def test_a_trainer_can_train_again(huggingface_ranks: Pool, tmp_path: Path) -> None:
    assert huggingface_ranks.run(2, again, str(tmp_path)) == [(True, 2 * STEPS)] * 2


def with_a_model_of_transformers(folder: str) -> tuple[bool, bool, float]:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

    new_accelerator()
    set_seed(1)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": 64}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM"))
    before = flat(model)
    tokens = torch.randint(64, (64, 16), generator=torch.Generator().manual_seed(1))
    arguments = TrainingArguments(
        folder,
        max_steps=3,
        eval_on_start=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:8])
    run = attach(trainer, "onebit_adam")
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    return run.replicas_are_equal(), torch.equal(before, flat(model)), loss


def test_a_model_of_transformers_trains_with_default_arguments(huggingface_ranks: Pool, tmp_path: Path) -> None:
    for equal, unchanged, loss in huggingface_ranks.run(2, with_a_model_of_transformers, str(tmp_path)):
        assert equal
        assert not unchanged
        assert 0 < loss < 10


def schedule_of_the_users(folder: str) -> tuple[float, bool]:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _half)
    trainer, run = attached(folder, ONEBIT, model=model, optimizers=(optimizer, schedule))
    trainer.train()
    return run.optimizer.param_groups[0]["lr"], isinstance(trainer.optimizer.optimizer, StandIn)


def _half(step: int) -> float:
    return float(0.5**step)


def test_a_schedule_of_the_users_goes_on_with_the_method(huggingface_ranks: Pool, tmp_path: Path) -> None:
    assert huggingface_ranks.run(2, schedule_of_the_users, str(tmp_path)) == [(RATE * 0.5**STEPS, True)] * 2


def in_one_process(folder: str, method: dict[str, Any], optim: str) -> tuple[int, bool, str]:
    trainer, run = attached(folder, method, optim=optim, save_strategy="steps", save_steps=4)
    before = flat(trainer.model)
    trainer.train()
    return run.steps, torch.equal(before, flat(trainer.model)), type(run.callback.run).__name__


@pytest.mark.parametrize(
    ("method", "optim", "kind"),
    [
        (ONEBIT, "adamw_torch", "PlainRun"),
        (EF, "sgd", "PlainRun"),
        (DILOCO, "sgd", "OuterRun"),
    ],
    ids=["onebit_adam", "ef_sign", "diloco"],
)
def test_one_process_trains_too(huggingface_ranks: Pool, method: Any, optim: str, kind: str, tmp_path: Path) -> None:
    assert huggingface_ranks.run(1, in_one_process, str(tmp_path), method, optim) == [(STEPS, False, kind)]


# -- what does not fit


def refused(folder: str, case: str) -> str:
    try:
        CASES[case][0](folder)
    except CommoptError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def twice(folder: str) -> None:
    trainer, _ = attached(folder, EF)
    attach(trainer, "dense")


def not_added(folder: str) -> None:
    trainer = trainer_of(folder, optim="sgd")
    callback(trainer, EF)
    trainer.train()


def batch_size_searched(folder: str) -> None:
    attached(folder, EF, auto_find_batch_size=True)


def sharded(folder: str) -> None:
    attached(folder, EF, fsdp="full_shard")


def unknown(folder: str) -> None:
    attached(folder, {"name": "ef_sign", "block_sise": 64})


def another_optimizer(folder: str) -> None:
    model = Net()
    attach(trainer_of(folder, model=model), EF, torch.optim.AdamW(model.parameters()))


def no_stand_in(folder: str) -> None:
    attached(folder, ONEBIT, optim="sgd")[0].train()


def a_trial(folder: str) -> None:
    attached(folder, EF, optim="sgd", model_init=Net)[0].hyperparameter_search()


def without_the_state(folder: str) -> None:
    trainer_of(folder, optim="sgd", save_strategy="steps", save_steps=4).train()
    dist.barrier()
    attached(folder, EF, optim="sgd")[0].train(resume_from_checkpoint=f"{folder}/checkpoint-4")


def with_anothers_state(folder: str) -> None:
    trainer_of(folder, save_strategy="steps", save_steps=4).train()  # AdamW's
    dist.barrier()
    attached(folder, ONEBIT)[0].train(resume_from_checkpoint=f"{folder}/checkpoint-4")


def with_another_methods_state(folder: str) -> None:
    attached(folder, EF, optim="sgd", save_strategy="steps", save_steps=4)[0].train()
    dist.barrier()
    attached(folder, ONEBIT)[0].train(resume_from_checkpoint=f"{folder}/checkpoint-4")


def evaluated_before(folder: str) -> None:
    trainer, _ = attached(folder, EF, optim="sgd")
    trainer.evaluate(data(8))
    trainer.train()


def trained_before(folder: str) -> None:
    trainer = trainer_of(folder)
    trainer.train()
    attach(trainer, EF)


def on_rank_1_only(folder: str) -> None:
    attached(folder, EF, auto_find_batch_size=dist.get_rank() == 1)


def another_on_rank_1(folder: str) -> None:
    attached(folder, DILOCO if dist.get_rank() else EF)


CASES: dict[str, tuple[Callable[[str], None], str]] = {
    "two": (twice, "AttachError: a second method for a Trainer"),
    "late": (not_added, r"AttachError: .* write trainer\.add_callback\(callback\)"),
    "batch size": (batch_size_searched, "AttachError: auto_find_batch_size"),
    "fsdp": (sharded, "AttachError: fsdp= of the TrainingArguments: a Trainer's sharded model is not supported"),
    "option": (unknown, "ConfigError: method ef_sign: unknown option 'block_sise'; did you mean 'block_size'"),
    "optimizer": (another_optimizer, r"AttachError: an optimizer \(AdamW\) beside a Trainer: .* optimizers=\("),
    "stand-in": (no_stand_in, "AttachError: onebit_adam stands in for Adam or AdamW, not for SGD"),
    "trial": (a_trial, "AttachError: hyperparameter_search"),
    "state": (without_the_state, "CheckpointError: .* was saved without a method; take another .* its model alone"),
    "AdamW's state": (with_anothers_state, "CheckpointError: .* was saved without a method; take another"),
    "another's state": (with_another_methods_state, "CheckpointError: .* saved under ef_sign, not onebit_adam"),
    "evaluated": (evaluated_before, r"AttachError: evaluate\(\) or predict\(\) before .* DDP .* eval_on_start"),
    "trained": (trained_before, r"AttachError: a Trainer that has trained already: .*before the first train\(\)"),
    "one rank": (on_rank_1_only, "AttachError: (rank 1 could not attach: .*)?auto_find_batch_size"),
    "two methods": (another_on_rank_1, "AttachError: the ranks' configurations differ: method.name is ef_sign on rank"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_refused_on_every_rank(huggingface_ranks: Pool, case: str, tmp_path: Path) -> None:
    for answer in huggingface_ranks.run(2, refused, str(tmp_path), case):
        assert re.match(CASES[case][1], answer), answer


def test_without_the_package_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "commopt.frameworks.transformers", raising=False)
    with pytest.raises(
        MissingExtra, match=r"transformers, which is not installed: pip install 'commopt\[transformers\]'"
    ):
        import commopt.frameworks.transformers  # noqa: F401
