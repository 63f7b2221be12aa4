"""What `commopt probe` writes, for tests of those who read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def probe_file(
    calls: Sequence[Sequence[float]],
    codecs: Mapping[str, Any],
    *,
    nodes: Sequence[str] = ("a", "b"),
    rate: float = 10e6,
    latency_s: float = 0.001,
    **others: Any,
) -> dict[str, Any]:
    """A probe of two nodes on whose links all exchanges take the same. calls: bytes, seconds, share of the processor."""
    one, other = nodes
    return {
        "schema": 1,
        "created": "2026-01-01T00:00:00+00:00",
        "commopt": "0.2.0",
        "torch": "2.13.0",
        "cluster": "lab",
        "nodes": [one, other],
        "slots": 1,
        "backend": "gloo",
        "device": "cpu",
        "cores_per_rank": 1.0,
        "emulated": True,
        "rates": {one: rate, other: rate},
        "pairs": [
            {"from": a, "to": b, "latency_s": latency_s, "bytes_per_s": rate} for a, b in ((one, other), (other, one))
        ],
        "together": {one: rate, other: rate},
        "exchanges": dict.fromkeys(("all_reduce", "all_gather", "all_to_all"), calls),
        "inside": [],
        "copy_bytes_per_s": 4e9,
        "profiles": {},
        "codecs": codecs,
        **others,
    }


def script(**others: Any) -> dict[str, Any]:
    """What a probe has of a training script."""
    return {
        "program": "train.py",
        "parameters": 1000,
        "compute_s": 0.1,
        "spread": 0.05,
        "step_s": 0.3,
        "buckets": [600, 400],
        "overlap": True,
        **others,
    }
