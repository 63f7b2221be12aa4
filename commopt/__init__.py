"""Compressed communication for distributed training over slow links."""

__version__ = "0.1.0"
