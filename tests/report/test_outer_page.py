from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outer_runs import STORM, STORM_FAULTS, Absence, OuterPlan, fault, outer_run, write_outer
from synthetic_runs import DENSE, results_of, run_of, short

from commopt.report import drawing
from commopt.report.document import Fault
from commopt.report.outer_plots import PICTURE_NAMES, name_levels, outer_pictures
from commopt.report.outer_table import (
    back_text,
    cost_text,
    fault_lines,
    fault_text,
    missed_text,
    round_cells,
    stop_text,
)
from commopt.report.page import page, write_report
from commopt.report.results import Results, RunResult, collect
from commopt.report.table import cells, show

SECTIONS = ("<h2>Outer rounds</h2>", "<h2>Faults</h2>")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("runs")
    return results_of([run_of(folder, short(DENSE)), outer_run(folder, STORM, STORM_FAULTS)])


def faults_by_kind(run: RunResult) -> dict[str, Fault]:
    return {each.kind: each for each in run.faults}


def shown(results: Results) -> str:
    out = io.StringIO()
    show(results, out)
    return out.getvalue()


def test_a_comparison_without_rounds_has_no_section_for_them(tmp_path: Path) -> None:
    plain = results_of([run_of(tmp_path, short(DENSE))])
    html, text = page(plain), shown(plain)
    assert not [words for words in (*SECTIONS, "spread", "ms/round", "survivors") if words in html]
    assert not [words for words in ("outer", "fault", "spread") if words in text]
    assert outer_pictures(plain) == {}


def test_rounds_without_faults_have_their_own_section_only(tmp_path: Path) -> None:
    html = page(results_of([outer_run(tmp_path, OuterPlan())]))
    assert [section in html for section in SECTIONS] == [True, False]


def test_faults_without_rounds_have_their_own_section_only(tmp_path: Path) -> None:
    plan = OuterPlan(method="dense", every=1000, absences={rank: Absence(after=26) for rank in range(4)})
    kill = fault("kill", ["node2"], at_step=25, at_s=2.55)
    html = page(results_of([outer_run(tmp_path, plan, [kill], failure="node2 was killed at step 25")]))
    assert [section in html for section in SECTIONS] == [False, True]


def test_the_page_says_why_bytes_are_not_checked_under_faults(results: Results) -> None:
    under_faults = page(results_of(results.runs[1:]))
    assert "Not checked: under faults the two counts differ" in under_faults
    assert "no network interfaces of their own" not in under_faults


def test_only_runs_with_rounds_have_a_row_of_rounds(results: Results) -> None:
    assert round_cells(results) == [["noloco", "30", "5", "10.0", "10.0", "0.9%", "0.21", "0.403", "0.0025"]]


def test_the_step_of_a_run_with_rounds_is_the_mean(tmp_path: Path) -> None:
    plan = OuterPlan(stops={(rank, step): 1.0 for rank in range(4) for step in range(9, 60, 10)})
    run = outer_run(tmp_path, plan)
    assert run.step_s == run.step_mean_s == pytest.approx(0.1 + 6 / 57)
    assert cells(results_of([run]))[0][3] == "205"


def test_plain_output_tells_rounds_and_faults(results: Results) -> None:
    text = shown(results)
    assert "noloco, fault at step 120: node2 killed; longest stop " in text
    assert any(line.split()[:3] == ["noloco", "30", "5"] for line in text.splitlines())
    assert all(character == "\n" or character.isprintable() for character in text)
    assert max(len(line) for line in text.splitlines() if "ms/round" in line) <= 100


def test_a_terminal_gets_the_sections_too(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "100")
    out = Terminal()
    show(results, out)
    assert "ms/round" in out.getvalue()
    assert "node0 cut from node1 for 4.0 s" in out.getvalue()
    assert "…" not in out.getvalue()


def test_faults_are_put_in_words(results: Results) -> None:
    by_kind = faults_by_kind(results.runs[1])
    assert fault_text(by_kind["kill"]) == "node2 killed"
    assert fault_text(by_kind["cut"]) == "node0 cut from node1 for 4.0 s"
    assert fault_text(by_kind["slow"]) == "node3 slowed 5.0x"
    assert fault_text(by_kind["restart"]) == "node2 started again"
    assert fault_text(by_kind["kill"].model_copy(update={"kind": "hang", "for_s": 10.0})) == "node2 hung for 10 s"
    assert fault_text(by_kind["kill"].model_copy(update={"kind": "flood"})) == "node2 flood"


