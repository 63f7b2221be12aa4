"""The command line."""

from commopt.cli import advising as advising  # these add their commands to the app
from commopt.cli import comparing as comparing
from commopt.cli import probing as probing
from commopt.cli.app import main

__all__ = ["main"]
