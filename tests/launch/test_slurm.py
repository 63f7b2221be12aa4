"""launch/slurm.sbatch, with stand-ins for srun and scontrol that start the nodes' tasks on this machine."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launchers import ROOT, finish, start

SCRIPT = ROOT / "launch" / "slurm.sbatch"

SRUN = """#!/usr/bin/env bash
# As Slurm does: the same command once on every node, which learns its number from SLURM_NODEID. Ends when all have ended.
echo "srun $*" >> "$STANDIN_LOG"
[[ $1 == --kill-on-bad-exit=1 ]] || exit 64
shift
code=0 tasks=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_NODEID=$node "$@" &
  tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >> "$STANDIN_LOG"
case "$1 ${2:-}" in
  "show hostnames") [[ $3 == "$SLURM_JOB_NODELIST" ]] && printf '%s\\n' 127.0.0.1 127.0.0.2 ;;
  "requeue $SLURM_JOB_ID") touch "$STANDIN_LOG.requeued" ;;
  *) exit 64 ;;
esac
"""


def free_job_id() -> int:
    """A job's number whose port nothing listens on."""
    for number in range(4_000_000 + os.getpid() % 9000, 4_010_000):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", 20000 + number % 10000)):
            return number
    raise AssertionError("no port is free")


Submit = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def submit(tmp_path: Path, mark: str) -> Submit:
    """Start the batch script as Slurm would on the first of two nodes; `bin` in the test's folder holds the stand-ins."""
    place = tmp_path / "bin"
    place.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (place / name).write_text(text)
        (place / name).chmod(0o755)

    def submitted(*words: str) -> subprocess.Popen[str]:
        slurm = {
            "SLURM_JOB_ID": str(free_job_id()),
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_CPUS_PER_TASK": "1",
            "STANDIN_LOG": str(tmp_path / "log"),
            "PATH": os.pathsep.join([str(place), os.environ["PATH"]]),
            "OMP_NUM_THREADS": "1",
        }
        return start([str(SCRIPT), *words], tmp_path, "bash", ROOT, **slurm)

    return submitted


@pytest.mark.timeout(300)  # on the busiest of machines
def test_two_nodes_train_together(submit: Submit, tmp_path: Path) -> None:
    words = ["--checkpoints", str(tmp_path / "checkpoints"), "--steps", "4", "--options", '{"freeze_step": 2}']
    code, output, errors = finish(submit("launch/elastic_train.py", *words))
    assert code == 0, errors
    assert "begins at step 0 of 4" in output
    assert re.search(r"^done: loss [\d.]+, parameters [0-9a-f]{16}$", output, re.MULTILINE)
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert saved.name == "step-4"
    parts = sorted(path.name for path in saved.glob("rank*.safetensors"))
    assert parts == ["rank0.safetensors", "rank1.safetensors"]  # each of two ranks wrote its part
    said = (tmp_path / "log").read_text()
    assert "scontrol show hostnames node[0-1]" in said
    assert "requeue" not in said


def test_a_job_that_runs_out_of_time_goes_back_into_the_queue(submit: Submit, tmp_path: Path) -> None:
    waiting = tmp_path / "waiting.py"  # ends once the job is requeued, as Slurm then ends its tasks
    waiting.write_text(
        "import os, pathlib, time\n"
        "log = pathlib.Path(os.environ['STANDIN_LOG'])\n"
        "os.write(1, b'up\\n')  # in one piece, or two tasks' lines are mixed\n"
        "while not log.with_name(log.name + '.requeued').exists(): time.sleep(0.02)\n"
    )
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{waiting}"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    job = submit("launch/train.py")
    assert job.stdout is not None
    up = [job.stdout.readline() for _ in range(2)]
    job.send_signal(signal.SIGUSR1)
    code, output, errors = finish(job)
    assert up == ["up\n", "up\n"], errors
    assert "back into the queue" in output
    assert code == 0
    assert re.search(r"^scontrol requeue \d+$", (tmp_path / "log").read_text(), re.MULTILINE)


def test_a_training_that_fails_fails_the_job(submit: Submit, tmp_path: Path) -> None:
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\nexit 7\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    assert finish(submit("launch/train.py"))[0] == 7


def test_slurm_takes_every_directive() -> None:
    known = "job-name nodes ntasks-per-node cpus-per-task time requeue signal open-mode output"
    directives = re.findall(r"^#SBATCH --([a-z-]+)(?:=\S+)?$", SCRIPT.read_text(), re.MULTILINE)
    assert set(directives) == set(known.split())
    assert SCRIPT.read_text().count("\n#SBATCH") == len(directives)
    body = SCRIPT.read_text().splitlines()
    first_command = next(k for k, line in enumerate(body) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in body[first_command:])  # Slurm stops reading there
    subprocess.run(["bash", "-n", SCRIPT], check=True)
