"""What scripts/bench/memory.py says about peaks that it has stored, beside the formula; nothing here trains a large model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from script import module

bench, emulated, sheets, store = map(module, ("memory", "emulated", "sheets", "store"))
ranks = module("memory_ranks")


def stored(model: str, method: str, *most: float, parameters: float = 100e6, has_views: bool = False) -> dict[str, Any]:
    cell = bench.Cell(model, method, has_views)
    what = {"parameters": parameters, "most_bytes": most, "seconds": [9.0, 2.0, 4.0], "formula": 20.0}
    return {"name": cell.name, "settings": cell.settings, **what}


@pytest.mark.parametrize(
    ("method", "has_views", "expected"),
    [
        ("dense", False, 4 + 4 + 4 + 8),
        ("ef_sign", False, 4 + 4 + 4 + 8 + 6),  # a worker's residual, and half of a server's
        ("ef_sign", True, 4 + 4 + 8 + 6),
        ("onebit_adam", False, 4 + 4 + 4 + 8 + 6),
        ("powersgd", False, 4 + 4 + 4 + 8 + 4),
        ("diloco", False, 4 + 4 + 4 + 8 + 8),  # without buckets, with a copy, slow weights and momentum
    ],
)
def test_the_formula_is_that_of_the_page_for_two_machines(method: str, has_views: bool, expected: float) -> None:
    assert bench.formula(bench.Cell("124m", method, has_views).settings) == pytest.approx(expected, rel=2e-3)


def test_the_table_leaves_out_what_any_process_takes_and_marks_high_peaks() -> None:
    cells = [
        stored("small", "dense", 1e8, 2e8, 2e8, parameters=5e4),
        stored("small", "ef_sign", 1e8, 3e8, 3e8, parameters=5e4),
        stored("124m", "dense", 1e9, 2.1e9, 2.4e9),
        stored("124m", "ef_sign", 1e9, 2.5e9, 2.7e9, has_views=True),
        stored("124m", "powersgd", 1e9, 2e9, 2e9),  # whose small one is missing
    ]
    (sheet,) = bench.report(cells).sheets
    assert [list(map(str, row)) for row in sheet.rows] == [
        ["`dense`", "100", "2.40", "0.20", "19.0", "22.0", "20.0", "1.10", "3.0"],
        ["`ef_sign`, views", "100", "2.70", "0.30", "22.0", "24.0", "20.0", "1.20 *", "3.0"],
    ]
    assert bench.report(cells[:2]).sheets == []


def test_cells_are_of_the_sizes_that_their_names_say() -> None:
    for name, about in (("124m", 124e6), ("350m", 350e6)):
        sizes = bench.Cell(name, "dense").settings
        with torch.device("meta"):
            gpt = ranks.training_program().GPT(*(sizes[key] for key in ("layers", "heads", "width", "context")))
        assert sum(p.numel() for p in gpt.parameters()) == pytest.approx(about, rel=0.02)


def test_a_cell_ends_with_the_reason_if_it_takes_too_much_memory() -> None:
    bench.check_room("memory-350m-dense", bench.free_bytes())
    with pytest.raises(bench.CommoptError, match=r"memory-350m-dense: ended, as it left 0\.40 GB"):
        bench.check_room("memory-350m-dense", 400_000_000)


def test_stored_cells_are_shown_and_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entries: list[Any] = []
    monkeypatch.setattr(emulated, "measure_all", lambda todo, file: entries.extend(todo))
    file = tmp_path / "cells.jsonl"
    for model in ("small", "124m"):
        one = stored(model, "dense", 1e8, 2e8, 3e8)
        store.Store(file).put(one["name"], one["settings"], one)
    words = ["--results", str(file), "--only", "memory-small-*,memory-124m-dense", "--json", str(tmp_path / "all.json")]
    bench.run(bench.parser().parse_args(words))
    assert [entry["name"] for entry in entries] == [f"memory-small-{name}" for name in bench.METHODS][1:]
    assert json.loads((tmp_path / "all.json").read_text())["tables"][0]["rows"][0][0] == "`dense`"
    assert "more than 15% above the formula" in capsys.readouterr().out
