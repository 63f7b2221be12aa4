"""How a method comes into an engine beside `initialize`: built, by Accelerate, or after a block that nobody read."""

from __future__ import annotations

import logging
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from deepspeed_rig import Ranks, make_engine, train, two_ranks
from rig import loss_of, make_batch, make_model

import commopt
from commopt.errors import CommoptError

STEPS = 3
ADAM = {"optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}}}
SGD = {"optimizer": {"type": "SGD", "params": {"lr": 0.05}}}


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    ranks = two_ranks()  # the same ones in all files
    yield ranks
    ranks.close()


@contextmanager
def log() -> Iterator[list[str]]:
    told: list[str] = []
    ours, handler = logging.getLogger("commopt"), logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    ours.addHandler(handler)
    try:
        yield told
    finally:
        ours.removeHandler(handler)


def refusal(act: Callable[[], Any]) -> str:
    try:
        act()
    except CommoptError as error:
        return f"{type(error).__name__}: {error}"
    return ""


# -- clipping


def without_gradient_clipping() -> dict[str, tuple[Any, str]]:
    """By door: the norm to which the method clips, and what rank 0 logs of it."""
    from commopt.frameworks.deepspeed import initialize

    found = {}
    for door in ("built", "built with a norm", "block", "block with a norm"):
        model = make_model()
        block = {"method": "onebit_adam", **({"max_norm": 0.5} if "norm" in door else {})}
        method = commopt.build(block, model.named_parameters()) if "built" in door else None
        config: Any = {
            "train_micro_batch_size_per_gpu": 8,
            **({} if method is not None else {**ADAM, "commopt": block}),
        }
        with log() as told:
            engine: Any = initialize(model=model, optimizer=method, model_parameters=model.parameters(), config=config)[
                0
            ]
        found[door] = engine.commopt.method.max_norm, "; ".join(line for line in told if "gradient_clipping" in line)
    return found


def test_the_log_says_by_what_an_update_method_clips(two: Ranks) -> None:
    found = two.run(without_gradient_clipping)[0]
    assert {door: norm for door, (norm, _) in found.items()} == {
        "built": None,
        "built with a norm": 0.5,
        "block": 1.0,
        "block with a norm": 0.5,
    }
    assert "onebit_adam clips nothing, for it has no max_norm" in found["built"][1]
    assert "onebit_adam clips to its own max_norm=0.5" in found["built with a norm"][1]
    assert "DeepSpeed then clips to a norm of 1.0" in found["block"][1]
    assert "onebit_adam clips to its own max_norm=0.5" in found["block with a norm"][1]


# -- a block that nobody read


def unread(own: dict[str, Any]) -> Any:
    """An engine as it is made where commopt.frameworks.deepspeed has not been imported."""
    from deepspeed import DeepSpeedEngine

    patched: Any = DeepSpeedEngine.__init__
    DeepSpeedEngine.__init__ = patched.__wrapped__
    try:
        return make_engine(own, ours=False)
    finally:
        DeepSpeedEngine.__init__ = patched


def unread_blocks() -> tuple[list[str], list[str], list[str]]:
    own = {**SGD, "commopt": {"method": "dgc", "density": 0.1}}
    told = [
        refusal(lambda: commopt.attach(unread(own), "ef_sign")),
        refusal(lambda: commopt.attach(unread(own), "dgc")),
    ]
    with log() as late:
        engine = unread(own)
        commopt.attach(engine, {"dgc": {"density": 0.1}})
    train(engine, 1)
    engine.commopt.detach()
    with log() as again:
        commopt.attach(engine, "ef_sign")
    return told, late, again


def test_a_block_that_was_read_too_late_is_not_passed_over(two: Ranks) -> None:
    for rank, (told, late, again) in enumerate(two.run(unread_blocks)):
        for text in told:
            assert "'dgc', 'density': 0.1} in the configuration has had no effect" in text
            assert "was imported after the engine was made" in text
        assert len([line for line in late if "had no effect until now" in line]) == (rank == 0)
        assert again == []  # the block has been answered


# -- Accelerate


def accelerator_of(model: Any, *others: Any) -> tuple[Any, ...]:
    """(accelerator, and what it has prepared)"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what Accelerate imports
        from accelerate import Accelerator, DeepSpeedPlugin
        from accelerate.state import AcceleratorState, GradientState

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # or Accelerate would change the threads of these ranks
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    # on CPUs Accelerate counts one process under DeepSpeed, which trains with two
    config = {"train_micro_batch_size_per_gpu": 8, "gradient_clipping": 0.0, "zero_optimization": {"stage": 0}}
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    return accelerator, *accelerator.prepare(model, *others)


def prepared(with_schedule: bool) -> tuple[Any, ...]:
    model = make_model()
    adam = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: float(0.5**step))
    return *accelerator_of(model, adam, *([schedule] if with_schedule else [])), adam


def by_accelerate() -> tuple[list[float], bool, str, list[str]]:
    from commopt.frameworks import accelerate

    accelerator, engine, optimizer, schedule, adam = prepared(True)
    before = [p.clone() for p in engine.module.parameters()]
    attachment = accelerate.attach(accelerator, engine, {"onebit_adam": {"freeze_step": 2}}, optimizer)
    rates = []
    for step in range(STEPS):
        x, y = make_batch(engine.global_rank, step)
        accelerator.backward(loss_of(engine(x), y))
        optimizer.step()
        schedule.step()
        rates.append(float(attachment.method.param_groups[0]["lr"]))
        assert optimizer.param_groups[0]["lr"] == rates[-1]
    moved = all(not torch.equal(p, q) for p, q in zip(before, engine.module.parameters(), strict=True))
    kind = type(optimizer.optimizer).__name__
    equal = attachment.replicas_are_equal() and moved and attachment.steps == STEPS
    told = [refusal(adam.step)]
    accelerator, engine, optimizer, adam = prepared(False)
    other = torch.optim.AdamW(make_model().parameters())
    told += [
        refusal(lambda: accelerate.attach(accelerator, engine, "onebit_adam")),
        refusal(lambda: accelerate.attach(accelerator, engine, "ef_sign", other)),
        refusal(lambda: accelerate.attach(accelerator, engine, "ef_sign", overlap=False)),
        refusal(lambda: accelerate.attach(accelerator, engine, "ef_sign", overlap=True)),
    ]
    return rates, equal, kind, told


def test_accelerates_schedule_goes_on_in_an_engine_and_nothing_is_passed_over(two: Ranks) -> None:
    words = (
        "has taken the place of this AdamW: engine.step() steps the method",
        "give it to prepare() too",
        "optimizer: is not this engine's",
        "AttachError: overlap: has no effect under DeepSpeed",
        "AttachError: overlap: has no effect under DeepSpeed",
    )
    for rates, equal, kind, told in two.run(by_accelerate):
        assert rates == [0.01 * 0.5**step for step in range(1, STEPS + 1)]
        assert equal
        assert kind == "OnebitAdam"
        assert [word for word, text in zip(words, told, strict=True) if word not in text] == []


# -- the Trainer


def made_by_a_trainer(method: str) -> str:
    class Trainer:
        """As that of transformers, whose import takes seconds: what makes an engine."""

        def train(self) -> Any:
            return make_engine({**SGD, "commopt": method}, ours=False)

    had = sys.modules.get("transformers.trainer")
    fake = types.ModuleType("transformers.trainer")
    fake.Trainer = Trainer  # type: ignore[attr-defined]
    sys.modules["transformers.trainer"] = fake
    try:
        return refusal(Trainer().train)
    finally:
        del sys.modules["transformers.trainer"]
        if had is not None:
            sys.modules["transformers.trainer"] = had


def trainers_engines() -> tuple[str, str]:
    return made_by_a_trainer("noloco"), made_by_a_trainer("ef_sign")


def test_an_outer_method_in_a_trainers_configuration_is_refused_at_the_start(two: Ranks) -> None:
    for outer, gradient in two.run(trainers_engines):
        assert "noloco in the DeepSpeed configuration of a Trainer" in outer
        assert "CommoptCallback('noloco')" in outer
        assert gradient == ""
