"""Compressed communication for distributed training over slow links."""

from commopt.errors import CommoptError
from commopt.methods import build

__version__ = "0.1.0"
__all__ = ["CommoptError", "__version__", "build"]
