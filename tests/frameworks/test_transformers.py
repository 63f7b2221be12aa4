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
from huggingface_ranks import HuggingFaceRanks, alone, new_accelerator, two  # noqa: F401
from rig import flat, make_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from commopt import attach as open_door
from commopt import build
from commopt.errors import CommoptError, MissingExtra
from commopt.frameworks import ddp

ONEBIT = {"name": "onebit_adam", "freeze_step": 3, "scale": "l1", "block_size": 64}
EF = {"name": "ef_sign", "scale": "l1", "block_size": 64}
DILOCO = {"name": "diloco", "every": 3}
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


def trainer_of(folder: str, *callbacks: Any, model: Any = None, optimizers: Any = (None, None), **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments, set_seed

    new_accelerator()  # forget the states of the Trainer before
    set_seed(3)
    settings: dict[str, Any] = {"max_steps": STEPS, "learning_rate": RATE, "save_strategy": "no", "logging_steps": 2}
    settings |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False, **options}
    arguments = TrainingArguments(folder, per_device_train_batch_size=4, **settings)
    return Trainer(
        Net() if model is None else model,
        arguments,
        train_dataset=data(),
        callbacks=list(callbacks),
        optimizers=optimizers,
    )


def callback(method: Any, **options: Any) -> Any:
    from commopt.frameworks.transformers import CommoptCallback

    return CommoptCallback(method, **options)


def replayed(
    batches: list[tuple[Tensor, Tensor]], method: dict[str, Any], every: int, max_norm: float
) -> tuple[Tensor, float]:
    """The same batches by DDP and `integrations.ddp`: parameters, and bytes sent."""
    from transformers import get_scheduler

    model = make_model()
    if method["name"] == "onebit_adam":
        clip: dict[str, Any] = {"max_norm": max_norm} if max_norm else {}
        made: Any = build(method, model.named_parameters(), lr=RATE, **clip)
        optimizer, given = made, None
    else:
        made = build(method)
        optimizer = given = torch.optim.SGD(model.parameters(), lr=RATE)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=STEPS)
    wrapped = DistributedDataParallel(model)
    attachment = ddp.attach(wrapped, made, given, overlap=not made.needs_all_buckets)
    for k, (x, y) in enumerate(batches):
        wrapped.require_backward_grad_sync = is_last = (k + 1) % every == 0
        loss: Any = nn.functional.mse_loss(wrapped(x), y) / every
        loss.backward()
        if is_last:
            if given is not None and max_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    attachment.detach()
    return flat(model), attachment.group.traffic.payload_bytes


def against_ddp(method: dict[str, Any], every: int, options: dict[str, Any]) -> dict[str, Any]:
    ours = callback(method)
    optim = {} if method["name"] == "onebit_adam" else {"optim": "sgd"}
    trainer = trainer_of(
        "unused", ours, gradient_accumulation_steps=every, ddp_find_unused_parameters=False, **optim, **options
    )
    trainer.train()
    nbytes = ours.attachment.group.traffic.payload_bytes
    expected, expected_nbytes = replayed(trainer.model.seen, method, every, options.get("max_grad_norm", 1.0))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "same": torch.equal(flat(trainer.model), expected),
        "bytes": nbytes == expected_nbytes > 0,
        "equal": ours.attachment.replicas_are_equal(),
        "steps": ours.attachment.steps,
        "logged": [entry["commopt_payload_mb"] for entry in logs],
        "total": nbytes / 1e6,
        "has_norm": "grad_norm" in logs[0],
        "kind": type(ours.attachment.optimizer).__name__,
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
    two: HuggingFaceRanks,  # noqa: F811
    method: Any,
    every: int,
    options: Any,
    tmp_path: Path,
) -> None:
    is_update = method["name"] == "onebit_adam"
    for answer in two.call(in_folder, str(tmp_path), against_ddp, method, every, options):
        assert answer["same"]
        assert answer["equal"]
        assert answer["bytes"]
        assert answer["steps"] == STEPS
        assert len(answer["logged"]) == 3
        assert answer["logged"] == sorted(set(answer["logged"]))
        assert answer["logged"][-1] < answer["total"]
        assert answer["has_norm"] is not is_update
        assert answer["kind"] == ("OnebitAdam" if is_update else "SGD")


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
    """Whether the method's name, the built method as the Trainer's optimizer, and as the callback's, train alike."""
    results = []
    for door in ("name", "optimizers", "callback", "attach"):
        model = Net()
        built = build(ONEBIT, model.named_parameters(), lr=RATE, max_norm=1.0)
        if door == "name":
            trainer = trainer_of(folder, callback(ONEBIT), model=model)
        elif door == "optimizers":
            trainer = trainer_of(folder, callback(built), model=model, optimizers=(built, None))
        elif door == "callback":
            trainer = trainer_of(folder, callback(built), model=model)
        else:
            trainer = trainer_of(folder, model=model)
            open_door(trainer, built)
        trainer.train()
        results.append(flat(model))
    return [torch.equal(results[0], other) for other in results[1:]]


