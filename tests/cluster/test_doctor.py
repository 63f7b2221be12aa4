from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from launchers import commopt_here

from commopt.cluster.doctor import as_json, examine, levels


def test_every_problem_comes_with_something_to_do(tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    code, table, _ = commopt_here("doctor", "--json", file)
    assert code == 0
    checks = json.loads(file.read_text())
    names = [check["check"] for check in checks]
    assert len(names) == len(set(names))
    assert {"python", "torch", "gloo", "unshare", "ip", "namespaces", "numba"} <= set(names)
    lines = table.splitlines()
    assert len(lines) == 1 + len(checks)  # the output is not a terminal, so nothing is wrapped
    for line, check in zip(lines[1:], checks, strict=True):
        assert re.split(r" {2,}", line.strip()) == [text for text in check.values() if text]
    assert all(check["cure"] for check in checks if check["state"] != "ok")


def test_namespaces_are_missing_without_unshare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    checks = {check.check: check for check in examine()}
    assert checks["unshare"].state == "missing"
    assert checks["unshare"].cure == "install util-linux"
    assert checks["namespaces"].state == "missing"
    assert json.loads(as_json(list(checks.values())))[0]["check"] == "machine"


def test_a_table_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    code, _, errors = commopt_here("doctor", "--json", tmp_path / "nowhere" / "machine.json")
    assert code == 2
    assert errors.endswith("machine.json: cannot be written: no such file or directory\n")


def test_levels_are_those_of_the_job_that_this_process_is_part_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert levels(gpus=0) == "not inside a job"
    assert levels(gpus=4) == "not inside a job; a rank for each GPU makes a machine of 4 ranks"
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert levels(gpus=0) == "this job has 2 machines of 4 ranks, which exchange between machines"
