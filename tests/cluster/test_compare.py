"""One training under several methods, from the YAML to the report, with real ranks."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from launchers import PROGRAMS, ROOT, commopt_here, finish, processes, start, wait_until

from commopt.cli.training import check_methods, check_outputs, chosen_methods, locked
from commopt.cluster.spec import load_run
from commopt.errors import ConfigError

RECORDING = str(PROGRAMS / "recorded_steps.py")
SMALL = "{steps: 16, layers: 1, heads: 2, width: 64, context: 32, batch: 2, validation-batches: 1}"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(folder: Path, *, methods: str, arguments: str = SMALL, program: str = "", faults: str = "[]") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "cluster.yaml").write_text("name: two\nnodes: 2\nlinks: {rate: 100mbit}\n")
    (folder / "run.yaml").write_text(
        f"name: small\ncluster: cluster.yaml\nprogram: {program or ROOT / 'launch/train.py'}\narguments: {arguments}\n"
        f"optimizer: {{name: adam, lr: 1e-2}}\nmethods: {methods}\nfaults: {faults}\n"
    )
    return folder / "run.yaml"


def commopt(folder: Path, *words: str) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    return finish(start(["-m", "commopt", *words], folder))


def test_a_comparison_leaves_its_report_and_counts_every_byte(tmp_path: Path) -> None:
    run = write(tmp_path, methods="{dense: {}, onebit_adam: {freeze_step: 5}}")
    code, output, errors = commopt(tmp_path, "compare", str(run), "--json", "copy.json")
    assert code == 0, output + errors
    results = json.loads((tmp_path / "copy.json").read_text())
    assert results == json.loads((tmp_path / "out/small/results.json").read_text())
    assert (tmp_path / "out/small/report.html").stat().st_size > 10_000
    dense, onebit = results["runs"]
    parameters, n = results["model"]["parameters"], 2
    assert dense["payload_bytes_per_step"] == pytest.approx(8 * (n - 1) / n * parameters, rel=1e-3)
    assert onebit["payload_bytes_per_step"] < 1.05 * 2 * (n - 1) / n / 8 * parameters
    for one in results["runs"]:
        assert one["steps"] == len(one["train_loss"]) == 16
        assert one["train_loss"][-1] < one["train_loss"][0]
        assert one["val_loss"] == pytest.approx(dense["val_loss"], rel=0.05)
        assert one["step_s"] > 0
        assert one["compute_s"] > 0
    if results["cluster"]["emulation"] == "netns":
        assert dense["nic_over_model"] == pytest.approx(1, abs=0.03)
        assert "defect" not in output
    else:
        assert dense["nic_over_model"] is None


MISTAKES = {
    "{dense: {}, onebit_adm: {}}": "onebit_adm: unknown method 'onebit_adm'; did you mean",
    "{ef_sign: {blok_size: 8}}": "ef_sign: unknown option 'blok_size'; did you mean",
    "{ef_sign: {block_size: 9}}": "ef_sign: block_size: 9 is out of range; write a positive multiple of 8",
    "{onebit_adam: {freeze_step: 16}}": "onebit_adam: freeze_step: the warm-up of 16 steps does not end before the last of 16",
    "{onebit_adam: {betas: [0.9, 1.0]}}": "onebit_adam: betas: is not an option of this method; set it on",
    "{dense: {optimizer: {name: sdg}}}": "dense: optimizer: name: unknown optimizer 'sdg'; did you mean 'sgd'?",
    "{dense: {optimizer: {name: sgd, lr: 0.1, momentun: 0.9}}}": "dense: optimizer: momentun: unknown argument of sgd; did you mean",
    "{onebit_adam: {optimizer: {name: sgd, momentum: 0.9}}}": "onebit_adam: optimizer: onebit_adam stands in for Adam or "
    "AdamW, not for SGD",
    "{dense: {optimizer: adam}}": "dense: optimizer: 'adam' is not a set of keys and values; write its name",
    "{dense: {optimizer: null}}": "dense: optimizer: is empty; write its name",
    "{dense: {optimizer: {lr: 1}}}": "dense: optimizer: {'lr': 1} has no name; write its name",
    "{dense: {optimizer: {name: [adam]}}}": "dense: optimizer: name: unknown optimizer ['adam']",
    "{dense: {optimizer: {name: adam, 5: 1}}}": "dense: optimizer: 5: unknown argument of adam",
    "{dense: {optimizer: {name: adam, lr: 0.1, betas: [0.9]}}}": "dense: optimizer: betas: [0.9] is refused by Adam: "
    "list index out of range; write another value",
    "{dense: {optimizer: {name: adam, lr: 0.1, foreach: true, fused: true}}}": "dense: optimizer: foreach, fused: True, True "
    "is refused by Adam: `fused` and `foreach` cannot be",
}


@pytest.mark.parametrize("methods", MISTAKES)
def test_a_mistake_in_a_method_names_file_key_value_and_fix(tmp_path: Path, methods: str) -> None:
    run = load_run(write(tmp_path, methods=methods))
    with pytest.raises(ConfigError) as caught:
        check_methods(run, chosen_methods(run, []))
    assert str(caught.value).startswith(f"run.yaml: methods.{MISTAKES[methods]}")
    assert len(str(caught.value).splitlines()) == 1


def test_a_program_may_take_no_steps(tmp_path: Path) -> None:
    check_methods(run := load_run(write(tmp_path, methods="{onebit_adam: {}}", arguments="{}")), run.methods)


UNWRITABLE = {
    "--json nowhere/copy.json": "folder TMP/nowhere does not exist; create it, or write",
    "--json folder": "is a folder; write the name of a file",
    "--json file/copy.json": "folder TMP/file does not exist; create it, or write",
    "--json /proc/copy.json": "/proc cannot be written: no such file or directory",
    "--out TMP/file": "TMP/file is not a folder; remove it, or write another folder",
    "--out TMP/file/below": "TMP/file is not a folder; remove it, or write another folder",
    "--out /proc/below": "/proc cannot be written: no such file or directory",
    "--out TMP/page": "TMP/page/report.html is a folder; remove it, or write another folder",
    "--out TMP/record": "TMP/record/record/dense is not a folder; remove it, or write another",
    "--out TMP/link": "TMP/link/log/dense is a link; remove it, or write another folder",
}


@pytest.mark.parametrize("words", UNWRITABLE)
def test_what_cannot_be_written_is_told_before_the_training(tmp_path: Path, words: str) -> None:
    for folder in ("folder", "page/report.html", "record/record", "link/log"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "link/log/dense").symlink_to(tmp_path / "folder")
    for file in ("file", "record/record/dense"):
        (tmp_path / file).touch()
    before = sorted(tmp_path.rglob("*"))
    given, complaint = (text.replace("TMP", str(tmp_path)) for text in (words, UNWRITABLE[words]))
    option, path = given.split(" ", 1)
    places = (tmp_path / "out", Path(path)) if option == "--json" else (Path(path), None)
    with pytest.raises(ConfigError) as caught:
        check_outputs(["dense"], *places)
    assert str(caught.value).startswith(f"{given}: {complaint}")
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_results_may_go_where_the_report_goes(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    for place in (out, out.parent, tmp_path):
        check_outputs(["dense"], out, place / "copy.json")
    assert not list(tmp_path.iterdir())


def test_results_of_two_runs_do_not_mix(tmp_path: Path) -> None:
    wanted = f"--out {tmp_path}/out: another commopt is writing there; wait"
    with locked(tmp_path / "out"), pytest.raises(ConfigError, match=wanted), locked(tmp_path / "out"):
        pass
    with locked(tmp_path / "out"):
        pass


CUT = "run.yaml: faults.0.cut: needs links that the kernel emulates, and here they are not (--emulate paced); add "
NO_EFFECT = "has no effect where this machine runs all nodes; leave it out"
NO_NAME = "a name is empty; write NAME,NAME,... as in dense,fp16"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["compare", "RUN", "--methods", ","], f"--methods ',': {NO_NAME}"),
        (["compare", "RUN", "--methods", "dense,,fp16"], f"--methods 'dense,,fp16': {NO_NAME}"),
        (["compare", "RUN", "--methods", ""], f"--methods '': {NO_NAME}"),
        (["run", "RUN", "--method", ""], "--method '': the name is empty; write one, as in dense"),
        (["run", "RUN", "--node", "nosuch"], f"--node nosuch: {NO_EFFECT}"),
        (["run", "RUN", "--node", "node0", "--print"], f"--node node0: {NO_EFFECT}"),
        (["compare", "RUN", "--node", "nosuch"], f"--node nosuch: {NO_EFFECT}"),
        (["launch", "CLUSTER", "--node", "nosuch", "--", "true"], f"--node nosuch: {NO_EFFECT}"),
        (["launch", "nope.yaml", "--", "hostname"], "nope.yaml: no such file"),
        (["launch", "CLUSTER", "--", "nope.py"], "nope.py: no such file"),
        (["launch", "CLUSTER", "--", "no-such-program"], "no-such-program: no such program"),
        (["compare", "RUN", "--methods", "dense,onebit_adm"], "run.yaml: methods.onebit_adm: unknown method"),
        (["run", "BAD", "--method", "dense"], "run.yaml: methods.ef_sign: unknown option 'blok_size'"),
        (["run", "RUN", "--json", "nowhere/copy.json"], "--json nowhere/copy.json: folder "),
        (["run", "CUT", "--emulate", "paced"], CUT),
        (["run", "CUT", "--emulate", "paced", "--print"], CUT),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_made(tmp_path: Path, words: list[str], complaint: str) -> None:
    cut = write(tmp_path / "cut", methods="{dense: {}}", faults="[{at_step: 4, cut: [node0, node1]}]")
    bad = write(tmp_path / "bad", methods="{dense: {}, ef_sign: {blok_size: 8}}")
    run = write(tmp_path, methods="{dense: {}}")
    files = {"RUN": str(run), "BAD": str(bad), "CLUSTER": str(tmp_path / "cluster.yaml"), "CUT": str(cut)}
    # --emulate none: should the mistake go unseen, namespaces would run this whole pytest again
    words = [words[0], "--emulate", "none", *(files.get(word, word) for word in words[1:])]
    code, output, errors = commopt_here(*words)
    (told,) = (line for line in errors.splitlines() if not re.search(r", \d+ s$", line))  # a busy machine says so
    assert (code, output) == (2, "")
    assert told.startswith(f"commopt: {complaint}")
    assert not (tmp_path / "out").exists()


def program_with(folder: Path, line: str) -> str:
    """A program that records steps, with one line of Python before it; without torch, whose import takes long."""
    path = folder / "train.py"
    path.write_text(
        f"import os, pathlib, runpy, sys, time\n{line}\nrunpy.run_path({RECORDING!r}, run_name='__main__')\n"
    )
    return str(path)


def test_ctrl_c_keeps_the_methods_that_finished(tmp_path: Path, mark: str) -> None:
    line = (
        f"if 'fp16' in os.environ['COMMOPT_METHOD']: pathlib.Path({str(tmp_path)!r}, '{mark}').touch(); time.sleep(300)"
    )
    run = write(tmp_path, methods="{dense: {}, fp16: {}, ef_sign: {}}", program=program_with(tmp_path, line))
    words = ["-m", "commopt", "compare", str(run), "--emulate", "none"]
    process = start([*words, "--out", str(tmp_path / "out"), "--json", str(tmp_path / "copy.json")], tmp_path)
    wait_until((tmp_path / mark).exists, "the second method")
    process.send_signal(signal.SIGINT)
    code, output, errors = finish(process)
    assert code == 130
    assert errors.splitlines()[-1] == "commopt: interrupted by Ctrl-C; all that was started has ended"
    assert "Traceback" not in output + errors
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results == json.loads((tmp_path / "copy.json").read_text())
    assert [(one["name"], one["status"]) for one in results["runs"]] == [("dense", "finished")]
    assert results["cluster"]["notices"] == ["ended early, without fp16, ef_sign"]
    assert (tmp_path / "out/report.html").stat().st_size > 10_000
    assert not processes(str(tmp_path))


def test_a_run_that_fails_is_told_once_the_next_one_still_runs_and_a_lost_report_leaves_the_table(
    tmp_path: Path,
) -> None:
    page = tmp_path / "out/report.html"
    line = (
        f"pathlib.Path({str(page)!r}).mkdir(exist_ok=True)\n"
        "if 'fp16' in os.environ['COMMOPT_METHOD'] and os.environ['RANK'] == '1': raise ValueError('rank one gives up')"
    )
    run = write(tmp_path, methods="{fp16: {}, dense: {}}", program=program_with(tmp_path, line))
    words = ["compare", str(run), "--emulate", "none", "--out", "out", "--json", "copy.json"]
    code, output, errors = commopt(tmp_path, *words)
    assert code == 1
    assert (output + errors).count("Traceback (most recent call last)") == 1
    assert "ChildFailedError" not in output + errors
    runs: list[dict[str, Any]] = json.loads((tmp_path / "copy.json").read_text())["runs"]
    assert [one["status"] for one in runs] == ["failed", "finished"]
    assert "rank 1" in runs[0]["failure"]
    assert runs[1]["nic_over_model"] is None
    assert errors.splitlines()[-1] == f"commopt: {page}: cannot be written: is a directory"
    assert "val loss" in output


def test_a_planned_kill_ends_a_method_that_needs_every_rank_by_name(tmp_path: Path) -> None:
    faults = "[{at_step: 4, kill: node1}, {at_step: 9, restart: node1}]"
    run = write(tmp_path, methods="{dense: {}}", arguments="{steps: 500}", program=RECORDING, faults=faults)
    code, output, errors = commopt(tmp_path, "run", str(run), "--emulate", "none", "--json", "copy.json")
    assert code == 1
    assert "dense: fault at step 4: node1 killed\n" in output
    assert "node1 was killed at step 4, as the run's faults say; dense needs every rank, and ends with it" in output
    (one,) = json.loads((tmp_path / "copy.json").read_text())["runs"]
    assert one["status"] == "failed"
    assert not [word for word in ("SIGKILL", "was not reached") if word in output + errors]


def test_print_shows_the_commands_of_every_node_and_starts_nothing(tmp_path: Path) -> None:
    run = write(tmp_path, methods="{dense: {}}")
    code, output, _ = commopt_here("run", str(run), "--print")
    assert code == 0
    assert output.count("torch.distributed.run") == 2
    assert """COMMOPT_METHOD={"name": "dense"}""" in output
    assert not (tmp_path / "out").exists()
