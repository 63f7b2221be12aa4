"""One `Run` for gradient, update and outer methods: the same training function, whatever the method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from presets import ADAM, Preset, sgd
from rig import flat, make_model, train_step
from rig import train as train_steps
from torch import Tensor, nn

from commopt import Run
from commopt.groups import SimGroup, SimWorld

STEPS = 8
# the method's block, and the optimizer's: all that a user changes
FAMILIES = [
    Preset("ef_sign"),
    Preset("onebit_adam", {"freeze_step": 4}, ADAM),
    Preset("powersgd", {"rank": 2}),
    Preset("dgc", {"density": 0.1}, sgd(0.05)),
    Preset("diloco", {"every": 3, "final_average": True}),
    Preset("noloco", {"every": 3}),
]
every_family = pytest.mark.parametrize("preset", FAMILIES, ids=str)


def train(run: Run, model: nn.Module, stop: int = STEPS) -> list[float]:
    """What a user writes once."""
    return [train_step(model, run.optimizer, run.rank, step) for step in run.range(stop)]


@every_family
def test_a_run_says_what_happened_and_finishes_and_closes_at_the_end_of_its_block(preset: Preset) -> None:
    def work(group: SimGroup) -> Tensor:
        model = make_model()
        with preset.attach(model, group) as run:
            assert (run.join(), run.rank, run.ranks) == (0, group.rank, 2)
            assert run.method.name == preset.name
            assert run.model is model
            assert list(run.parameters) == [key for key, _ in model.named_parameters()]
            losses = train(run, model)
            assert run.steps == len(losses) == STEPS
            assert losses[-1] < losses[0]
            assert run.traffic.payload_bytes > 0
            assert run.waited_s >= 0
            assert run.voided == []
            assert [report.step for report in run.reports] == ([3, 6] if run.method.kind == "outer" else [])
            assert run.replicas_are_equal()
        assert run.is_finished
        assert run.is_closed
        with FAMILIES[0].attach(model):  # nothing is left on the model
            pass
        return flat(model)

    first, second = SimWorld[Tensor](2).run(work)
    assert torch.equal(first, second) is (preset.name != "noloco")  # diloco's final average


@every_family
def test_an_exception_closes_a_run_and_does_not_finish_it(preset: Preset) -> None:
    model = make_model()
    run = preset.attach(model)

    def fail() -> None:
        with run:
            train(run, model, 2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert run.is_closed
    assert not run.is_finished
    preset.attach(model).close()


@every_family
def test_nothing_is_sent_with_communication_off(preset: Preset) -> None:
    def work(group: SimGroup) -> tuple[float, bool]:
        model = make_model()
        run = preset.attach(model, group)
        run.join()
        off = run.communication_off()  # nothing is off before its block
        train(run, model, 2)
        assert (run.steps, run.traffic.payload_bytes > 0) == (2, True)
        before, values = run.traffic.payload_bytes, flat(model)
        with off:
            train_steps(model, run.optimizer, group.rank, 4)
        assert run.steps == (2 if run.method.kind == "outer" else 6)
        return run.traffic.payload_bytes - before, torch.equal(values, flat(model))

    assert SimWorld[Any](2).run(work) == [(0.0, False)] * 2


@every_family
def test_a_run_records_itself(preset: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMOPT_RECORD", str(tmp_path))
    model = make_model()
    with preset.attach(model) as run:
        for step in run.range(STEPS):
            run.log(loss=train_step(model, run.optimizer, 0, step), tokens=8)
        run.log(validation_loss=0.5, tokens=64)
        with pytest.raises(TypeError, match="give loss= or validation_loss="):
            run.log(accuracy=0.9)
    lines = [json.loads(line) for line in (tmp_path / "rank0.jsonl").read_text().splitlines()]
    assert lines[0]["kind"] == "start"
    assert (lines[0]["method"], lines[0]["steps"], lines[0]["parameters"]) == (preset.name, STEPS, flat(model).numel())
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(STEPS))
    assert [line["loss"] for line in lines if line["kind"] == "validation"] == [0.5]
    assert lines[-1]["kind"] == "end"
