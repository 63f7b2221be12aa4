"""What the command lines in scripts/bench share: options, checks, stored cells, and where results are written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from script import module

from commopt.errors import ConfigError

NAMES = ("codec_costs", "convergence", "outer", "step", "sync", "wire")
BENCHMARKS = {name: module(name) for name in NAMES}
command, sheets, Store = module("command"), module("sheets"), module("store").Store


def run(name: str, words: list[str]) -> int | None:
    bench = BENCHMARKS[name]
    code: int | None = bench.run(bench.parser().parse_args(words))
    return code


@pytest.mark.parametrize(
    ("name", "words", "complaint"),
    [
        *((name, ["--table", "--redo"], "--redo: has no effect with --table; leave one of them out") for name in NAMES),
        *((name, ["--markdown", "--redo"], "--redo: has no effect with --markdown") for name in NAMES),
        *(
            (name, ["--json", "/no/at/all.json"], "--json /no/at/all.json: folder /no/at does not exist")
            for name in NAMES
        ),
        *((name, ["--jobs", "0"], "--jobs 0: write a number from 1") for name in ("convergence", "outer")),
        ("codec_costs", ["--only", "nolooco"], "--only nolooco: matches no cell; a cell is named like dense"),
        ("codec_costs", ["--quick", "--redo"], "--redo: has no effect with --quick"),
        ("convergence", ["--only", "onebit_adan"], "--only: unknown name 'onebit_adan'; did you mean 'onebit_adam'"),
        ("convergence", ["--task", "imagenet"], "--task: unknown name 'imagenet'"),
        ("convergence", ["--long-seeds", "6"], "--long-seeds 6: write a number from 1 to 5"),
        ("convergence", ["--seeds", "0"], "--seeds 0: write a number from 1 to 5"),
        ("convergence", ["--quick", "--task", "gpt_long"], "--task: long runs are left out by --quick"),
        ("outer", ["--only", "nolooco"], "--only: unknown name 'nolooco'; did you mean 'noloco'"),
        ("outer", ["--ranks", "5"], "--ranks: unknown name '5'"),
        ("step", ["--methods", "densee"], "--methods: unknown name 'densee'; did you mean 'dense'"),
        ("step", ["--methods", "dense,dense"], "--methods: duplicate name 'dense'"),
        ("step", ["--clusters", "10tbit"], "--clusters: unknown name '10tbit'"),
        ("step", ["--models", ""], "--models: unknown name ''"),
        ("step", ["--methods", "dense", "--only", "16"], "--only 16: matches no cell; a cell is named like 50mbit-1m-"),
        ("step", ["--timeout", "0"], "--timeout 0.0: write a number of seconds above 0"),
        ("step", ["--seconds", "5"], "--seconds 5.0: write a number above 0, with --race"),
        ("step", ["--race", "--seconds", "0"], "--seconds 0.0: write a number above 0"),
        ("step", ["--race", "--methods", "torch_dpp"], "--methods: unknown name 'torch_dpp'; did you mean 'torch_ddp'"),
        ("sync", ["--redo", "--quick"], "--redo: "),
        ("sync", ["--quick", "--only", "8-*"], "--only: "),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    name: str, words: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)  # should a mistake go unseen
    with pytest.raises(ConfigError) as caught:
        run(name, words)
    assert str(caught.value).startswith(complaint)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_stored_is_said(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not run(name, ["--table", "--results", str(tmp_path / "none.jsonl")])
    assert "nothing is stored yet" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["codec_costs", "convergence", "outer", "step", "sync"])
def test_the_page_says_what_is_stored(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert not run(name, ["--markdown", *["--race"] * (name == "step")])
    page = BENCHMARKS[name].PAGE
    text = page.read_text(encoding="utf-8")
    assert sheets.with_tables(text, capsys.readouterr().out.removesuffix("\n"), f"{name}.py") == text, (
        f"run {name}.py --page"
    )
    assert name == "codec_costs" or page.with_suffix(".png").is_file()


def test_a_method_may_be_named_with_its_codecs() -> None:
    given = "dense, two_way(sign, int8),two_way"
    known = ["two_way", "dense"]
    assert command.names("--methods", given, known) == ["dense", "two_way(sign,int8)", "two_way"]
    assert command.names("--methods", None, known) == known


def test_cells_are_chosen_by_patterns() -> None:
    cells = [Path(name) for name in ("50mbit-1m-dense", "50mbit-5m-torch_ddp", "unshaped-1m-dense")]
    assert command.matching("50mbit-*-torch_*, unshaped-*", cells) == cells[1:]
    assert command.matching(None, cells) == cells


def test_a_mistake_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["scripts/bench/step.py", "--table", "--methods", "nosuch"])
    bench = BENCHMARKS["step"]
    with pytest.raises(SystemExit) as ended:
        command.main(bench.parser(), bench.run)
    output, errors = capsys.readouterr()
    assert (ended.value.code, output, len(errors.splitlines())) == (2, "", 1)
    assert errors.startswith("step.py: --methods: unknown name 'nosuch'")


def test_tables_are_written_between_the_marks_of_a_page() -> None:
    other = "<!-- written by scripts/bench/outer_x.py --page -->\nkept\n<!-- end -->\n"
    page = f"# Title\n{other}<!-- written by scripts/bench/x.py --page -->\nold\n<!-- end -->\nafter\n{other}"
    made = sheets.Sheet("Losses", ("method", "loss"), [["dense", "2.0"]], left=("method",))
    text = sheets.markdown([made], ["a remark"])
    assert text == "**Losses**\n\n| method | loss |\n| --- | ---: |\n| dense | 2.0 |\n\n- a remark"
    assert sheets.with_tables(page, text, "x.py") == page.replace("old", text)


def test_a_page_without_its_marks_is_refused() -> None:
    with pytest.raises(ConfigError, match="are missing"):
        sheets.with_tables("# Nothing here\n", "", "outer.py")


def test_a_cell_is_found_by_its_name_and_settings(tmp_path: Path) -> None:
    store = Store(tmp_path / "made" / "cells.jsonl")
    store.put("a", {"betas": (0.9, 0.95)}, {"loss": 2.0})
    store.put("b", {}, {"loss": None})
    again = Store(store.file)
    assert again.get("a", {"betas": [0.9, 0.95]}) == {"name": "a", "settings": {"betas": [0.9, 0.95]}, "loss": 2.0}
    assert again.get("a", {"betas": [0.9, 0.9]}) is None
    assert again.get("a")["loss"] == 2.0
    assert again.get("c") is None
    assert again.names == ["a", "b"]


def test_a_cell_replaces_the_one_of_its_name(tmp_path: Path) -> None:
    store, other = (Store(tmp_path / "cells.jsonl") for _ in range(2))
    store.put("a", {"steps": 1}, {})
    other.put("b", {}, {})  # by another program
    store.put("a", {"steps": 2}, {})
    assert [json.loads(line)["name"] for line in store.file.read_text().splitlines()] == ["a", "b"]
    assert Store(store.file).get("a", {"steps": 2}) is not None
    assert [file.name for file in tmp_path.iterdir()] == ["cells.jsonl"]


def test_a_cell_to_redo_counts_once_it_is_stored_anew(tmp_path: Path) -> None:
    file = tmp_path / "cells.jsonl"
    Store(file).put("gpt-adam-1", {}, {})
    store = Store(file, redo=["gpt-adam-*"])
    assert store.get("gpt-adam-1") is None
    store.put("gpt-adam-1", {}, {})
    assert store.get("gpt-adam-1") is not None


def test_a_broken_line_is_no_cell_and_an_interrupted_put_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cells.jsonl"
    Store(file).put("a", {}, {"loss": 2.0})
    file.write_text(file.read_text() + '{"name": "b", "loss"')
    store, before = Store(file), file.read_text()
    assert store.names == ["a"]

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.put("a", {}, {"loss": 3.0})
    assert file.read_text() == before