def test_every_door_leads_to_the_same_training(two: HuggingFaceRanks, tmp_path: Path) -> None:  # noqa: F811
    assert two.call(by_each_door, str(tmp_path)) == [[True, True, True]] * 2


def resumed(folder: str, method: dict[str, Any], optim: str) -> tuple[bool, bool, int]:
    """Whether training goes on bit for bit from a checkpoint, parameters and what is still to be sent."""
    options = {"save_strategy": "steps", "save_steps": 4, "optim": optim}
    first = callback(method)
    trainer = trainer_of(folder, first, **options)
    trainer.train()
    after, state = flat(trainer.model), state_of(first)
    dist.barrier()
    second = callback(method)
    trainer = trainer_of(folder, second, **options)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-4")
    return torch.equal(after, flat(trainer.model)), torch.equal(state, state_of(second)), second.attachment.steps


def state_of(ours: Any) -> Tensor:
    state = ours.attachment.method.comm_state()
    tensors = [x.reshape(-1).double() for part in ("shared", "local") for _, x in sorted(state[part].items())]
    return torch.cat(tensors)


@pytest.mark.parametrize(
    ("method", "optim"),
    [(ONEBIT, "adamw_torch"), (EF, "sgd"), ({"name": "noloco", "every": 2, "delay": 1}, "sgd")],
    ids=["onebit_adam", "ef_sign", "noloco"],
)
def test_training_goes_on_bit_for_bit_from_a_checkpoint(
    two: HuggingFaceRanks,  # noqa: F811
    method: Any,
    optim: str,
    tmp_path: Path,
) -> None:
    assert two.call(resumed, str(tmp_path), method, optim) == [(True, True, STEPS)] * 2
    assert (tmp_path / "checkpoint-4" / "commopt_rank1.pt").exists()


def by_an_outer_method(folder: str) -> dict[str, Any]:
    ours = callback(DILOCO)
    trainer = trainer_of(folder, ours, max_steps=6, average_tokens_across_devices=False)
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
        "rounds": ours.attachment.steps // 3,
        "mb": trainer.state.log_history[-1]["commopt_payload_mb"],
        "again": again,
    }


def test_an_outer_method_does_without_ddp(two: HuggingFaceRanks, tmp_path: Path) -> None:  # noqa: F811
    for answer in two.call(by_an_outer_method, str(tmp_path)):
        assert answer["wrapped"] == "Net"
        assert answer["equal"]  # after the round of the last step
        assert answer["rounds"] == 2
        assert answer["mb"] > 0
        assert "diloco has left this Trainer's job: make another Trainer" in answer["again"]


def again(folder: str) -> tuple[bool, int]:
    ours = callback(EF)
    trainer = trainer_of(folder, ours, optim="sgd")
    trainer.train()
    first = ours.attachment
    trainer.train()
    return ours.attachment is first, first.steps


def test_a_trainer_can_train_again(two: HuggingFaceRanks, tmp_path: Path) -> None:  # noqa: F811
    assert two.call(again, str(tmp_path)) == [(True, 2 * STEPS)] * 2


def with_a_model_of_transformers(folder: str) -> tuple[bool, bool, float]:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

    new_accelerator()
    set_seed(1)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": 64}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM"))
    before = flat(model)
    tokens = torch.randint(64, (64, 16), generator=torch.Generator().manual_seed(1))
    ours = callback("onebit_adam")
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
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:8], callbacks=[ours])
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    return ours.attachment.replicas_are_equal(), torch.equal(before, flat(model)), loss


def test_a_model_of_transformers_trains_with_default_arguments(two: HuggingFaceRanks, tmp_path: Path) -> None:  # noqa: F811
    for equal, unchanged, loss in two.call(with_a_model_of_transformers, str(tmp_path)):
        assert equal
        assert not unchanged
        assert 0 < loss < 10


def schedule_of_the_users(folder: str) -> tuple[float, str]:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _half)
    trainer = trainer_of(folder, callback(ONEBIT), model=model, optimizers=(optimizer, schedule))
    trainer.train()
    return trainer.optimizer.param_groups[0]["lr"], type(schedule.optimizer).__name__


def _half(step: int) -> float:
    return float(0.5**step)


def test_a_schedule_of_the_users_goes_on_with_the_method(two: HuggingFaceRanks, tmp_path: Path) -> None:  # noqa: F811
    assert two.call(schedule_of_the_users, str(tmp_path)) == [(RATE * 0.5**STEPS, "OnebitAdam")] * 2


def in_one_process(folder: str, method: dict[str, Any], optim: str) -> tuple[int, bool, str]:
    ours = callback(method)
    trainer = trainer_of(folder, ours, optim=optim, save_strategy="steps", save_steps=4)
    before = flat(trainer.model)
    trainer.train()
    return ours.attachment.steps, torch.equal(before, flat(trainer.model)), type(ours.attachment).__name__


