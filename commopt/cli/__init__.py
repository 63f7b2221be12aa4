"""The command line."""

from commopt.cli.app import main

__all__ = ["main"]