def test_what_a_fault_cost_is_put_in_words(tmp_path: Path) -> None:
    plan = OuterPlan(
        stops={(1, 27): 3.0}, missed=[(0, 2), (0, 3), (3, 2)], absences={2: Absence(25, back_s=7.5, resumed_at=45)}
    )
    lines = [
        fault("kill", ["node2"], at_step=25, at_s=2.55),
        fault("restart", ["node2"], at_step=50, at_s=6.05),
    ]
    kill, restart = outer_run(tmp_path, plan, lines).faults
    assert stop_text(kill.cost) == "3.1 s (rank 1, 31 steps' time)"
    assert missed_text(kill.cost) == "3 (rank 0: 2, rank 3: 1)"
    assert (back_text(kill), back_text(restart)) == (None, "1.6 s, step 45")
    assert cost_text(restart) == "no stop; stepped again after 1.6 s, step 45"
    never = restart.model_copy(update={"cost": restart.cost.model_copy(update={"back_after_s": None})})
    assert cost_text(never) == "no stop; never stepped again"


def test_without_a_survivor_there_is_no_stop(tmp_path: Path) -> None:
    kill = fault("kill", ["node0"], at_step=25, at_s=2.55)
    run = outer_run(tmp_path, OuterPlan(ranks=1, absences={0: Absence(after=25)}), [kill], failure="gone")
    assert stop_text(run.faults[0].cost) is None
    assert fault_lines(results_of([run])) == ["noloco, fault at step 25: node0 killed; nobody left to see it"]


def test_the_pictures_are_written_beside_the_others(results: Results, tmp_path: Path) -> None:
    names = {path.name for path in write_report(results, tmp_path)}
    assert {f"{name}.png" for name in PICTURE_NAMES} <= names
    assert names == {path.name for path in tmp_path.iterdir()}


def test_a_picture_of_an_older_report_does_not_stay(results: Results, tmp_path: Path) -> None:
    write_report(results, tmp_path)
    write_report(results_of(results.runs[:1]), tmp_path)
    assert not {f"{name}.png" for name in PICTURE_NAMES} & {path.name for path in tmp_path.iterdir()}


def test_the_pages_new_pictures_follow_light_and_dark(results: Results) -> None:
    body = page(results).split("<body>")[1]
    assert not [colour for colour in drawing.DARK if colour in body]


@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=9).map(sorted),
    st.lists(st.integers(20, 200), min_size=9, max_size=9),
)
def test_no_line_runs_through_the_name_of_a_fault(starts: list[int], widths: list[int]) -> None:
    names = list(zip(starts, widths, name_levels(starts, widths[: len(starts)]), strict=False))
    for k, (start, width, level) in enumerate(names):
        for later_start, _, later_level in names[k + 1 :]:
            assert later_start >= start + width or later_level < level


def odd_runs(folder: Path) -> dict[str, list[RunResult]]:
    """Sets of runs that lack something."""
    kill = fault("kill", ["node2"], at_step=0, at_s=0.0)
    silent = write_outer(folder / "silent", OuterPlan(), [kill])
    for rank in (1, 2):
        path = silent / f"rank{rank}.jsonl"
        path.write_text(path.read_text().splitlines()[0] + "\n")
    nowhere = write_outer(folder / "nowhere", OuterPlan(every=1000), [fault("cut", ["a", "b"], at_step=9, at_s=99.0)])
    alone = OuterPlan(ranks=2, missed=[(rank, number) for rank in (0, 1) for number in range(6)])
    return {
        "many ranks": [outer_run(folder / "many", replace(STORM, ranks=40), STORM_FAULTS)],
        "ranks without a step": [collect(silent)],
        "a fault after the end, on unknown nodes": [collect(nowhere)],
        "no spread": [outer_run(folder / "none", alone)],
        "a long run": [
            outer_run(
                folder / "long", OuterPlan(step_s=30.0), [fault("slow", ["node3"], at_step=5, at_s=150.0, factor=2)]
            )
        ],
    }


def test_odd_runs_are_shown_and_drawn_too(tmp_path: Path) -> None:
    for runs in odd_runs(tmp_path).values():
        results = results_of(runs)
        assert page(results).rstrip().endswith("</html>")
        assert shown(results)
        for draw in outer_pictures(results).values():
            assert drawing.png(draw(results)).startswith(b"\x89PNG")
