from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import ONEBIT, traffic

from commopt.errors import ConfigError
from commopt.record.recorder import Recorder
from commopt.report.results import collect

EMPTY = {"payload_bytes": 0.0, "by_peer": {}, "by_operation": []}


def record(recorder: Recorder, steps: int = 3) -> None:
    recorder.start(method="dense", options={"lr": 1e-3}, parameters=1000, steps=steps)
    recorder.counters("begin", EMPTY)
    for step in range(steps):
        recorder.step(step=step, loss=2.0 - step / 10, seconds=0.1, wait_s=0.04, tokens=64, steady=True)
    recorder.counters("end", EMPTY)
    recorder.validation(step=steps - 1, loss=1.5, tokens=100)
    recorder.compute([0.05, 0.06, 0.07])
    recorder.event("voided", step=1, parameter="head.weight")
    recorder.end()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_recorded_is_collected(tmp_path: Path) -> None:
    for rank in (0, 1):
        record(Recorder(tmp_path / "r", rank=rank, world_size=2, node=f"node{rank}", node_rank=rank, nic="lo"))
    run = collect(tmp_path / "r")
    assert (run.status, run.method, run.options, run.ranks) == ("finished", "dense", {"lr": 1e-3}, 2)
    assert run.train_loss == pytest.approx([2.0, 1.9, 1.8])
    assert (run.steps, run.tokens, run.val_loss) == (3, 384, 1.5)
    assert (run.step_s, run.compute_s, run.wait_share) == pytest.approx((0.1, 0.06, 0.4))
    assert [node.node for node in run.nodes] == ["node0", "node1"]
    assert run.events[0].fields == {"step": 1, "parameter": "head.weight"}
    assert run.events[0].ranks == [0, 1]


def test_environment_says_who_and_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "COMMOPT_RECORD": str(tmp_path),
        "RANK": "5",
        "WORLD_SIZE": "8",
        "COMMOPT_NODE": "b",
        "COMMOPT_NODE_RANK": "1",
        "COMMOPT_NIC": "lo",
        "COMMOPT_MTU": "9000",
    }.items():
        monkeypatch.setenv(name, value)
    record(Recorder.from_environment())
    lines = read(tmp_path / "rank5.jsonl")
    start = {key: lines[0][key] for key in ("rank", "world_size", "node", "node_rank", "nic", "mtu")}
    assert start == {"rank": 5, "world_size": 8, "node": "b", "node_rank": 1, "nic": "lo", "mtu": 9000}
    assert lines[1]["nic_tx_bytes"] > 0


def test_a_rank_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ConfigError, match="RANK=first"):
        Recorder.from_environment()


@pytest.mark.parametrize(("rank", "printed"), [("0", True), ("1", False)])
def test_without_a_launcher_rank_0_prints_some_lines(
    rank: str, printed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COMMOPT_RECORD", raising=False)
    monkeypatch.setenv("RANK", rank)
    record(Recorder.from_environment(), steps=1000)
    lines = capsys.readouterr().out.splitlines()
    assert (20 <= len(lines) <= 26) if printed else not lines
    if printed:
        assert "dense: 1000 steps, 1,000 parameters" in lines[0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_warned_about_once_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "rank0.jsonl").symlink_to("/dev/full")
    with caplog.at_level(logging.WARNING):
        record(Recorder(tmp_path))
    assert len(caplog.records) == 1
    assert "goes on training" in caplog.text


def test_a_folder_that_cannot_be_made_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    record(Recorder(tmp_path / "file" / "folder"))
    assert "records nothing" in caplog.text


def test_an_unknown_interface_is_warned_about_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record(Recorder(tmp_path, nic="nowhere0"))
    assert len(caplog.records) == 1
    assert collect(tmp_path).nic_tx_bytes_per_step is None


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_written_as_null(loss: float, tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.start(method="dense", options={}, parameters=1, steps=1)
    recorder.step(step=0, loss=loss, seconds=0.1, wait_s=0.0, tokens=1, steady=True)
    recorder.end()
    assert '"loss": null' in (tmp_path / "rank0.jsonl").read_text()


def test_lines_are_there_before_the_end(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.start(method="dense", options={}, parameters=1, steps=1)
    assert len(read(tmp_path / "rank0.jsonl")) == 1
    recorder.end()


def test_a_window_has_a_begin_and_an_end_only(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    with pytest.raises(ValueError, match="middle"):
        recorder.counters("middle", traffic(ONEBIT, 0, 1))
    recorder.end()


def test_importing_the_recorder_is_light() -> None:
    heavy = ("matplotlib", "jinja2", "rich", "pyroute2", "pydantic")
    program = f"import sys, commopt.record.recorder; print(*(m for m in {heavy} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
