"""What scripts/bench/codec_costs.py measures, and what it says of what it has stored; no number of this machine counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from script import module

from commopt.compress import COMPRESSORS
from commopt.methods import METHODS

bench, sheets, Store = module("codec_costs"), module("sheets"), module("store").Store
module("building")  # which codec_costs.py imports when it needs it


def test_every_method_that_exchanges_in_every_step_and_every_codec_is_a_case() -> None:
    names = [case.name for case in bench.all_cases()]
    methods = {name.partition("(")[0] for name in names if not name.startswith("codec-")}
    assert methods == {name for name, method in METHODS.items() if method.kind != "outer"}
    assert {name[6:] for name in names if name.startswith("codec-")} == set(COMPRESSORS)


def test_a_look_times_exchanges_steps_and_codecs_and_stores_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "QUICK", {"rows": 8, "turns": 1})
    file = tmp_path / "found.json"
    words = ["--quick", "--only", "loco,onebit_adam,codec-sign", "--json", str(file), "--results", str(tmp_path / "no")]
    bench.run(bench.parser().parse_args(words))
    assert "loco: exchange " in capsys.readouterr().out
    methods, codecs = (table["rows"] for table in json.loads(file.read_text())["tables"])
    assert [(row[0], row[2], bool(row[3])) for row in methods] == [
        ("`loco`", "12", False),
        ("`onebit_adam`", "6", True),
    ]
    assert all(float(ratio) > 0 for ratio in codecs[0][1:])
    assert not (tmp_path / "no").exists()


def test_what_is_stored_is_not_measured_again_and_missed_targets_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found: dict[str, Any] = {"dense": {"exchange": 3.0}, "demo": {"exchange": 50.0, "step": 4.5}}
    for case in bench.METHODS:
        if case.name in found:
            Store(tmp_path / "cells.jsonl").put(case.name, case.settings(bench.ROWS, 1), found[case.name])
    monkeypatch.setattr(bench, "measure", None)
    bench.run(bench.parser().parse_args(["--only", "dense,demo", "--results", str(tmp_path / "cells.jsonl")]))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["`dense`", "3.0", "3"] in lines
    assert ["`demo`", "50.0", "60", "4.5", "4"] in lines
    assert lines[-1] == ["Targets", "missed:", "demo"]
