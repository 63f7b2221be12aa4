"""What scripts/bench/plan.py says of a probe and of measured steps; no number of this machine counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from probe_file import probe_file, script
from script import module

bench, Store = module("plan"), module("store").Store
CELL = bench.Cell(2, 1, "20mbit", "1m")
ELEMENTS = 1_000_000


def found(**measured: float) -> dict[str, Any]:
    """A probe of a link of 2 MB/s, on which exchanges take nothing but their bytes, and the steps that were measured."""
    calls = [[1000, 0.001 / 2, 0.0], [1_001_000, 1.001 / 2, 0.0]]
    codecs = {name: {"exchange": [[1, 0.0]], "step": [[1, 0.0]]} for name in bench.METHODS}
    own = script(program="plan_ranks.py", parameters=ELEMENTS, step_s=2.0, buckets=[ELEMENTS])
    probe = probe_file(calls, codecs, rate=2e6, latency_s=0.0, copy_bytes_per_s=1e12, script=own)
    return {"probe": probe, "measured": dict.fromkeys(bench.METHODS, 1.0) | measured}


def test_24_cells_of_8_methods_span_what_the_page_says() -> None:
    cells = bench.all_cells()
    assert len(cells) == len({cell.name for cell in cells}) == 24
    assert {cell.machines for cell in cells} == {2, 3, 4, 6}
    assert {cell.slots for cell in cells} == {1, 2}
    assert {"20mbit", "1gbit"} <= {cell.rate for cell in cells}
    assert len(bench.METHODS) == 8


def test_predictions_are_compared_with_what_was_measured() -> None:
    one = bench.compared(CELL, found(dense=2.0, ef_sign=0.1))
    assert one.predicted["dense"] == pytest.approx(0.1 + 4e6 / 2e6)
    assert one.errors["dense"] == pytest.approx(2.1 / 2.0 - 1)
    assert one.best == "ef_sign"
    assert one.named in ("ef_sign", "onebit_adam", "powersgd")
    assert one.over_best == pytest.approx(one.measured[one.named] / 0.1)


def test_what_is_stored_is_shown_with_the_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cells.jsonl"
    Store(file).put(CELL.name, CELL.settings(), found(dense=2.0))
    words = ["--table", "--results", str(file), "--json", str(tmp_path / "table.json")]
    bench.run(bench.parser().parse_args(words))
    said = " ".join(capsys.readouterr().out.split())
    assert "8 steps in 1 cells" in said
    (table,) = json.loads((tmp_path / "table.json").read_text())["tables"]
    assert table["rows"][0][:3] == ["2 x 1, 20mbit, 1m", "2.0 s", "2.1 s"]


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    file = tmp_path / "cells.jsonl"
    Store(file).put(CELL.name, CELL.settings(), found(dense=2.0))
    image = tmp_path / "plan.png"
    bench.run(bench.parser().parse_args(["--figure", str(image), "--results", str(file)]))
    assert image.read_bytes().startswith(b"\x89PNG")
