"""`compare` and `run` with a stranger's script, of which three lines were changed."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import pytest
from launchers import ROOT, commopt_here, finish, start

STRANGER = ROOT / "tests/strangers/nanogpt.py"
CHANGED = {
    "import torch\n": "import commopt, torch\n",
    "optimizer = torch.optim.AdamW(optim_groups, lr=args.learning_rate, betas=(0.9, 0.95))\n": (
        "optimizer = torch.optim.AdamW(optim_groups, lr=args.learning_rate, betas=(0.9, 0.95))\n"
        'optimizer = (run := commopt.attach(model, "dgc", optimizer, max_norm=args.grad_clip)).optimizer\n'
    ),
    "        torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)\n": (
        "        run.log(loss=loss * args.gradient_accumulation_steps)\n"
    ),
}
SMALL = ("--n_layer", "1", "--n_embd", "32", "--block_size", "16", "--eval_interval", "4", "--out_dir", "kept")


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The script with three lines changed, beside a cluster of two nodes."""
    before = STRANGER.read_text()
    assert "commopt" not in before.partition('"""\n')[2]
    text = before
    for old, new in CHANGED.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    changes = [line for line in difflib.ndiff(before.splitlines(), text.splitlines()) if line[0] == "+"]
    assert len(changes) == 3
    (tmp_path / "cluster.yaml").write_text("nodes: 2\nlinks: {rate: 100mbit}\n")
    (tmp_path / "train.py").write_text(text)
    return tmp_path / "train.py"


def compare(script: Path, *words: str) -> list[dict[str, Any]]:
    """The runs of a comparison that ends well."""
    command = ["-m", "commopt", "compare", "train.py", "--cluster", "cluster.yaml", "--json", "found.json", *words]
    code, output, errors = finish(start(command, script.parent, cwd=script.parent))
    assert code == 0, output + errors
    assert " at end " in output
    runs: list[dict[str, Any]] = json.loads((script.parent / "found.json").read_text())["runs"]
    return runs


def test_a_script_under_ddp_is_compared_under_every_family_of_methods(script: Path) -> None:
    runs = compare(script, "--methods", "dense,onebit_adam,noloco", "--steps", "10", "--", *SMALL)
    assert [run["name"] for run in runs] == ["dense", "onebit_adam", "noloco"]
    for run in runs:
        assert (run["status"], run["steps"], run["steps_planned"]) == ("finished", 10, 10)
        assert run["train_loss"][-1] < run["train_loss"][0]
        assert run["compute_s"] > 0
    dense, onebit, noloco = runs
    assert onebit["train_loss"][:2] == pytest.approx(dense["train_loss"][:2])  # in the warm-up
    assert dense["payload_bytes_per_step"] == pytest.approx(4 * dense["parameters"], rel=1e-3)
    assert noloco["ranks"] == 2
    kept = sorted(path.name for path in (script.parent / "kept").iterdir())
    assert kept == ["ckpt0.pt", "ckpt1.pt"]  # its own checkpoints


def test_a_script_under_fsdp2_is_compared(script: Path) -> None:
    (script.parent / "cluster.yaml").write_text("nodes: 2\nslots: 2\nlinks: {rate: 100mbit}\n")
    (run,) = compare(script, "--methods", "two_way(int8)", "--steps", "5", "--", "--fsdp", *SMALL)
    assert (run["name"], run["status"], run["steps"], run["ranks"]) == ("two_way(int8)", "finished", 5, 4)
    assert run["train_loss"][-1] < run["train_loss"][0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.py", "--methods", "dense"], "train.py: --cluster is missing; write a cluster's file"),
        (["train.py", "--cluster", "cluster.yaml"], "train.py: --methods is missing; write it, as in --methods dense,"),
        (["trian.py", "--cluster", "cluster.yaml"], "trian.py: no such file"),
        (["train.py", "--cluster", "clutser.yaml", "--methods", "dense"], "cluster: 'clutser.yaml' does not exist"),
        (
            ["train.py", "--cluster", "cluster.yaml", "--methods", "dnse"],
            "unknown method 'dnse'; did you mean 'dense'?",
        ),
        (["run.yaml", "--cluster", "cluster.yaml"], "--cluster cluster.yaml: has no effect on run.yaml"),
        (["run.json", "--cluster", "cluster.yaml"], "--cluster cluster.yaml: has no effect on run.json"),
        (["run.yaml", "--", "--lr", "1"], "-- --lr 1: has no effect on run.yaml"),
    ],
)
def test_a_mistake_gets_one_line_before_anything_starts(
    words: list[str], message: str, script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(script.parent)
    code, output, errors = commopt_here("compare", *words)
    assert code == 2
    assert message in errors
    assert "Traceback" not in output + errors


def test_print_shows_what_tells_the_script_its_method(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(script.parent)
    words = ("train.py", "--cluster", "cluster.yaml", "--methods", "two_way(int8)", "--print", "--", "--lr", "1")
    code, output, _ = commopt_here("compare", *words)
    assert code == 0
    assert """'COMMOPT_METHOD={"name": "two_way(int8)"}'""" in output
    assert "COMMOPT_STEPS=100" in output
    assert "train.py --lr 1\n" in output
