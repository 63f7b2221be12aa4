"""The command line's own options."""

from __future__ import annotations

import subprocess
import sys

from typer.testing import CliRunner

import commopt
from commopt.cli.app import app


def test_version_is_the_packages() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert (shown.exit_code, shown.stdout) == (0, f"commopt {commopt.__version__}\n")


def test_an_output_that_takes_nothing_ends_no_job() -> None:
    words = [sys.executable, "-m", "commopt", "--version"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "commopt: the output is incomplete: no space left on device\n")
    done = subprocess.run(["sh", "-c", '"$@" >&-', "", *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_offers_completion_and_every_command() -> None:
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120"}).stdout
    assert all(word in shown for word in ("--install-completion", "launch", "run", "compare", "doctor"))
