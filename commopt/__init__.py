"""Compressed communication for distributed training over slow links."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from commopt.errors import CommoptError

if TYPE_CHECKING:
    from commopt.method import Method
    from commopt.methods import build
    from commopt.run.door import attach
    from commopt.run.run import Run

__version__ = "0.2.0"
__all__ = ["CommoptError", "Method", "Run", "__version__", "attach", "build"]

_HOMES = {
    "attach": "commopt.run.door",
    "build": "commopt.methods",
    "Method": "commopt.method",
    "Run": "commopt.run.run",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for: the command line does without."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
