from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

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
        record(Recorder(tmp_path / "r", rank=rank, world_size=2, node=f"node{rank}", nic="lo"))
    run = collect(tmp_path / "r")
    assert (run.status, run.method, run.options, run.ranks) == ("finished", "dense", {"lr": 1e-3}, 2)
    assert run.train_loss == pytest.approx([2.0, 1.9, 1.8])
    assert (run.steps, run.tokens, run.val_loss) == (3, 384, 1.5)
    assert (run.step_s, run.compute_s, run.wait_share) == pytest.approx((0.1, 0.06, 0.4))
    assert [node.node for node in run.nodes] == ["node0", "node1"]
    assert run.events[0].fields == {"step": 1, "parameter": "head.weight"}
    assert run.events[0].ranks == [0, 1]


def test_environment_says_where_and_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"COMMOPT_NODE": "b", "COMMOPT_NIC": "lo", "COMMOPT_MTU": "9000"}
    for name, value in {"COMMOPT_RECORD": str(tmp_path), **node}.items():
        monkeypatch.setenv(name, value)
    record(Recorder.from_environment(5, 8))
    lines = read(tmp_path / "rank5.jsonl")
    assert [lines[0][key] for key in ("world_size", "node", "mtu", "resumed_at")] == [8, "b", 9000, 0]
    assert lines[1]["nic_tx_bytes"] > 0
    monkeypatch.setenv("COMMOPT_MTU", "large")
    with pytest.raises(ConfigError, match="COMMOPT_MTU=large: no whole number"):
        Recorder.from_environment(0, 1)


@pytest.mark.parametrize(("rank", "printed"), [(0, True), (1, False)])
def test_without_a_launcher_rank_0_prints_some_lines(
    rank: int, printed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COMMOPT_RECORD", raising=False)
    record(Recorder.from_environment(rank, 2), steps=1000)
    lines = capsys.readouterr().out.splitlines()
    assert (20 <= len(lines) <= 26) if printed else not lines
    if printed:
        assert "dense: 1000 steps, 1,000 parameters" in lines[0]


@pytest.mark.parametrize(
    ("target", "nic", "warning"),
    [
        ("/dev/full", None, "goes on training"),
        ("/dev/null/x", None, "records nothing"),
        (None, "nowhere0", "no bytes of the"),
    ],
)
def test_what_cannot_be_recorded_is_warned_about_once_and_training_goes_on(
    target: str | None, nic: str | None, warning: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if target == "/dev/full" and not Path(target).exists():
        pytest.skip("no /dev/full on this machine")
    if target:
        (tmp_path / "rank0.jsonl").symlink_to(target)
    with caplog.at_level(logging.WARNING):
        record(Recorder(tmp_path, nic=nic))
    assert len(caplog.records) == 1
    assert warning in caplog.text
    assert target or collect(tmp_path).nic_tx_bytes_per_step is None


def test_lines_are_there_before_the_end_and_a_loss_that_is_not_finite_is_null(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.start(method="dense", options={}, parameters=1, steps=2)
    for step, loss in enumerate((math.nan, math.inf)):
        recorder.step(step=step, loss=loss, seconds=0.1, wait_s=0.0, tokens=1, steady=True)
    assert [line.get("loss", "") for line in read(tmp_path / "rank0.jsonl")] == ["", None, None]
    recorder.end()
