from __future__ import annotations

import json
from pathlib import Path

import pytest

from commopt.cluster.doctor import State, as_json, examine


def test_every_problem_comes_with_something_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from commopt.cli.app import app

    file = tmp_path / "machine.json"
    with pytest.raises(SystemExit) as ended:
        app(["doctor", "--json", str(file)])
    assert ended.value.code == 0
    table = capsys.readouterr().out
    checks = json.loads(file.read_text())
    names = [check["check"] for check in checks]
    assert len(names) == len(set(names))
    assert {"python", "torch", "gloo", "unshare", "ip", "namespaces", "numba"} <= set(names)
    assert all(name in table for name in names)
    assert all(check["cure"] for check in checks if check["state"] != "ok")


def test_namespaces_are_missing_without_unshare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    checks = {check.check: check for check in examine()}
    assert checks["unshare"].state is State.MISSING
    assert checks["unshare"].cure == "install util-linux"
    assert checks["namespaces"].state is State.MISSING
    assert json.loads(as_json(list(checks.values())))[0]["check"] == "machine"


def test_a_table_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from commopt.cli.app import app

    with pytest.raises(SystemExit) as ended:
        app(["doctor", "--json", str(tmp_path / "nowhere" / "machine.json")])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("machine.json: cannot be written: no such file or directory\n")
