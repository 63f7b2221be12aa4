"""A run records itself, wherever and however seldom a script logs, and ends the script after the steps that a launcher wants."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from presets import ADAM, Preset, sgd
from rig import loss_of, make_batch, make_model, sgd_of
from torch import nn

from commopt import Run, attach
from commopt.errors import ConfigError
from commopt.groups import Group, SimWorld
from commopt.record.lines import RankRecord
from commopt.report.results import collect

PRESETS = (Preset("ef_sign"), Preset("onebit_adam", {"freeze_step": 2}, ADAM), Preset("noloco", {"every": 3}))
every_family = pytest.mark.parametrize("preset", PRESETS, ids=str)


@pytest.fixture(autouse=True)
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMMOPT_RECORD", str(tmp_path))
    return tmp_path


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    every = [json.loads(line) for line in (folder / "rank0.jsonl").read_text().splitlines()]
    return [line for line in every if line["kind"] == kind]


def train(run: Run, model: nn.Module, stop: int, *, first: bool = False, every: int = 1) -> None:
    """A loop of one's own, which logs before its steps or after them, and in some of them."""
    run.join()
    for step in range(stop):
        loss = loss_of(model(make_batch(0, step)[0]), make_batch(0, step)[1])
        run.optimizer.zero_grad()
        loss.backward()
        if first and step % every == 0:
            run.log(loss=100.0 + step)
        run.optimizer.step()
        if not first and step % every == 0:
            run.log(loss=loss * 0 + 100 + step, tokens=4)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_a_loss_belongs_to_its_step_before_it_and_after_it(first: bool, every: int, record: Path) -> None:
    model = make_model()
    with PRESETS[0].attach(model) as run:
        train(run, model, 7, first=first, every=every)
    logged = {line["step"]: line["loss"] for line in lines(record, "step") if "loss" in line}
    assert logged == {step: 100.0 + step for step in range(0, 7, every)}
    assert [line["step"] for line in lines(record, "step")] == list(range(7))
    assert [line["at_s"] for line in lines(record, "step")] == sorted(line["at_s"] for line in lines(record, "step"))
    done = collect(record)
    assert done.train_loss == [100.0 + step // every * every for step in range(7)]
    assert (done.status, done.steps, done.steps_planned) == ("finished", 7, 7)
    begin, end = lines(record, "counters")
    assert (begin["steps"], end["steps"]) == (3, 7)


@every_family
def test_a_script_with_a_loop_of_its_own_ends_after_the_steps_that_are_wanted(
    preset: Preset, record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMMOPT_STEPS", "6")
    model = make_model()
    run = preset.attach(model)
    with pytest.raises(SystemExit) as ended:
        train(run, model, 1000)
    assert ended.value.code == 0
    assert run.is_finished
    assert run.is_closed
    done = collect(record)
    assert (done.status, done.steps, done.steps_planned, len(done.train_loss)) == ("finished", 6, 6, 6)
    assert done.train_loss[-1] == 105.0
    assert done.compute_s is not None
    (compute,) = lines(record, "compute")
    exchanged = [] if preset.name == "noloco" else [sum(p.numel() for p in run.parameters.values())]
    assert (compute["buckets"], compute["overlap"]) == (exchanged, False)
    assert run.steps == (6 if preset.name == "noloco" else 22)  # those without communication follow


def test_a_rank_whose_disk_is_full_ends_with_the_others(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this machine")
    (record / "rank0.jsonl").symlink_to("/dev/full")
    monkeypatch.setenv("COMMOPT_STEPS", "4")
    model = make_model()
    run = PRESETS[0].attach(model)
    with pytest.raises(SystemExit):
        train(run, model, 1000)
    assert run.steps == 20


def test_a_script_that_ends_by_itself_before_that_is_told_of(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMOPT_STEPS", "60")
    model = make_model()
    with PRESETS[0].attach(model) as run:
        train(run, model, 5)
    done = collect(record)
    assert (done.status, done.steps, done.steps_planned) == ("finished", 5, 60)
    assert "the program ended by itself after 5 steps, before the 60 asked for" in done.notices


def test_range_goes_on_to_the_steps_that_are_timed(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMOPT_STEPS", "4")
    model, seen = make_model(), []
    run = PRESETS[0].attach(model)

    def loop() -> None:
        for step in run.range(1000):
            seen.append(step)
            loss_of(model(make_batch(0, step)[0]), make_batch(0, step)[1]).backward()
            run.optimizer.step()

    with pytest.raises(SystemExit):
        loop()
    assert seen[:5] == list(range(5))
    assert collect(record).train_loss == []
    assert lines(record, "start")[0]["steps"] == 4


@pytest.mark.parametrize("raises", [False, True])
def test_a_script_that_closes_nothing_has_a_whole_record_unless_it_fails(raises: bool, record: Path) -> None:
    script = (
        "import torch, commopt\n"
        "model = torch.nn.Linear(4, 2)\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "commopt.attach(model, 'ef_sign', optimizer)\n"
        "for step in range(5):\n"
        "    model(torch.ones(3, 4)).sum().backward()\n"
        "    optimizer.step()\n" + "raise ValueError\n" * raises
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == int(raises)
    done = collect(record)
    assert (done.status, done.steps) == ("failed" if raises else "finished", 5 - raises)


def test_steps_that_are_no_number_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMOPT_STEPS", "many")
    with pytest.raises(ConfigError, match="COMMOPT_STEPS=many: no whole number"):
        Preset("dense", {}, sgd(0.1)).attach(make_model())


@pytest.mark.parametrize(("silent_s", "steps"), [(1e9, 16), (0.0, 3)], ids=["quick", "slow"])
def test_if_no_steps_are_wanted_some_are_timed_without_communication(
    silent_s: float, steps: int, record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMMOPT_STEPS", "0")
    monkeypatch.setattr("commopt.run.log.SILENT_S", silent_s)

    def work(group: Group) -> tuple[float, int]:
        model = make_model()
        run = attach(model, "dense", sgd_of(model), group=group)
        before = run.traffic.payload_bytes
        with pytest.raises(SystemExit):
            train(run, model, 1000)
        return run.traffic.payload_bytes - before, run.steps

    for sent, done_steps in SimWorld[Any](2).run(work):
        assert sent < 100  # hashes, and how long a step takes
        assert done_steps == steps
    done = collect(record)
    assert (done.status, done.steps) == ("finished", 0)
    for rank in range(2):
        found = RankRecord.read(record / f"rank{rank}.jsonl")
        assert len(found.compute_s) == steps - min(4, steps // 3)
        assert found.buckets == [sum(p.numel() for p in make_model().parameters())]
