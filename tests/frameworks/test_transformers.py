"""Any method in the Hugging Face Trainer: two real ranks, against the same training by DDP on the batches that it drew."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from framework_ranks import error_of, gathered, new_accelerator, train_by_ddp
from rig import flat, make_model
from told import Quick, assert_chosen
from torch import Tensor, nn

from commopt import Run, attach, build
from commopt.errors import AttachError
from commopt.run.stand_in import StandIn

ONEBIT = {"name": "onebit_adam", "freeze_step": 3, "scale": "l1", "block_size": 64}
EF = {"name": "ef_sign", "scale": "l1", "block_size": 64}
DILOCO = {"name": "diloco", "every": 3}
STEPS, RATE = 7, 0.01
on_two_ranks = pytest.mark.ranks("huggingface", 2)


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


def trainer_of(folder: Path, given: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """given: to the Trainer, a new model if it is None; options: of its arguments."""
    from transformers import Trainer, TrainingArguments, set_seed

    new_accelerator()  # forget the states of the Trainer before
    set_seed(3)
    settings: dict[str, Any] = {"max_steps": STEPS, "learning_rate": RATE, "save_strategy": "no", "logging_steps": 2}
    settings |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False, **options}
    arguments = TrainingArguments(str(folder), per_device_train_batch_size=4, **settings)
    return Trainer(args=arguments, train_dataset=data(), **({"model": Net()} if given is None else given))


def attached(folder: Path, method: Any, **options: Any) -> tuple[Any, Any]:
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


@pytest.mark.parametrize(
    ("method", "every", "max_norm"),
    [(ONEBIT, 1, 1.0), (ONEBIT, 1, 0.0), (EF, 1, 0.1), (ONEBIT, 2, 1.0), (EF, 2, 1.0)],
    ids=["onebit_adam", "onebit_adam, unclipped", "ef_sign", "onebit_adam, accumulated", "ef_sign, accumulated"],
)
@on_two_ranks
def test_training_is_that_of_ddp(method: Any, every: int, max_norm: float, tmp_path: Path) -> None:
    from transformers import get_scheduler

    is_update = method["name"] == "onebit_adam"
    options: dict[str, Any] = {"gradient_accumulation_steps": every, "max_grad_norm": max_norm}
    options |= {"optim": "adamw_torch" if is_update else "sgd", "ddp_find_unused_parameters": False}
    trainer, run = attached(tmp_path, method, **options)
    trainer.train()
    sent = run.traffic.payload_bytes
    assert run.replicas_are_equal()
    assert run.steps == STEPS
    assert isinstance(run.optimizer, StandIn) == is_update
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    logged = [entry["commopt_payload_mb"] for entry in logs]
    assert len(logged) == 3
    assert logged == sorted(set(logged))
    assert logged[-1] < sent / 1e6
    assert ("grad_norm" in logs[0]) == (not is_update or max_norm > 0)
    model = make_model()
    optimizer = optimizer_for(method, model)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=STEPS)
    clipping: dict[str, Any] = {"max_norm" if is_update else "clip": max_norm or None}
    expected, nbytes = train_by_ddp(
        model, method, optimizer, trainer.model.seen, every=every, schedule=schedule.step, **clipping
    )
    assert torch.equal(flat(trainer.model), expected)
    assert sent == nbytes > 0


@on_two_ranks
def test_every_door_leads_to_the_same_training(tmp_path: Path) -> None:
    """attach and the callback, with a method's block or object, and with an optimizer of the user's."""
    results = []
    for door in ("attach", "callback", "built", "optimizers"):
        model = Net()
        adam = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
        trainer = trainer_of(tmp_path, {"model": model, "optimizers": (adam if door == "optimizers" else None, None)})
        if door == "callback":
            trainer.add_callback(callback(trainer, ONEBIT))
        else:
            attach(trainer, build(ONEBIT) if door == "built" else ONEBIT)
        trainer.train()
        results.append(flat(model))
    assert all(torch.equal(results[0], other) for other in results[1:])


@on_two_ranks
def test_attach_returns_the_run_that_begins_with_training(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, optim="sgd")
    with attach(trainer, EF) as run:
        assert isinstance(run, Run)
        for name in ("optimizer", "voided", "traffic", "method", "steps", "replicas_are_equal"):
            with pytest.raises(
                AttachError, match=r"^ef_sign: its run begins with training; call trainer.train\(\) first$"
            ):
                getattr(run, name)
        trainer.train()
        assert run.optimizer is trainer.optimizer.optimizer
        assert run.method.name == "ef_sign"
        assert run.voided == []
    with pytest.raises(AttachError, match="ef_sign has left this Trainer's job"):
        trainer.train()


@pytest.mark.parametrize(("given", "expected"), [(None, 0.5), (2.0, 2.0)])
@on_two_ranks
def test_max_grad_norm_is_the_runs_unless_it_has_one(given: float | None, expected: float, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_grad_norm=0.5, max_steps=1, logging_steps=1)
    run: Any = attach(trainer, ONEBIT, max_norm=given)
    trainer.train()
    assert run.max_norm == expected
    assert trainer.state.log_history[0]["grad_norm"] == run.grad_norm > 0
    assert run.replicas_are_equal()


def state_of(run: Any) -> Tensor:
    saved = run.method.saved()
    return torch.cat([x.reshape(-1).double() for _, part in sorted(saved.items()) for _, x in sorted(part.items())])


@pytest.mark.parametrize(
    ("method", "optim"),
    [(ONEBIT, "adamw_torch"), (EF, "sgd"), ({"name": "noloco", "every": 2, "delay": 1}, "sgd")],
    ids=["onebit_adam", "ef_sign", "noloco"],
)
@on_two_ranks
def test_training_goes_on_bit_for_bit_from_a_checkpoint(method: Any, optim: str, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 4, "optim": optim}
    trainer, first = attached(tmp_path, method, **options)
    trainer.train()
    assert (tmp_path / "checkpoint-4" / "commopt").is_dir()
    dist.barrier()
    again, second = attached(tmp_path, method, **options)
    again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-4")
    assert torch.equal(flat(trainer.model), flat(again.model))
    assert torch.equal(state_of(first), state_of(second))  # what is still to be sent
    assert second.steps == STEPS


@on_two_ranks
def test_auto_chooses_and_goes_on_with_its_choice_from_a_checkpoint(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5, "optim": "sgd", "max_grad_norm": 0.0}
    options |= {"lr_scheduler_type": "constant", "ddp_find_unused_parameters": False}
    trainer, run = attached(tmp_path, Quick, **options)
    trainer.train()
    assert_chosen(run)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    expected, _ = train_by_ddp(model, Quick, optimizer, trainer.model.seen)
    assert torch.equal(flat(trainer.model), expected)
    again, resumed = attached(tmp_path, Quick, **options)
    again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-5")
    assert (resumed.method.choice, resumed.events) == ("two_way(int8)", [])
    assert torch.equal(flat(again.model), expected)
    assert torch.equal(state_of(run), state_of(resumed))


@pytest.mark.parametrize(
    ("method", "options"), [(EF, {"optim": "sgd"}), (ONEBIT, {"given": {"model_init": Net}})], ids=["", "model_init"]
)
@on_two_ranks
def test_a_trainer_can_train_again_in_one_run_for_each_model(method: Any, options: Any, tmp_path: Path) -> None:
    trainer, run = attached(tmp_path, method, **options)
    trainer.train()
    first, first_run = trainer.model, run.run
    trainer.train()
    is_same = "given" not in options
    assert (trainer.model is first) == (run.run is first_run) == is_same
    assert torch.equal(flat(first), flat(trainer.model))
    assert run.steps == (2 * STEPS if is_same else STEPS)


LOCAL_STEPS = {"name": "zero_one_adam", "var_freeze_step": 1, "local_step_scaler": 1, "local_step_clipper": 4}


@pytest.mark.parametrize("method", [LOCAL_STEPS, DILOCO], ids=["zero_one_adam", "diloco"])
@on_two_ranks
def test_the_best_model_is_there_in_the_end(method: Any, tmp_path: Path) -> None:
    """It is that of the first evaluation, by a rate that diverges."""
    from safetensors.torch import load_file
    from transformers import EarlyStoppingCallback

    optim = "sgd" if method["name"] == "diloco" else "adamw_torch"
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "eval_steps": 1, "save_steps": 1}
    options |= {"eval_strategy": "steps", "save_strategy": "steps", "learning_rate": 5.0, "max_grad_norm": 0.0}
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    given = {"model": Net(), "eval_dataset": data(16), "callbacks": [stopping]}
    trainer, run = attached(tmp_path, method, given=given, optim=optim, label_names=["y"], **options)
    trainer.train()
    assert run.steps == 3
    assert method["name"] == "diloco" or not run.method.is_synchronised  # what it would move the model by is left out
    best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    assert all(torch.equal(x, best[name]) for name, x in trainer.model.state_dict().items())
    assert trainer.state.best_global_step < STEPS


@on_two_ranks
def test_an_outer_method_does_without_ddp(tmp_path: Path) -> None:
    trainer, run = attached(tmp_path, DILOCO, max_steps=6, average_tokens_across_devices=False)
    trainer.train()
    assert isinstance(trainer.model_wrapped, Net)
    assert torch.equal(*gathered(flat(trainer.model)))  # after the round of the last step
    assert len(run.reports) == 2
    assert trainer.state.log_history[-1]["commopt_payload_mb"] > 0
    with pytest.raises(AttachError, match="diloco has left this Trainer's job; make another Trainer"):
        trainer.train()


@on_two_ranks
def test_a_schedule_of_the_users_goes_on_with_the_method(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(0.5**step))
    given = {"model": model, "optimizers": (optimizer, schedule), "eval_dataset": data(16)}
    trainer, run = attached(tmp_path, ONEBIT, given=given, eval_on_start=True, label_names=["y"])
    trainer.train()
    assert "eval_loss" in trainer.state.log_history[0]
    assert run.optimizer.param_groups[0]["lr"] == RATE * 0.5**STEPS
    assert isinstance(trainer.optimizer.optimizer, StandIn)


@pytest.mark.parametrize(
    ("method", "optim", "kind"),
    [(ONEBIT, "adamw_torch", "PlainRun"), (EF, "sgd", "PlainRun"), (DILOCO, "sgd", "OuterRun")],
    ids=["onebit_adam", "ef_sign", "diloco"],
)
@pytest.mark.ranks("huggingface", 1)
def test_one_process_trains_too(method: Any, optim: str, kind: str, tmp_path: Path) -> None:
    trainer, run = attached(tmp_path, method, optim=optim, save_strategy="steps", save_steps=4)
    before = flat(trainer.model)
    trainer.train()
    assert run.steps == STEPS
    assert not torch.equal(before, flat(trainer.model))
    assert type(run.run).__name__ == kind


# -- what does not fit


def twice(folder: Path) -> None:
    trainer, _ = attached(folder, EF)
    attach(trainer, "dense")


def not_added(folder: Path) -> None:
    trainer = trainer_of(folder, optim="sgd")
    callback(trainer, EF)
    trainer.train()


def another_optimizer(folder: Path) -> None:
    trainer = trainer_of(folder)
    attach(trainer, EF, torch.optim.AdamW(trainer.model.parameters()))


def resumed_from(theirs: Any, ours: dict[str, Any]) -> Callable[[Path], None]:
    """From a checkpoint of another method, or of none."""

    def work(folder: Path) -> None:
        kinds = {"ef_sign": "sgd", "onebit_adam": "adamw_torch"}
        optim = kinds[(theirs or ours)["name"]]
        trainer = trainer_of(folder, optim=optim, save_strategy="steps", save_steps=4)
        if theirs is not None:
            attach(trainer, theirs)
        trainer.train()
        dist.barrier()
        again, _ = attached(folder, ours, optim=kinds[ours["name"]])
        again.train(resume_from_checkpoint=f"{folder}/checkpoint-4")

    return work


def evaluated_before(folder: Path) -> None:
    trainer, _ = attached(folder, EF, optim="sgd")
    trainer.evaluate(data(8))
    trainer.train()


def trained_before(folder: Path) -> None:
    trainer = trainer_of(folder)
    trainer.train()
    attach(trainer, EF)


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "two": (twice, "AttachError: a second method for a Trainer"),
    "late": (not_added, r"AttachError: .* write trainer\.add_callback\(callback\)"),
    "batch size": (lambda folder: attached(folder, EF, auto_find_batch_size=True), "AttachError: auto_find_batch_size"),
    "fsdp": (
        lambda folder: attached(folder, EF, fsdp="full_shard"),
        "AttachError: fsdp= of the TrainingArguments: a Trainer's sharded model is not supported",
    ),
    "optimizer": (another_optimizer, r"AttachError: an optimizer \(AdamW\) beside a Trainer: .* optimizers=\("),
    "stand-in": (
        lambda folder: attached(folder, ONEBIT, optim="sgd")[0].train(),
        "AttachError: onebit_adam stands in for Adam or AdamW, not for SGD",
    ),
    "trial": (
        lambda folder: attached(folder, EF, given={"model_init": Net}, optim="sgd")[0].hyperparameter_search(),
        "AttachError: hyperparameter_search",
    ),
    "state": (resumed_from(None, EF), "CheckpointError: .* holds no state of ef_sign: .* its model alone"),
    "another's state": (resumed_from(EF, ONEBIT), "CheckpointError: .* saved under ef_sign, not onebit_adam"),
    "evaluated": (evaluated_before, r"AttachError: evaluate\(\) or predict\(\) before .* DDP .* eval_on_start"),
    "trained": (trained_before, r"AttachError: a Trainer that has trained already: .*before the first train\(\)"),
    "one rank": (
        lambda folder: attached(folder, EF, auto_find_batch_size=dist.get_rank() == 1),
        "AttachError: (rank 1 could not attach: .*)?auto_find_batch_size",
    ),
}


@pytest.mark.parametrize("case", CASES)
@on_two_ranks
def test_what_does_not_fit_is_refused_on_every_rank(case: str, tmp_path: Path) -> None:
    work, said = CASES[case]
    told = error_of(work, tmp_path)
    assert re.match(said, told), told
