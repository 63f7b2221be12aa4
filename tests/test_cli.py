"""The command line's own options."""

from __future__ import annotations

from typer.testing import CliRunner

import commopt
from commopt.cli.app import app


def test_version_is_the_packages() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert (shown.exit_code, shown.stdout) == (0, f"commopt {commopt.__version__}\n")


def test_help_offers_completion_and_every_command() -> None:
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120"}).stdout
    assert all(word in shown for word in ("--install-completion", "launch", "run", "compare", "doctor"))
