"""The command line."""

from commopt.cli import planning as planning  # adds its commands to the app
from commopt.cli.app import main

__all__ = ["main"]