@pytest.mark.parametrize(
    ("method", "optim", "kind"),
    [
        (ONEBIT, "adamw_torch", "PlainAttachment"),
        (EF, "sgd", "PlainAttachment"),
        (DILOCO, "sgd", "OuterAttachment"),
    ],
    ids=["onebit_adam", "ef_sign", "diloco"],
)
def test_one_process_trains_too(alone: HuggingFaceRanks, method: Any, optim: str, kind: str, tmp_path: Path) -> None:  # noqa: F811
    assert alone.call(in_one_process, str(tmp_path), method, optim) == [(STEPS, False, kind)]


# -- what does not fit


def refused(folder: str, case: str) -> str:
    try:
        CASES[case][0](folder)
    except CommoptError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def two_callbacks(folder: str) -> None:
    trainer_of(folder, callback(EF), callback("dense"))


def added_late(folder: str) -> None:
    trainer = trainer_of(folder)
    trainer.add_callback(callback(EF))
    trainer.train()


def batch_size_searched(folder: str) -> None:
    trainer_of(folder, callback(EF), auto_find_batch_size=True)


def sharded(folder: str) -> None:
    trainer_of(folder, callback(EF), fsdp="full_shard")


def unknown(folder: str) -> None:
    callback({"name": "ef_sign", "block_sise": 64})


def another_optimizer(folder: str) -> None:
    model = Net()
    adam = torch.optim.AdamW(model.parameters())
    trainer_of(folder, callback(build(ONEBIT, model.named_parameters())), model=model, optimizers=(adam, None))


def no_stand_in(folder: str) -> None:
    trainer_of(folder, callback(ONEBIT), optim="sgd").train()


def a_trial(folder: str) -> None:
    trainer_of(folder, callback(EF)).train(trial={"learning_rate": 1.0})


def without_the_state(folder: str) -> None:
    trainer_of(folder, optim="sgd", save_strategy="steps", save_steps=4).train()
    dist.barrier()
    trainer_of(folder, callback(EF), optim="sgd").train(resume_from_checkpoint=f"{folder}/checkpoint-4")


def with_anothers_state(folder: str) -> None:
    trainer_of(folder, save_strategy="steps", save_steps=4).train()  # AdamW's
    dist.barrier()
    trainer_of(folder, callback(ONEBIT)).train(resume_from_checkpoint=f"{folder}/checkpoint-4")


def with_another_methods_state(folder: str) -> None:
    trainer_of(folder, callback(EF), optim="sgd", save_strategy="steps", save_steps=4).train()
    dist.barrier()
    trainer_of(folder, callback(ONEBIT)).train(resume_from_checkpoint=f"{folder}/checkpoint-4")


def evaluated_before(folder: str) -> None:
    trainer = trainer_of(folder, callback(EF), optim="sgd")
    trainer.evaluate(data(8))
    trainer.train()


def trained_before(folder: str) -> None:
    trainer = trainer_of(folder)
    trainer.train()
    open_door(trainer, EF)


def on_rank_1_only(folder: str) -> None:
    trainer_of(folder, callback(EF), auto_find_batch_size=dist.get_rank() == 1)


CASES: dict[str, tuple[Callable[[str], None], str]] = {
    "two": (two_callbacks, "AttachError: this Trainer has a CommoptCallback already"),
    "late": (added_late, r"AttachError: CommoptCallback was added .* callbacks=\[CommoptCallback"),
    "batch size": (batch_size_searched, "AttachError: auto_find_batch_size"),
    "fsdp": (sharded, "AttachError: fsdp: a sharded model is not supported here"),
    "option": (unknown, "ConfigError: method ef_sign: unknown option 'block_sise'; did you mean 'block_size'"),
    "optimizer": (another_optimizer, "AttachError: the Trainer was given another optimizer, AdamW: leave `optimizers`"),
    "stand-in": (no_stand_in, "ConfigError: method onebit_adam is .* can stand in for Adam or AdamW, not for SGD"),
    "trial": (a_trial, "AttachError: hyperparameter_search"),
    "state": (without_the_state, "CheckpointError: .*commopt_rank[01].pt is missing: .* saved without the method"),
    "AdamW's state": (with_anothers_state, "CheckpointError: .*is missing: .* saved without the method; .* its model"),
    "another's state": (with_another_methods_state, "CheckpointError: .* saved under ef_sign, not onebit_adam; take"),
    "evaluated": (evaluated_before, r"AttachError: .* DDP: .* evaluate\(\) or predict\(\) came before .*eval_on_start"),
    "trained": (trained_before, "AttachError: this Trainer has trained already: attach before"),
    "one rank": (on_rank_1_only, "AttachError: (rank 1 could not attach: .*)?auto_find_batch_size"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_refused_on_every_rank(two: HuggingFaceRanks, case: str, tmp_path: Path) -> None:  # noqa: F811
    for answer in two.call(refused, str(tmp_path), case):
        assert re.match(CASES[case][1], answer), answer


def test_without_the_package_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "commopt.frameworks.transformers", raising=False)
    with pytest.raises(
        MissingExtra, match=r"transformers, which is not installed: pip install 'commopt\[transformers\]'"
    ):
        import commopt.frameworks.transformers  # noqa: F401
