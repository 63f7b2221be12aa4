"""Compressed communication for distributed training over slow links."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from commopt.errors import CommoptError

if TYPE_CHECKING:
    from commopt.frameworks.ddp import wrap
    from commopt.method import Method
    from commopt.methods import build
    from commopt.run.door import attach
    from commopt.run.run import Run

__version__ = "0.2.0"
__all__ = ["CommoptError", "Method", "Run", "__version__", "attach", "build", "wrap"]

_HOMES = {
    "attach": "commopt.run.door",
    "build": "commopt.methods",
    "Method": "commopt.method",
    "Run": "commopt.run.run",
    "wrap": "commopt.frameworks.ddp",
}
_MODULES = ("deepspeed",)  # public modules that a use of their name imports


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for: the command line does without."""
    import importlib

    if name in _MODULES:
        return importlib.import_module(f"commopt.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
