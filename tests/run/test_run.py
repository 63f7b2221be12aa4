"""One `Run` for gradient, update and outer methods: the same training function, whatever the method."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool, twin_of
from presets import SGD, sgd
from rig import flat, loss_of, make_batch, make_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from commopt import Run, attach
from commopt.groups import LocalGroup, SimGroup, SimWorld, TorchGroup
from commopt.optim import make_optimizer

STEPS = 8
Choice = tuple[dict[str, Any], dict[str, Any]]
# the method's block, and the optimizer's: all that a user changes
CHOICES: dict[str, Choice] = {
    "ef_sign": ({"name": "ef_sign"}, SGD),
    "onebit_adam": ({"name": "onebit_adam", "freeze_step": 4}, {"name": "adam", "lr": 0.01}),
    "powersgd": ({"name": "powersgd", "rank": 2}, SGD),
    "dgc": ({"name": "dgc", "density": 0.1}, sgd(0.05)),
    "diloco": ({"name": "diloco", "every": 3, "final_average": True}, SGD),
    "noloco": ({"name": "noloco", "every": 3}, SGD),
}
EVERY_STEP = [name for name in CHOICES if name not in ("diloco", "noloco")]
every_family = pytest.mark.parametrize("name", CHOICES)


def start(name: str, group: Any, model: nn.Module | None = None) -> Run:
    method, optimizer = CHOICES[name]
    model = make_model() if model is None else model
    return attach(model, method, make_optimizer(optimizer, model.parameters()), group=group)


def train(run: Run, model: nn.Module, stop: int = STEPS) -> list[float]:
    """What a user writes once."""
    losses = []
    for step in run.range(stop):
        x, y = make_batch(run.rank, step)
        loss = loss_of(model(x), y)
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        losses.append(loss.item())
    return losses


def trained(name: str, group: Any, model: nn.Module | None = None) -> Tensor:
    model = make_model() if model is None else model
    with start(name, group, model) as run:
        run.join()
        train(run, model)
        if isinstance(group, TorchGroup):
            dist.barrier(group.process_group)  # nobody leaves before the last round of the others
    return flat(model)


@every_family
def test_a_run_says_what_happened(name: str) -> None:
    def work(group: SimGroup) -> tuple[list[float], bool]:
        model = make_model()
        run = start(name, group, model)
        assert (run.join(), run.rank, run.ranks) == (0, group.rank, 2)
        assert run.method.name == name
        assert run.model is model
        assert list(run.parameters) == [key for key, _ in model.named_parameters()]
        losses = train(run, model)
        assert run.steps == len(losses) == STEPS
        assert run.traffic.payload_bytes > 0
        assert run.waited_s >= 0
        assert run.voided == []
        assert [report.step for report in run.reports] == ([] if name in EVERY_STEP else [3, 6])
        equal = run.replicas_are_equal()
        run.finish()
        run.close()
        return losses, equal

    for losses, equal in SimWorld[Any](2).run(work):
        assert equal
        assert losses[-1] < losses[0]


@every_family
def test_the_same_training_runs_on_simulated_ranks_and_on_those_of_a_job(pool: Pool, name: str) -> None:
    simulated = SimWorld[Tensor](2).run(lambda group: trained(name, group))
    gloo = pool.run(2, trained_on_gloo, name)
    for one, other in zip(simulated, gloo, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    if name in EVERY_STEP:
        assert all(torch.equal(simulated[0], one) for one in (*simulated, *gloo, *pool.run(2, trained_in_ddp, name)))


def trained_on_gloo(process_group: dist.ProcessGroup, name: str) -> Tensor:
    return trained(name, TorchGroup(process_group))


def trained_in_ddp(process_group: dist.ProcessGroup, name: str) -> Tensor:
    model = DistributedDataParallel(make_model(), process_group=process_group)
    return trained(name, TorchGroup(twin_of(process_group)), model)


@every_family
def test_a_run_finishes_and_closes_at_the_end_of_its_block(name: str) -> None:
    def work(group: SimGroup) -> Tensor:
        model = make_model()
        with start(name, group, model) as run:
            train(run, model)
        assert run.is_finished
        assert run.is_closed
        with start("ef_sign", LocalGroup(), model):  # nothing is left on the model
            pass
        return flat(model)

    first, second = SimWorld[Tensor](2).run(work)
    assert torch.equal(first, second) is (name != "noloco")  # diloco's final average


@every_family
def test_an_exception_closes_a_run_and_does_not_finish_it(name: str) -> None:
    model = make_model()
    run = start(name, LocalGroup(), model)

    def fail() -> None:
        with run:
            train(run, model, 2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert run.is_closed
    assert not run.is_finished
    start(name, LocalGroup(), model).close()


@every_family
def test_nothing_is_sent_with_communication_off(name: str) -> None:
    def work(group: SimGroup) -> tuple[float, bool]:
        model = make_model()
        run = start(name, group, model)
        run.join()
        train(run, model, 2)
        before, values = run.traffic.payload_bytes, flat(model)
        with run.communication_off():
            for step in range(4):
                x, y = make_batch(group.rank, step)
                run.optimizer.zero_grad()
                loss_of(model(x), y).backward()
                run.optimizer.step()
        return run.traffic.payload_bytes - before, torch.equal(values, flat(model))

    assert SimWorld[Any](2).run(work) == [(0.0, False)] * 2


@every_family
def test_a_loaded_run_goes_on_from_the_step_that_was_saved(name: str, tmp_path: Path) -> None:
    def work(group: SimGroup) -> bool:
        model, other = make_model(), make_model()
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        run = start(name, group, model)
        run.join()
        train(run, model, 4)
        run.save(tmp_path / "saved", extra={"seen": 32})
        train(run, model)
        run.close()
        resumed = start(name, group, other)
        assert resumed.load(tmp_path / "saved") == {"seen": 32}
        assert resumed.steps == 4
        assert resumed.join() == 4
        assert len(train(resumed, other)) == STEPS - 4
        return torch.equal(flat(model), flat(other))

    assert SimWorld[bool](1).run(work) == [True]
    if name in EVERY_STEP:
        assert SimWorld[bool](2).run(work) == [True, True]


@every_family
def test_a_run_records_itself(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMOPT_RECORD", str(tmp_path))
    model = make_model()
    with start(name, LocalGroup(), model) as run:
        for step in run.range(STEPS):
            x, y = make_batch(0, step)
            loss = loss_of(model(x), y)
            run.optimizer.zero_grad()
            loss.backward()
            run.optimizer.step()
            run.log(loss=loss.item(), tokens=8)
        run.log(validation_loss=0.5, tokens=64)
        with pytest.raises(TypeError, match="give loss= or validation_loss="):
            run.log(accuracy=0.9)
    lines = [json.loads(line) for line in (tmp_path / "rank0.jsonl").read_text().splitlines()]
    assert lines[0]["kind"] == "start"
    assert (lines[0]["method"], lines[0]["steps"], lines[0]["parameters"]) == (name, STEPS, flat(model).numel())
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(STEPS))
    assert [line["loss"] for line in lines if line["kind"] == "validation"] == [0.5]
    assert lines[-1]["kind"] == "end"


@pytest.mark.parametrize("name", EVERY_STEP)
def test_a_void_bucket_is_on_every_ranks_list(name: str) -> None:
    def work(group: SimGroup) -> list[tuple[int, str]]:
        model = make_model()
        run = start(name, group, model)
        train(run, model, 3)
        x, y = make_batch(group.rank, 3)
        run.optimizer.zero_grad()
        loss_of(model(x * (math.nan if group.rank == 1 else 1.0)), y).backward()
        run.optimizer.step()
        return run.voided

    first, second = SimWorld[Any](2).run(work)
    assert first == second
    assert [step for step, _ in first] == [3]
