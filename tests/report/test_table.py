from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import DENSE, EF_SIGN, FP16, ONEBIT, results_of, run_of, short

from commopt.record.words import bytes_text, megabytes, milliseconds, seconds_text, times_text
from commopt.report.columns import aligned
from commopt.report.results import Results
from commopt.report.table import COLUMNS, cells, readings, show

Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("runs")
    return results_of([run_of(folder, plan) for plan in (DENSE, FP16, ONEBIT, EF_SIGN)])


def test_a_reading_says_speed_loss_and_bytes(results: Results) -> None:
    assert readings(results)[2] == (
        "onebit_adam: steps 9.5x faster than dense after step 24, the whole run 5.7x faster; val loss 0.2 % above; "
        "32x fewer bytes a step."
    )


def test_dense_is_read_by_itself(results: Results) -> None:
    assert readings(results)[0].startswith("dense: 1242 ms a step, 92 % of it waiting for the network; val loss 2.506")


def test_plain_output_has_no_escape_codes(results: Results) -> None:
    out = io.StringIO()
    show(results, out)
    assert all(character == "\n" or character.isprintable() for character in out.getvalue())
    assert out.getvalue().startswith(aligned(COLUMNS, cells(results)))


def test_the_columns_of_the_plain_table_line_up(results: Results) -> None:
    header, *_, last = aligned(COLUMNS, cells(results)).splitlines()
    assert len(last) == len(header) or last.endswith("43")
    assert max(map(len, aligned(COLUMNS, cells(results)).splitlines())) <= 100


def test_a_terminal_of_80_columns_cuts_nothing(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "80")
    out = Terminal()
    show(results, out)
    assert "…" not in out.getvalue()
    assert "onebit_adam" in out.getvalue()


def test_a_slower_method_is_called_slower(tmp_path: Path) -> None:
    slow = replace(short(FP16), step_s=1.86, payload_bytes=7.32e6)
    text = readings(results_of([run_of(tmp_path, short(DENSE)), run_of(tmp_path, slow)]))[1]
    assert "steps 1.5x slower than dense, the whole run 1.5x slower" in text
    assert "1.2x more bytes a step" in text


def test_a_run_that_did_not_finish_says_so_first(tmp_path: Path) -> None:
    killed = run_of(tmp_path, short(ONEBIT), edit=lambda _, lines: lines[:30])
    results = results_of([run_of(tmp_path, short(DENSE)), killed])
    assert readings(results)[1].startswith(
        "onebit_adam: did not finish (ranks 0, 1, 2, 3 stopped after 28 of 40 steps)"
    )
    assert "whole run" not in readings(results)[1]
    assert cells(results)[1][-1] == "failed"


def test_a_diverged_run_is_not_compared_by_its_loss(tmp_path: Path) -> None:
    def diverge(_: int, lines: Lines) -> Lines:
        return [{**line, "loss": None} if line["kind"] == "step" and line["step"] > 29 else line for line in lines]

    results = results_of([run_of(tmp_path, short(DENSE)), run_of(tmp_path, short(ONEBIT), edit=diverge)])
    assert "training loss not finite in 10 steps, first in step 31" in readings(results)[1]
    assert "above" not in readings(results)[1]


def test_losses_after_other_numbers_of_steps_are_not_compared(tmp_path: Path) -> None:
    results = results_of([run_of(tmp_path, short(DENSE, 40)), run_of(tmp_path, short(FP16, 30))])
    assert "after 30 steps, where dense did 40" in readings(results)[1]
    assert cells(results)[1][2] == "-"


def test_steps_that_are_not_alike_are_told_by_their_mean(tmp_path: Path) -> None:
    def every_fourth(_: int, lines: Lines) -> Lines:
        return [
            {**line, "seconds": 4.0 if line["step"] % 4 == 0 else 0.1} if line["kind"] == "step" else line
            for line in lines
        ]

    results = results_of([run_of(tmp_path, short(DENSE)), run_of(tmp_path, short(FP16), edit=every_fourth)])
    assert "its steady steps are not alike, and take 1075 ms on average" in readings(results)[1]


def test_without_dense_a_run_is_read_by_itself(tmp_path: Path) -> None:
    results = results_of([run_of(tmp_path, short(ONEBIT))])
    assert readings(results)[0].startswith("onebit_adam: 130 ms a step, 19 % of it waiting")
    assert cells(results)[0][COLUMNS.index(next(c for c in COLUMNS if c.heading[0] == "times"))] == "-"


def test_every_column_has_a_meaning() -> None:
    assert all(column.meaning for column in COLUMNS)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.131, "131 ms"), (9.44, "9.4 s"), (43.2, "43 s"), (372.6, "6 min 13 s"), (7500, "2 h 5 min")],
)
def test_seconds_are_written_as_people_say_them(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_quantities_keep_three_digits() -> None:
    assert [milliseconds(s) for s in (1.2419, 0.0131, 0.00042)] == ["1242", "13.1", "0.42"]
    assert [megabytes(n) for n in (12.34e6, 6.1e6, 0.19e6, 4200, 0)] == ["12.3", "6.10", "0.190", "0.0042", "0.00"]
    assert [bytes_text(n) for n in (6.1e6, 190e3, 830, 1.83e9)] == ["6.1 MB", "190 kB", "830 B", "1.8 GB"]
    assert [times_text(r) for r in (31.6, 9.47, 1.0, 0.8)] == ["32x", "9.5x", "1.0x", "0.80x"]
