"""Compressed communication for distributed training over slow links."""

from typing import TYPE_CHECKING, Any

from commopt.errors import CommoptError

if TYPE_CHECKING:
    from commopt.frameworks.ddp import wrap
    from commopt.groups.world import World
    from commopt.method import Method
    from commopt.methods import build
    from commopt.run.door import attach
    from commopt.run.run import Run

__version__ = "0.2.0"
__all__ = ["CommoptError", "Method", "Run", "World", "__version__", "attach", "build", "wrap"]

_HOMES = {
    "attach": "commopt.run.door",
    "build": "commopt.methods",
    "Method": "commopt.method",
    "Run": "commopt.run.run",
    "World": "commopt.groups.world",
    "wrap": "commopt.frameworks.ddp",
}


def __getattr__(name: str) -> Any:
    """Import names that need torch on first use, so that the command line starts without it."""
    import importlib

    if name == "deepspeed":  # a public module
        return importlib.import_module("commopt.deepspeed")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
