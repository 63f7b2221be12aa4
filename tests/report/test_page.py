from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import CLUSTER, DENSE, FP16, ONEBIT, results_of, run_of, short

from commopt.errors import LaunchError
from commopt.report import drawing, plots
from commopt.report.page import headline, page, sites, write_report
from commopt.report.results import Cluster, Node, Results, RunResult, collect

Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("runs")
    return results_of([run_of(folder, short(plan)) for plan in (DENSE, FP16, ONEBIT)])


def no_steady(_: int, lines: Lines) -> Lines:
    return [
        {**line, "steady": False} if line["kind"] == "step" else line for line in lines if line["kind"] != "counters"
    ]


def no_finite_loss(_: int, lines: Lines) -> Lines:
    return [{**line, "loss": None} if "loss" in line else line for line in lines]


def killed(rank: int, lines: Lines) -> Lines:
    return [] if rank == 3 else lines[: 10 + rank]


def odd_runs(folder: Path) -> dict[str, list[RunResult]]:
    """Sets of runs that lack something."""
    dense = run_of(folder / "dense", short(DENSE))
    return {
        "one method": [run_of(folder / "one", short(ONEBIT))],
        "not one steady step": [dense, run_of(folder / "warm", short(ONEBIT), edit=no_steady)],
        "no finite loss": [run_of(folder / "nan", short(DENSE), edit=no_finite_loss)],
        "killed": [dense, run_of(folder / "killed", short(ONEBIT), edit=killed)],
        "nothing": [collect(folder / "nowhere", method="topk", failure="it could not be started")],
        "no interfaces": [run_of(folder / "paced", short(DENSE), nic=False)],
        "defect": [run_of(folder / "defect", short(DENSE), overcount=1.1)],
        "no run": [],
    }


def test_everything_is_written_and_nothing_else(results: Results, tmp_path: Path) -> None:
    paths = write_report(results, tmp_path / "out")
    assert sorted(path.name for path in paths) == [
        "bytes.png", "loss_seconds.png", "loss_steps.png", "report.html", "results.json", "step_time.png",
    ]  # fmt: skip
    assert sorted(paths) == sorted((tmp_path / "out").iterdir())
    assert Results.model_validate_json((tmp_path / "out" / "results.json").read_bytes()) == results
    assert (tmp_path / "out" / "bytes.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_takes_the_place_of_an_older_one(results: Results, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("older")
    write_report(results, tmp_path)
    assert "older" not in (tmp_path / "report.html").read_text()[:100]


class Addresses(HTMLParser):
    """Collects what a page would load, and the tags that are open."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "data", "action")]
        self.ids += [value or "" for key, value in attrs if key == "id"]


def test_the_page_needs_no_network(results: Results) -> None:
    html = page(results)
    addresses = Addresses()
    addresses.feed(html)
    assert [address for address in addresses.found if not address.startswith("#")] == []
    assert not {"script", "link", "iframe", "img"} & addresses.tags
    assert re.findall(r"url\((?!#)", html) == []
    assert "@import" not in html


def test_the_pictures_on_the_page_do_not_share_ids(results: Results) -> None:
    addresses = Addresses()
    addresses.feed(page(results))
    assert len(addresses.ids) == len(set(addresses.ids))
    assert {address[1:] for address in addresses.found} <= set(addresses.ids)


def test_a_file_that_cannot_be_written_is_named(results: Results, tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(
        LaunchError, match=rf"^{re.escape(str(tmp_path))}/report\.html: cannot be written: is a directory$"
    ):
        write_report(results, tmp_path)
    assert Results.model_validate_json((tmp_path / "results.json").read_bytes()) == results
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "results.json"]


def test_the_page_follows_light_and_dark(results: Results) -> None:
    html = page(results)
    assert "prefers-color-scheme: dark" in html
    body = html[html.index("<body>") :]
    assert not [colour for colour in drawing.DARK if colour in body]


def test_what_users_named_is_escaped(results: Results) -> None:
    evil = CLUSTER.model_copy(update={"name": "<script>alert(1)</script>", "notices": ["a < b"]})
    html = page(results.model_copy(update={"cluster": evil}))
    assert "<script>" not in html
    assert "a &lt; b" in html


def test_the_page_says_what_went_wrong(tmp_path: Path) -> None:
    runs = odd_runs(tmp_path)
    assert "the byte counts disagree" in page(results_of(runs["defect"]))
    assert "rank 3 wrote no record" in page(results_of(runs["killed"]))
    assert "no network interfaces of their own" in page(results_of(runs["no interfaces"]))


def test_odd_runs_are_drawn_and_written_too(tmp_path: Path) -> None:
    for runs in odd_runs(tmp_path).values():
        results = results_of(runs)
        assert page(results).rstrip().endswith("</html>")
        for draw in plots.PLOTS.values():
            assert drawing.svg(draw(results), "x").startswith("<svg")


def test_the_headline_is_the_largest_gain(results: Results, tmp_path: Path) -> None:
    assert headline(results).startswith("onebit_adam: steps 9.5x faster than dense, val loss ")
    runs = odd_runs(tmp_path)
    assert headline(results_of(runs["one method"])) == "onebit_adam on four-50mbit"
    assert headline(results_of(runs["nothing"])) == "No run finished"
    assert headline(results_of([runs["killed"][0], runs["no finite loss"][0]])) == "dense, dense (2) on four-50mbit"


def test_many_equal_nodes_share_a_box() -> None:
    nodes = [Node(name=f"node{i}", ranks=2, rate="1gbit" if i != 7 else "100mbit") for i in range(20)]
    boxes = sites(Cluster(name="big", nodes=nodes))[None]
    assert [(box.name, box.nodes) for box in boxes] == [("node0 … node6", 7), ("node7", 1), ("node8 … node19", 12)]


def test_parts_of_a_step_add_up(results: Results) -> None:
    for run in results.runs:
        assert sum(plots.step_parts(run)) == pytest.approx(run.step_s)
        assert min(plots.step_parts(run)) >= 0


def test_smoothing_keeps_gaps_and_means() -> None:
    assert plots.smooth([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    wide = plots.smooth([1.0] * 100 + [None] * 60)
    assert wide[:100] == [1.0] * 100
    assert all(value != value for value in wide[100:])
