"""The command line's own options."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest
from launchers import wait_until
from typer.testing import CliRunner

import commopt
from commopt.cli import notes
from commopt.cli.app import app
from commopt.cli.notes import telling


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
    named = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    assert len(named) == 7
    assert all(word in shown for word in ("--install-completion", *named))


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("compare", "[OPTIONS] RUN.yaml|PROGRAM.py [-- ARGUMENTS...]"),
        ("launch", "[OPTIONS] CLUSTER.yaml -- PROGRAM [ARGUMENTS]..."),
        ("probe", "[OPTIONS] CLUSTER.yaml [-- PROGRAM.py [ARGUMENTS]...]"),
    ],
)
def test_help_in_80_columns_says_how_a_command_is_typed(command: str, usage: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"}).stdout
    lines = [line.strip() for line in shown.strip().splitlines()]
    assert lines[0].endswith(f" {command} {usage}")
    assert "…" not in shown
    assert "<bool>" not in shown
    assert re.match(rf"(Example: )?commopt {command} ", lines[-1])  # which is on one line


def test_what_takes_long_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes, "_QUIET_S", 0.1)
    said = ""

    def has_said(text: str) -> bool:
        nonlocal said
        said += capsys.readouterr().err
        return re.search(rf"commopt: {text}, \d+ s\n", said) is not None

    with telling("importing") as heard:
        wait_until(lambda: has_said("importing"), "its first line")
        heard("running")
        wait_until(lambda: has_said("running"), "another")
        heard("")
        time.sleep(0.1)  # for a line that was just being written
        has_said("")
        said = ""
        time.sleep(0.5)
    with telling("quick"):
        pass
    time.sleep(0.6)
    assert not has_said(".*")
    assert said == ""
