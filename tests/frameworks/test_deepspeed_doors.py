"""How a method comes into an engine beside `initialize`: by attach, by Accelerate, or after a block that nobody read."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from deepspeed_rig import make_engine, train
from pool import Pool
from rig import loss_of, make_batch, make_model

import commopt
from commopt.errors import CommoptError

STEPS = 3
ADAM = {"optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}}}
SGD = {"optimizer": {"type": "SGD", "params": {"lr": 0.05}}}


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


def clipping() -> list[tuple[float | None, str]]:
    """By gradient_clipping: the run's max_norm, and what rank 0 logs of it."""
    from commopt.deepspeed import initialize

    found = []
    for own in ({}, {"gradient_clipping": 0.5}, {"gradient_clipping": 0.0}):
        model = make_model()
        config = {"train_micro_batch_size_per_gpu": 8, **ADAM, "commopt": "onebit_adam", **own}
        with log() as told:
            engine = initialize(model=model, model_parameters=model.parameters(), config=config)[0]
        found.append((engine.commopt.max_norm, "; ".join(line for line in told if "gradient_clipping" in line)))
    return found


def test_gradient_clipping_is_the_max_norm_of_an_update_method(deepspeed_ranks: Pool) -> None:
    found = deepspeed_ranks.run(2, clipping)[0]
    assert [norm for norm, _ in found] == [1.0, 0.5, None]
    assert "DeepSpeed then clips to a norm of 1.0" in found[0][1]
    assert found[1][1] == found[2][1] == ""


# -- half precision


def after_dry_step(half: str) -> tuple[bool, int, str]:
    """What an engine's dry step on zeros has left: (masters are the model's, states, the optimizer) after attach."""
    adam = {"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.5, "torch_adam": True}}
    engine = make_engine({"optimizer": adam, half: {"enabled": True}}, ours=False)
    run = commopt.attach(engine, "onebit_adam")
    lows, masters = engine.optimizer.fp16_groups[0], engine.optimizer.fp32_groups[0]
    same = all(torch.equal(low.float(), master) for low, master in zip(lows, masters, strict=True))
    train(engine, 1)
    return same, int(run.method.state["steps"]), type(engine.optimizer.optimizer).__name__


@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_deepspeeds_dry_step_leaves_nothing_behind(half: str, deepspeed_ranks: Pool) -> None:
    assert deepspeed_ranks.run(2, after_dry_step, half) == [(True, 1, "StandIn")] * 2


# -- a block that nobody read


def unread_blocks() -> tuple[list[str], list[str], list[str]]:
    """Engines made by deepspeed.initialize where nobody has called install()."""
    own = {**SGD, "commopt": {"method": "dgc", "density": 0.1}}
    told = [
        refusal(lambda: commopt.attach(make_engine(own, ours=False), "ef_sign")),
        refusal(lambda: commopt.attach(make_engine(own, ours=False), "dgc")),
    ]
    with log() as late:
        engine = make_engine(own, ours=False)
        commopt.attach(engine, {"dgc": {"density": 0.1}})
    train(engine, 1)
    engine.commopt.close()
    with log() as again:
        commopt.attach(engine, "ef_sign")
    return told, late, again


def test_a_block_that_was_read_too_late_is_not_passed_over(deepspeed_ranks: Pool) -> None:
    for rank, (told, late, again) in enumerate(deepspeed_ranks.run(2, unread_blocks)):
        for text in told:
            assert "'dgc', 'density': 0.1} in the configuration has had no effect" in text
            assert "commopt.deepspeed.install() was not called" in text
        assert len([line for line in late if "had no effect until now" in line]) == (rank == 0)
        assert again == []  # the block has been answered


# -- Accelerate


def accelerator_of(model: Any, *others: Any, **more: Any) -> tuple[Any, ...]:
    """(accelerator, and what it has prepared)"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what Accelerate imports
        from accelerate import Accelerator, DeepSpeedPlugin
        from accelerate.state import AcceleratorState, GradientState

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # or Accelerate would change the threads of these ranks
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    # on CPUs Accelerate counts one process under DeepSpeed, which trains with two
    config = {"train_micro_batch_size_per_gpu": 8, "gradient_clipping": 0.0, "zero_optimization": {"stage": 0}, **more}
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    return accelerator, *accelerator.prepare(model, *others)


def prepared(with_schedule: bool) -> tuple[Any, ...]:
    model = make_model()
    adam = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: float(0.5**step))
    return *accelerator_of(model, adam, *([schedule] if with_schedule else [])), adam


def by_accelerate() -> tuple[list[float], bool, str, list[str]]:
    accelerator, engine, optimizer, schedule, adam = prepared(True)
    before = [p.clone() for p in engine.module.parameters()]
    run = commopt.attach(engine, {"onebit_adam": {"freeze_step": 2}}, optimizer)
    rates = []
    for step in range(STEPS):
        x, y = make_batch(engine.global_rank, step)
        accelerator.backward(loss_of(engine(x), y))
        optimizer.step()
        schedule.step()
        rates.append(float(run.optimizer.param_groups[0]["lr"]))
        assert optimizer.param_groups[0]["lr"] == rates[-1]
    moved = all(not torch.equal(p, q) for p, q in zip(before, engine.module.parameters(), strict=True))
    kind = type(optimizer.optimizer).__name__
    equal = run.replicas_are_equal() and moved and run.steps == STEPS
    told = [refusal(adam.step)]
    accelerator, engine, optimizer, adam = prepared(False)
    other = torch.optim.AdamW(make_model().parameters())
    told += [
        refusal(lambda: commopt.attach(engine, "ef_sign", other)),
        refusal(lambda: commopt.attach(engine, "ef_sign", optimizer, overlap=True)),
    ]
    return rates, equal, kind, told


def test_accelerates_schedule_goes_on_in_an_engine_and_nothing_is_passed_over(deepspeed_ranks: Pool) -> None:
    words = (
        "has taken the place of this AdamW",
        "this optimizer is not the engine's",
        "overlap=True with a DeepSpeed engine",
    )
    for rates, equal, kind, told in deepspeed_ranks.run(2, by_accelerate):
        assert rates == [0.01 * 0.5**step for step in range(1, STEPS + 1)]
        assert equal
        assert kind == "StandIn"
        assert [word for word, text in zip(words, told, strict=True) if word not in text] == []


def installed_under_accelerate() -> tuple[str, str, str]:
    """Accelerate with the method in the engine's configuration alone."""
    import deepspeed

    from commopt.deepspeed import install

    original: Any = deepspeed.DeepSpeedEngine.__init__
    install()
    try:
        model = make_model()
        adam = torch.optim.AdamW(model.parameters(), lr=0.01)
        accelerator, engine, optimizer = accelerator_of(model, adam, commopt="onebit_adam")
    finally:
        deepspeed.DeepSpeedEngine.__init__ = original
    x, y = make_batch(engine.global_rank, 0)
    accelerator.backward(loss_of(engine(x), y))
    optimizer.step()
    return engine.commopt.method.name, type(engine.optimizer).__name__, type(optimizer.optimizer).__name__


def test_after_install_accelerates_own_engine_reads_the_block(deepspeed_ranks: Pool) -> None:
    assert deepspeed_ranks.run(2, installed_under_accelerate) == [("onebit_adam", "StandIn", "StandIn")] * 2
