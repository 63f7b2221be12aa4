"""Compressed communication for distributed training over slow links."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from commopt.errors import CommoptError

if TYPE_CHECKING:
    from commopt.methods import build
    from commopt.run.door import attach

__version__ = "0.1.0"
__all__ = ["CommoptError", "__version__", "attach", "build"]


def __getattr__(name: str) -> Any:
    """Import `attach` and `build`, and torch with them, when they are asked for: the command line does without."""
    if name == "attach":
        from commopt.run.door import attach

        return attach
    if name == "build":
        from commopt.methods import build

        return build
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
