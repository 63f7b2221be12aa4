from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from outer_runs import STORM, STORM_FAULTS, Absence, OuterPlan, fault, outer_run
from synthetic_runs import DENSE, FP16, ONEBIT, Edit, Lines, Plan, Terminal, change, results_of, run_of, short

from commopt.record.words import bytes_text, megabytes, milliseconds, seconds_text, times_text
from commopt.report.document import Results
from commopt.report.table import COLUMNS, cells, cost_text, fault_lines, fault_row, readings, round_cells, show


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("runs")
    return results_of([run_of(folder, plan) for plan in (DENSE, FP16, ONEBIT)])


@pytest.fixture(scope="module")
def storm(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("storm")
    return results_of([run_of(folder, short(DENSE)), outer_run(folder, STORM, STORM_FAULTS)])


def test_a_reading_says_speed_loss_and_bytes(results: Results) -> None:
    assert readings(results)[2] == (
        "onebit_adam: steps 9.5x faster than dense after step 24, the whole run 5.7x faster; val loss 0.2 % above; "
        "32x fewer bytes a step on the wire."
    )


@pytest.mark.parametrize("which", ["results", "storm"])
def test_plain_output_has_no_escape_codes(which: str, request: pytest.FixtureRequest) -> None:
    out, results = io.StringIO(), request.getfixturevalue(which)
    show(results, out)
    assert all(character == "\n" or character.isprintable() for character in out.getvalue())
    header, _, *rows = (line.rstrip() for line in out.getvalue().splitlines()[: 2 + len(results.runs)])
    assert [row.split() for row in rows] == cells(results)
    assert {len(row) for row in rows} == {len(header)}
    assert max(map(len, [header, *rows, *(line for line in out.getvalue().splitlines() if "ms/round" in line)])) <= 100


@pytest.mark.parametrize(("which", "columns", "said"), [("results", 80, "onebit_adam"), ("storm", 100, "ms/round")])
def test_a_terminal_cuts_nothing(
    which: str, columns: int, said: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    out = Terminal()
    show(request.getfixturevalue(which), out)
    assert "…" not in out.getvalue()
    assert said in out.getvalue()
    assert ("node0 cut from node1 for 4.0 s" in out.getvalue()) == (which == "storm")


def test_long_names_are_folded_and_numbers_stay_whole(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["dense", "two_way(top_k, sign, density=1)", "a_method_of_exactly_thirty_chars"]
    runs = [run.model_copy(update={"name": name}) for run, name in zip(results.runs, names, strict=True)]
    monkeypatch.setenv("COLUMNS", "80")
    out = Terminal()
    show(results.model_copy(update={"runs": runs}), out)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue().partition("\n\n")[0]).splitlines()
    assert max(map(len, lines)) <= 80
    folded = "".join(re.sub(r"( +[-+.%x\d]+){10} *$", "", line) for line in lines[2:])
    assert "".join(names).replace(" ", "") == folded.replace(" ", "")
    for row in cells(results):
        assert any(line.split()[-len(row) + 1 :] == row[1:] for line in lines)


def killed(_: int, lines: Lines) -> Lines:
    return lines[:30]


DIVERGED = change("step", lambda _, line: {"loss": None} if line["step"] > 29 else {})
UNEVEN = change("step", lambda _, line: {"seconds": 4.0 if line["step"] % 4 == 0 else 0.1})


@pytest.mark.parametrize(
    ("plan", "edit", "said", "unsaid"),
    [
        (replace(short(FP16), step_s=1.86), None, "steps 1.5x slower than dense, the whole run 1.5x slower", "fail"),
        (replace(short(FP16), payload_bytes=7.32e6), None, "; 1.2x more bytes a step on the wire", "fewer"),
        (short(ONEBIT), killed, "did not finish (ranks 0, 1, 2, 3 stopped after 28 of 40 steps)", "whole run"),
        (short(ONEBIT), DIVERGED, "training loss not finite in 10 steps, first in step 31", "above"),
        (short(FP16, 30), None, "after 30 steps, where dense did 40", "val loss 0"),
        (short(FP16), UNEVEN, "its steady steps are not alike, and take 1075 ms on average", "fail"),
    ],
)
def test_a_run_is_read_beside_dense(plan: Plan, edit: Edit | None, said: str, unsaid: str, tmp_path: Path) -> None:
    results = results_of([run_of(tmp_path, short(DENSE)), run_of(tmp_path, plan, edit=edit)])
    text = readings(results)[1]
    assert said in text
    assert unsaid not in text
    assert (cells(results)[1][-1] == "failed") == (edit is killed)
    assert (cells(results)[1][2] == "-") == (edit is killed or plan.steps == 30)


def test_dense_and_runs_without_it_are_read_by_themselves(results: Results, tmp_path: Path) -> None:
    assert readings(results)[0].startswith("dense: 1242 ms a step, 92 % of it waiting for the network; val loss 2.506")
    alone = results_of([run_of(tmp_path, short(ONEBIT))])
    assert readings(alone)[0].startswith("onebit_adam: 130 ms a step, 19 % of it waiting")
    same = results.runs[1].model_copy(update={"val_loss": (results.runs[0].val_loss or 0.0) * 0.9999})
    assert cells(results_of([results.runs[0], same]))[1][2] == "+0.0%"
    assert "the same val loss" in readings(results_of([results.runs[0], same]))[1]
    assert cells(alone)[0][COLUMNS.index(next(c for c in COLUMNS if c.heading[0] == "times"))] == "-"


def test_plain_output_tells_rounds_and_faults_where_there_are_any(storm: Results) -> None:
    out, plain = io.StringIO(), io.StringIO()
    show(storm, out)
    assert "noloco, fault at step 120: node2 killed; longest stop: " in out.getvalue()
    assert round_cells(storm) == [["noloco", "30", "5", "10.0", "10.0", "0.9%", "0.21", "0.403", "0.0023"]]
    assert round_cells(storm)[0] in [line.split() for line in out.getvalue().splitlines()]
    show(results_of(storm.runs[:1]), plain)
    assert not [words for words in ("outer", "fault", "spread") if words in plain.getvalue()]


def test_the_step_of_a_run_with_rounds_is_the_mean(tmp_path: Path) -> None:
    run = outer_run(tmp_path, OuterPlan(stops={(rank, step): 1.0 for rank in range(4) for step in range(9, 60, 10)}))
    assert run.step_s == run.step_mean_s == pytest.approx(0.1 + 6 / 57)
    assert cells(results_of([run]))[0][3] == "205"


def test_the_table_is_about_the_survivors(tmp_path: Path) -> None:
    run = outer_run(tmp_path, OuterPlan(stops={(2, 9): 50.0}, absences={2: Absence(after=25)}))
    assert run.status == "finished"
    assert run.step_s == pytest.approx(0.1)


def test_faults_are_put_in_words(storm: Results) -> None:
    kill, cut, slow, restart = storm.runs[1].faults
    assert str(kill) == "node2 killed"
    assert str(cut) == "node0 cut from node1 for 4.0 s"
    assert str(slow) == "node3 slowed 5.0x"
    assert str(restart) == "node2 started again"
    assert str(kill.model_copy(update={"kind": "hang", "for_s": 10.0})) == "node2 hung for 10 s"
    assert str(kill.model_copy(update={"kind": "flood"})) == "node2 flood"


def test_what_a_fault_cost_is_put_in_words(tmp_path: Path) -> None:
    returned = Absence(25, back_s=7.5, resumed_at=45)
    plan = OuterPlan(stops={(1, 27): 3.0}, missed=[(0, 2), (0, 3), (3, 2)], absences={2: returned})
    lines = [fault("kill", ["node2"], at_step=25, at_s=2.55), fault("restart", ["node2"], at_step=50, at_s=6.05)]
    run = outer_run(tmp_path, plan, lines)
    kill, restart = run.faults
    assert [fault_row(each)[3:] for each in run.faults] == [
        ["3.1 s (rank 1, 31 steps' time)", "3 (rank 0: 2, rank 3: 1)", "-"],
        ["none", "0", "1.6 s, step 45"],
    ]
    assert cost_text(kill) == "longest stop: 3.1 s (rank 1, 31 steps' time); rounds missed: 3 (rank 0: 2, rank 3: 1)"
    assert cost_text(restart) == "longest stop: none; stepped again: 1.6 s, step 45"
    never = restart.model_copy(update={"cost": restart.cost.model_copy(update={"back_after_s": None})})
    assert cost_text(never) == "longest stop: none; stepped again: never"


def test_without_a_survivor_there_is_no_stop(tmp_path: Path) -> None:
    kill = fault("kill", ["node0"], at_step=25, at_s=2.55)
    run = outer_run(tmp_path, OuterPlan(ranks=1, absences={0: Absence(after=25)}), [kill], failure="gone")
    assert fault_row(run.faults[0])[3] == "-"
    assert fault_lines(results_of([run])) == ["noloco, fault at step 25: node0 killed; nobody left to see it"]


def test_quantities_keep_three_digits() -> None:
    assert [milliseconds(s) for s in (1.2419, 0.0131, 0.00042)] == ["1242", "13.1", "0.42"]
    assert [megabytes(n) for n in (12.34e6, 6.1e6, 0.19e6, 4200, 0)] == ["12.3", "6.10", "0.190", "0.0042", "0.00"]
    assert [bytes_text(n) for n in (6.1e6, 190e3, 830, 1.83e9)] == ["6.1 MB", "190 kB", "830 B", "1.8 GB"]
    assert [seconds_text(s) for s in (0.131, 9.44, 43.2)] == ["131 ms", "9.4 s", "43 s"]
    assert [seconds_text(s) for s in (372.6, 7500)] == ["6 min 13 s", "2 h 5 min"]
    assert [times_text(r) for r in (31.6, 9.47, 1.0, 0.8)] == ["32x", "9.5x", "1.0x", "0.80x"]
