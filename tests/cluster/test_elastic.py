"""A training that dies under `torchrun --max-restarts` continues from its checkpoint, residuals included."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launchers import PROGRAMS, ROOT, all_have_ended, drive, finish, result, start
from safetensors.torch import load_file
from torch import Tensor

from commopt.cluster.machine import free_ports
from commopt.cluster.network import address

OURS = ["GLOO_SOCKET_IFNAME", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
OURS += [f"COMMOPT_{name}" for name in ("JOB", "MTU", "NIC", "NODE", "NODE_RANK", "RECORD")]
TRAINING = ["--method", "onebit_adam", "--options", '{"freeze_step": 4}', "--steps", "12", "--every", "3"]


def undisturbed(folder: Path, scratch: Path) -> list[subprocess.Popen[str]]:
    """The same training as two bare ranks, without torchrun and without failures."""
    (port,) = free_ports(1)
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    words = [str(ROOT / "launch/elastic_train.py"), "--checkpoints", str(folder), *TRAINING]
    return [start(words, scratch, RANK=str(rank), OMP_NUM_THREADS="1", **job) for rank in range(2)]


def on_each_node(folder: Path, flag: Path, mark: str) -> list[list[str]]:
    """launch/torchrun.sh as it is run by hand on two machines, which have nothing from commopt's launcher."""
    commands = []
    for node in range(2):
        place = [f"HEAD={address(0)}", "NODES=2", f"NODE={node}", "RESTARTS=1", "OMP_NUM_THREADS=1"]
        cleared = [*(word for name in OURS for word in ("-u", name)), "PYTHON=python"]
        script = [str(ROOT / "launch/torchrun.sh"), str(PROGRAMS / "dying.py"), str(flag), "--checkpoints", str(folder)]
        commands.append(["env", *cleared, *place, f"JOB={mark}", *script, *TRAINING])
    return commands


def everything(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint: parameters, optimizer, and each rank's own residuals and random state."""
    files = sorted(folder.glob("*.safetensors"))
    assert [file.stem for file in files] == ["rank0", "rank1", "shared"]
    return {f"{file.stem} {key}": x for file in files for key, x in load_file(file).items()}


@pytest.mark.timeout(300)  # torchrun starts the ranks twice
@pytest.mark.usefixtures("namespaces")
def test_a_killed_rank_costs_steps_and_changes_nothing(write: Callable[[str], Path], mark: str, tmp_path: Path) -> None:
    cluster, logs, saved = write("nodes: 2\nlinks: {rate: 500mbit}"), tmp_path / "logs", tmp_path / mark
    commands = on_each_node(saved / "killed", tmp_path / "flag", mark)
    job = drive(cluster, "netns", mark, commands, log_dir=str(logs))
    others = undisturbed(saved / "undisturbed", tmp_path)
    ended = [finish(rank, 200) for rank in others]
    assert result(job)["ok"]
    said = (logs / "node0.log").read_text().splitlines()  # the launcher itself shows nothing after a failure
    assert [line for line in said if line.startswith("begins")] == ["begins at step 0 of 12", "begins at step 6 of 12"]
    assert (tmp_path / "flag").exists()
    assert [code for code, _, _ in ended] == [0, 0], ended
    (expected,) = re.findall(r"done: .*", ended[0][1])
    assert [line for line in said if line.startswith("done")] == [expected]
    kept = [os.listdir(saved / name) for name in ("killed", "undisturbed")]
    assert kept == [["step-12"], ["step-12"]]
    ours, theirs = (everything(saved / name / "step-12") for name in ("killed", "undisturbed"))
    assert ours.keys() == theirs.keys()
    assert any(bool(x.any()) for key, x in ours.items() if key.startswith("rank"))  # residuals travel too
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert any("moment" in key or "exp_avg" in key for key in ours if key.startswith("shared")), list(ours)
    all_have_ended(mark)
