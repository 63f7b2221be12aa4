"""The command line."""

from commopt.cli import advising as advising  # adds its commands to the app
from commopt.cli.app import main

__all__ = ["main"]
