"""`commopt advise`: which method it names, when it says no, and what it says to wrong input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from probe_file import probe_file
from typer.testing import CliRunner

from commopt.cli.app import app
from commopt.plan.links import parse_rate

CLUSTER = "name: lab\nnodes: 4\nlinks: {rate: 50mbit}\n"


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    path = tmp_path / "lab.yaml"
    path.write_text(CLUSTER)
    return path


def advise(*words: object) -> str:
    """What the command prints."""
    result = CliRunner().invoke(app, ["advise", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.output


def advice(cluster: Path, *words: object) -> Any:
    """The JSON that it writes."""
    file = cluster.with_name("advice.json")
    advise(cluster, "--json", file, *words)
    return json.loads(file.read_text())


def test_a_slow_link_gets_a_method_that_is_predicted_to_gain(cluster: Path) -> None:
    found = advice(cluster, "--parameters", "1.07M", "--step", "70ms")
    rows = {row["name"]: row for row in found["methods"]}
    assert found["method"] == "onebit_adam"
    assert rows["dense"]["gain"] == 1
    assert rows["dense"]["step_s"] == pytest.approx(0.070 + 6.42e6 / (0.85 * parse_rate("50mbit")), rel=0.1)
    for row in rows.values():
        assert row["step_low_s"] <= row["step_s"] <= row["step_high_s"]
        assert row["step_s"] >= 0.070


@pytest.mark.parametrize(
    ("rate", "parameters", "step"), [("100gbit", "10M", "2s"), ("1gbit", "10k", "70ms"), ("50mbit", "1M", "60s")]
)
def test_it_says_no_to_a_fast_link_a_small_model_and_a_long_step(
    cluster: Path, rate: str, parameters: str, step: str
) -> None:
    cluster.write_text(CLUSTER.replace("50mbit", rate))
    text = advise(cluster, "--parameters", parameters, "--step", step)
    assert "Your network is not the bottleneck: change nothing." in text
    assert "attach" not in text


def test_one_machine_has_nothing_to_send(cluster: Path) -> None:
    cluster.write_text(CLUSTER.replace("nodes: 4", "nodes: 1"))
    assert "There is one machine" in advise(cluster, "--parameters", "1e9", "--step", "1s")


def test_only_methods_asked_for_are_named(cluster: Path) -> None:
    found = advice(cluster, "--parameters", "1e6", "--step", "70ms", "--methods", "fp16,two_way(int8)")
    assert found["method"] == "two_way(int8)"
    assert [row["name"] for row in found["methods"]] == ["dense", "fp16", "two_way(int8)"]


def test_the_rate_for_a_target_is_one_at_which_it_is_met(cluster: Path) -> None:
    words = ("--parameters", "1e6", "--step", "1s", "--methods", "fp16")
    found = advice(cluster, *words, "--target", "0.9")
    needed = found["methods"][1]["needed_bits_per_s"]
    cluster.write_text(CLUSTER.replace("50mbit", f"{needed / 1e3:.1f}kbit"))
    again = advice(cluster, *words)
    assert again["compute_s"] / again["methods"][1]["step_s"] == pytest.approx(0.9, abs=0.002)


def test_flops_and_tokens_stand_for_a_step(cluster: Path) -> None:
    found = advice(cluster, "--parameters", "1e9", "--flops", "1e14", "--tokens", "16384")
    assert found["compute_s"] == pytest.approx(6 * 1e9 * 16384 / 1e14)


def test_a_model_is_counted(cluster: Path) -> None:
    file = cluster.with_name("train.py")
    file.write_text(
        "from __future__ import annotations\nimport dataclasses, torch\n"
        "@dataclasses.dataclass\nclass Sizes:\n    width: int = 10\n"
        "def build_model():\n    return torch.nn.Linear(Sizes().width, 10)\n"
    )
    assert advice(cluster, "--model", f"{file}:build_model", "--step", "1s")["parameters"] == 110


def test_a_page_and_a_picture_are_written(cluster: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    advise(cluster, "--parameters", "1.07M", "--step", "70ms", "--target", "0.5", "--out", out)
    page = (out / "advice.html").read_text()
    assert "Take onebit_adam" in page
    assert "commopt.attach(model, &#34;onebit_adam&#34;, optimizer)" in page
    assert (out / "advice.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "advice.json").read_text())["method"] == "onebit_adam"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--step", "1s"], "--parameters: is missing"),
        (["--parameters", "1e9"], "--step: is missing"),
        (["--parameters", "-5", "--step", "1s"], "--parameters '-5': is not a positive number"),
        (["--parameters", "1e9", "--step", "0.8"], "--step '0.8': is not a time"),
        (["--parameters", "1e9", "--step=-1s"], "--step '-1s': is not a time"),
        (["--parameters", "1e9", "--step", "0s"], "--step 0s: is out of range"),
        (["--parameters", "1e9", "--flops", "1e14"], "--tokens: is missing"),
        (["--parameters", "1e9", "--step", "1s", "--tokens", "5"], "--tokens: has no effect"),
        (["--parameters", "1e9", "--step", "1s", "--target", "1.5"], "--target 1.5: write a share"),
        (["--parameters", "1e9", "--step", "1s", "--methods", "fp61"], "unknown method 'fp61'; did you mean 'fp16'?"),
        (["--parameters", "1e9", "--model", "x.py:f", "--step", "1s"], "--parameters 1e9: has no effect with --model"),
        (["--model", "nothing.py:f", "--step", "1s"], "nothing.py: no such file"),
        (["--model", "train", "--step", "1s"], "write a file and a function"),
        (["--parameters", "1e9", "--step", "1s", "--probe", "none.json"], "none.json: no such file"),
    ],
)
def test_wrong_input_gets_one_line(cluster: Path, words: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["advise", str(cluster), *words])
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert said in result.stderr


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import nothing_of_that_name\n", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("def build_modle():\n    pass\n", "has no function 'build_model'; did you mean 'build_modle'?"),
        ("def build_model():\n    raise ValueError('no data')\n", "ValueError: no data"),
        ("def build_model():\n    return 3\n", "AttributeError"),
    ],
)
def test_a_model_that_cannot_be_built_gets_one_line(cluster: Path, source: str, said: str) -> None:
    file = cluster.with_name("broken.py")
    file.write_text(source)
    result = CliRunner().invoke(app, ["advise", str(cluster), "--model", f"{file}:build_model", "--step", "1s"])
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("nodes", "rate", "said"),
    [
        ("[a, c]", "80mbit", "was measured on a, b with 1 ranks each, and the cluster has a, c with 1 ranks each"),
        ("[a, b]", "1gbit", "the link of a was 80 Mbit/s when it was measured, and is 1 Gbit/s now"),
    ],
)
def test_a_probe_of_another_cluster_is_refused(cluster: Path, nodes: str, rate: str, said: str) -> None:
    costs = {"exchange": [[1000, 0.0]], "step": [[1000, 0.0]]}
    probe = cluster.with_name("probe.json")
    probe.write_text(json.dumps(probe_file([[1000, 0.002, 0.0]], {"dense": costs})))
    cluster.write_text(f"nodes: {nodes}\nlinks: {{rate: {rate}}}\n")
    words = ["--parameters", "1e6", "--step", "1s", "--probe", str(probe)]
    result = CliRunner().invoke(app, ["advise", str(cluster), *words])
    assert result.exit_code == 2
    assert said in result.stderr


def test_links_without_a_rate_cannot_be_advised_on(cluster: Path) -> None:
    cluster.write_text("nodes: 4\n")
    result = CliRunner().invoke(app, ["advise", str(cluster), "--parameters", "1e9", "--step", "1s"])
    assert result.exit_code == 2
    assert "links.rate: is missing" in result.stderr


def test_it_does_not_import_torch(cluster: Path) -> None:
    code = "import sys; from commopt.cli import app; app.app(sys.argv[1:], standalone_mode=False); sys.exit('torch' in sys.modules)"
    words = ["advise", cluster, "--parameters", "1e9", "--step", "1s", "--target", "0.9"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Take onebit_adam" in done.stdout
