from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from outer_runs import STORM, STORM_FAULTS, Absence, OuterPlan, fault, outer_run, write_outer
from synthetic_runs import CLUSTER, DENSE, FP16, ONEBIT, change, results_of, run_of, short

from commopt.errors import LaunchError
from commopt.record.words import seconds_text
from commopt.report import drawing, plots
from commopt.report.document import Cluster, Node, Results, RunResult
from commopt.report.page import FILES, draw, headline, keep_last_good, page, results_json, sites, write_report
from commopt.report.results import collect
from commopt.report.table import readings

KILL = fault("kill", ["node2"], at_step=25, at_s=2.55)
NOTHING = results_of([])  # is quickly drawn


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("runs")
    return results_of([run_of(folder, short(plan)) for plan in (DENSE, FP16, ONEBIT)])


@pytest.fixture(scope="module")
def storm(results: Results, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Dense, and a run with outer rounds and faults, for which all pictures are drawn."""
    return results_of([results.runs[0], outer_run(tmp_path_factory.mktemp("storm"), STORM, STORM_FAULTS)])


@pytest.fixture(scope="module")
def html(storm: Results) -> str:
    return page(storm)


def test_a_report_takes_the_place_of_an_older_one_and_leaves_nothing_else(storm: Results, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert sorted(path.name for path in write_report(storm, out)) == sorted(FILES)
    assert Results.model_validate_json((out / "results.json").read_bytes()) == storm
    assert headline(storm) in (out / "report.html").read_text()
    assert (out / "bytes.png").read_bytes().startswith(b"\x89PNG")
    paths = write_report(NOTHING, out)
    assert {path.name for path in paths} == set(FILES) - {"spread.png", "faults.png"}
    assert sorted(paths) == sorted(out.iterdir())
    assert headline(NOTHING) in (out / "report.html").read_text()


def test_a_failed_rerun_keeps_the_last_good_report(results: Results, tmp_path: Path) -> None:
    bad = results.model_copy(update={"runs": [results.runs[0].model_copy(update={"status": "failed"})]})
    good = results_json(results)
    (tmp_path / "results.json").write_text(good)
    assert keep_last_good(results, tmp_path) is None
    assert keep_last_good(bad, tmp_path) == tmp_path / "last-good"
    for text in (results_json(bad), "{}", "no report"):
        (tmp_path / "results.json").write_text(text)
        assert keep_last_good(bad, tmp_path) is None
    assert (tmp_path / "last-good/results.json").read_text() == good


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(LaunchError, match=r"/report\.html: cannot be written: is a directory$"):
        write_report(NOTHING, tmp_path)
    assert Results.model_validate_json((tmp_path / "results.json").read_bytes()) == NOTHING
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "results.json"]


def test_the_page_needs_no_network_and_its_pictures_do_not_share_ids(html: str) -> None:
    addresses = re.findall(r'\s(?:src|href|xlink:href|data|action)="([^"]*)"', html)
    ids = re.findall(r'\sid="([^"]*)"', html)
    assert [address for address in addresses if not address.startswith("#")] == []
    assert re.findall(r"<(?:script|link|iframe|img)\b|@import|url\((?!#)", html) == []
    assert len(ids) == len(set(ids)) > 0
    assert {address[1:] for address in addresses} <= set(ids)


def test_the_page_follows_light_and_dark(html: str) -> None:
    assert "prefers-color-scheme: dark" in html
    body = html[html.index("<body>") :]
    assert not [colour for colour in drawing.DARK if colour in body]


def test_what_users_named_is_escaped() -> None:
    evil = CLUSTER.model_copy(update={"name": "<script>alert(1)</script>", "notices": ["a < b"]})
    html = page(results_of([], evil))
    assert "<script>" not in html
    assert "a &lt; b" in html


NO_FINITE_LOSS = change("step", lambda *_: {"loss": None})


def odd_runs(folder: Path) -> dict[tuple[str, ...], list[RunResult]]:
    """Sets of runs that lack something, by what their page says."""
    silent = write_outer(folder / "silent", OuterPlan(), STORM_FAULTS)
    for rank in (1, 2):
        path = silent / f"rank{rank}.jsonl"
        path.write_text(path.read_text().splitlines()[0] + "\n")
    nowhere = fault("cut", ["a", "b"], at_step=9, at_s=99.0)
    slow = fault("slow", ["node3"], at_step=5, at_s=150.0, factor=2)
    gone = OuterPlan(method="dense", every=1000, absences={rank: Absence(after=26) for rank in range(4)})
    alone = OuterPlan(ranks=2, missed=[(rank, number) for rank in (0, 1) for number in range(6)])
    lacking = {
        "no speed in the steady phase": run_of(
            folder / "warm", short(ONEBIT), edit=change("step", lambda *_: {"steady": False})
        ),
        "rank 3 wrote no record": run_of(
            folder / "killed", short(ONEBIT), edit=lambda rank, lines: [] if rank == 3 else lines[: 10 + rank]
        ),
        "the byte counts disagree": run_of(folder / "defect", short(DENSE), overcount=1.1),
    }
    faulty = {
        "Not checked: under faults the two counts differ": collect(silent),
        "<h2>Outer rounds</h2>": outer_run(folder / "none", alone),
        "noloco (3)": outer_run(folder / "many", replace(STORM, ranks=40), STORM_FAULTS),
        "a cut from b": outer_run(folder / "end", OuterPlan(every=1000), [nowhere]),
        "node3 slowed 2.0x": outer_run(folder / "long", OuterPlan(step_s=30.0), [slow]),
        "<h2>Faults</h2>": outer_run(folder / "gone", gone, [KILL], failure="node2 was killed at step 25"),
    }
    return {
        ("onebit_adam on four-50mbit",): [run_of(folder / "one", short(ONEBIT))],
        ("no step with a finite loss", "no network interfaces of their own"): [
            run_of(folder / "nan", short(DENSE), edit=NO_FINITE_LOSS, nic=False)
        ],
        tuple(lacking): [run_of(folder / "dense", short(DENSE)), *lacking.values()],
        ("No run finished",): [collect(folder / "nowhere", method="topk", failure="it could not be started")],
        ("0 runs",): [],
        ("dense on four",): [run_of(folder / "zero", short(DENSE), edit=change("step", lambda *_: {"loss": 0.0}))],
        tuple(faulty): [*faulty.values()],
    }


def test_odd_runs_are_drawn_too(tmp_path: Path) -> None:
    for said, runs in odd_runs(tmp_path).items():
        results = results_of(runs)
        drawn = draw(results)
        html = page(results, drawn)
        assert [text for text in said if text not in html] == []
        assert html.rstrip().endswith("</html>")
        assert len(readings(results)) == len(runs)
        has_rounds, has_faults = any(run.rounds for run in runs), any(run.faults for run in runs)
        assert ("<h2>Outer rounds</h2>" in html, "ms/round" in html) == (has_rounds, has_rounds)
        assert ("<h2>Faults</h2>" in html, "survivors" in html) == (has_faults, has_faults)
        assert ("faults" in drawn, "bytes" in drawn) == (has_faults, True)


def test_the_headline_is_the_largest_gain(results: Results, tmp_path: Path) -> None:
    assert headline(results).startswith("onebit_adam: steps 9.5x faster than dense, val loss ")
    diverged = run_of(tmp_path, short(DENSE), edit=NO_FINITE_LOSS)
    assert headline(results_of([results.runs[0], diverged])) == "dense, dense (2) on four-50mbit"


def test_a_gain_is_drawn_only_if_the_loss_is_the_same_and_the_time_is_less(results: Results) -> None:
    dense, fp16, onebit = results.runs
    level = {"val_loss": dense.val_loss}

    def said(run: RunResult, **changed: object) -> str | None:
        found = plots.gain(results_of([dense, run.model_copy(update=changed)]))
        return found and found[1]

    def taking(share: float) -> list[float]:
        return [share * s for s in dense.seconds]

    best = plots.gain(results_of([dense, fp16.model_copy(update=level), onebit.model_copy(update=level)]))
    assert best is not None
    assert best[0].name == "onebit_adam"
    assert said(onebit, **level, seconds=taking(0.25)) == "same loss in 1/4 of the time"
    assert said(onebit, **level, seconds=taking(0.33)) == "same loss in 1/3 of the time"
    assert said(onebit, **level, seconds=taking(0.29)) == "same loss in 29 % of the time"
    assert said(onebit, val_loss=(dense.val_loss or 0.0) * 1.008, seconds=taking(0.5)) == (
        "same loss (+0.8 %) in 1/2 of the time"
    )
    assert (said(onebit, val_loss=(dense.val_loss or 0.0) * 0.9) or "").startswith("lower loss (-10.0 %) in ")
    assert said(onebit, val_loss=(dense.val_loss or 0.0) * 1.011) is None
    assert said(onebit, val_loss=None) is None
    assert said(onebit, **level, status="failed") is None
    assert said(onebit, **level, steps=dense.steps - 1) is None
    assert said(onebit, **level, seconds=taking(0.95)) is None
    assert plots.gain(results_of([onebit])) is None


def test_the_picture_says_the_gain_and_each_ends_time(results: Results) -> None:
    runs = [run.model_copy(update={"val_loss": 2.5}) for run in results.runs]
    texts = texts_of(plots.loss_against_seconds(results_of(runs)))
    assert [text for text in texts if "same loss" in text] == [plots.gain(results_of(runs))[1]]  # type: ignore[index]
    for run in runs:
        assert f"{run.name}, {seconds_text(run.seconds[-1])}" in texts
    worse = [run.model_copy(update={"val_loss": 2.5 + 0.1 * k}) for k, run in enumerate(runs)]
    assert not [text for text in texts_of(plots.loss_against_seconds(results_of(worse))) if "same loss" in text]


def texts_of(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_no_texts_of_a_picture_overlap(storm: Results, results: Results) -> None:
    for shown in (results, storm):
        for name, figure in draw(shown).items():
            figure.draw_without_rendering()
            boxes = [text.get_window_extent() for axes in figure.axes for text in axes.texts if text.get_text()]
            assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])], name
            assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 + 1 for box in boxes), name


def test_a_method_has_its_colour_whatever_it_is_compared_with() -> None:
    few = drawing.colours([("dense", "dense"), ("onebit_adam", "onebit_adam")])
    names = ["dsgd", "onebit_adam", "dense", "ef", "noloco", "fp16", "x", "y"]
    many = drawing.colours([(name, name) for name in names])
    assert {name: many[name] for name in few} == few
    assert list(many.values()).count(drawing.DENSE_COLOUR) == 1
    assert len(set(many.values())) == len(names)
    twice = drawing.colours([("noloco", "noloco"), ("noloco (2)", "noloco")])
    assert twice["noloco"] == many["noloco"] != twice["noloco (2)"]


def test_the_glossary_is_folded(html: str) -> None:
    glossary = html[html.index("<details><summary>How to read it") :].partition("</details>")[0]
    assert "share of the steady steps" in glossary


def test_many_equal_nodes_share_a_box() -> None:
    nodes = [Node(name=f"node{i}", ranks=2, rate="1gbit" if i != 7 else "100mbit") for i in range(20)]
    boxes = sites(Cluster(name="big", nodes=nodes))[None]
    assert [(box[0].name, len(box)) for box in boxes] == [("node0", 7), ("node7", 1), ("node8", 12)]
    html = page(results_of([], Cluster(name="big", nodes=nodes)))
    assert "<b>node8 … node19</b>" in html


def test_parts_of_a_step_add_up(results: Results) -> None:
    for run in results.runs:
        assert sum(plots.step_parts(run)) == pytest.approx(run.step_s)
        assert min(plots.step_parts(run)) >= 0


def test_smoothing_keeps_gaps_and_means() -> None:
    assert plots.smooth([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    wide = plots.smooth([1.0] * 100 + [None] * 60)
    assert wide[:100] == [1.0] * 100
    assert all(value != value for value in wide[100:])
