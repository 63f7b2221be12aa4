"""Codes and the 1-bit exchange in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from synthetic import F64


def tensors_of(numels: list[int]) -> list[slice]:
    starts = np.cumsum([0, *numels])
    return [slice(a, a + n) for a, n in zip(starts, numels, strict=False) if n]


def blocks_of(numels: list[int], ranks: int, scale: str, block_size: int = 2048) -> list[tuple[slice, int]]:
    """Each block and the rank that serves it: blocks of one size in turn ("l1", "rms"), or N chunks of each tensor."""
    blocks: list[tuple[slice, int]] = []
    for t in tensors_of(numels):
        is_even = scale in ("l1", "rms")
        size = block_size if is_even else math.ceil((t.stop - t.start) / (8 * ranks)) * 8
        for j, a in enumerate(range(t.start, t.stop, size)):
            blocks.append((slice(a, min(a + size, t.stop)), len(blocks) % ranks if is_even else j))
    return blocks


def server_at_home(residuals: list[F64], numels: list[int], scale: str, block_size: int = 2048) -> F64:
    """(n,) the servers' residuals, each where its parameter lies."""
    rest = [list(x) for x in residuals]
    whole: list[float] = []
    for block, owner in blocks_of(numels, len(residuals), scale, block_size):
        length = block.stop - block.start
        whole += rest[owner][:length]
        rest[owner] = rest[owner][length:]
    assert not any(rest)
    return np.asarray(whole)


def signs(c: F64, groups: list[list[slice]], scale: str = "l1") -> tuple[F64, F64]:
    """C(c) with one scale per group of blocks, and |c| in units of its scale: its distance from a change of sign."""
    q, distance = np.zeros_like(c), np.full_like(c, np.inf)
    for group in groups:
        whole = np.concatenate([c[block] for block in group])
        size = np.abs(whole).mean() if scale == "l1" else np.sqrt((whole**2).mean())
        for block in group:
            q[block] = np.where(c[block] >= 0, size, -size)
            distance[block] = np.abs(c[block]) / size if size else 0.0
    return q, distance


def block_signs(c: F64, numels: list[int]) -> tuple[F64, F64]:
    """`signs` with one scale for each block of 2,048."""
    return signs(c, [[block] for block, _ in blocks_of(numels, 1, "l1")])


def largest(c: F64, density: float, numels: list[int]) -> tuple[F64, F64]:
    """The share `density` of each tensor with the largest magnitudes, and the margin of the choice."""
    q, margin = np.zeros_like(c), np.full_like(c, np.inf)
    for span in tensors_of(numels):
        size = np.abs(c[span])
        k = math.ceil(density * len(size) - 1e-9)
        chosen = np.argsort(-size, kind="stable")[:k]
        q[span][chosen] = c[span][chosen]
        if k < len(size):
            cut = np.sort(size)[::-1]
            margin[span] = (cut[k - 1] - cut[k]) / cut[k - 1]
    return q, margin


@dataclass
class SignExchange:
    """C(mean C(x_i)) with error feedback on both sides (Tang et al. 2021, arXiv:2102.02888), in float64."""

    numels: list[int]
    scale: str
    e: F64  # (N, n) worker residuals
    s: F64  # (n,) server residuals, each where its owner has it
    block_size: int = 2048
    margin: F64 = field(default_factory=lambda: np.zeros(0))  # distance from a change of sign, in scales

    def check_after(self, states: list[dict[str, Any]], clear: Any, atol: float) -> None:
        """Compare the ranks' residuals with these, where `clear`."""
        found = SignExchange.of(states, self.numels, self.scale, self.block_size)
        np.testing.assert_allclose(found.e[:, clear], self.e[:, clear], rtol=1e-7, atol=atol)
        np.testing.assert_allclose(found.s[clear], self.s[clear], rtol=1e-7, atol=atol)

    def residuals(self) -> dict[str, Any]:
        """What each rank keeps, by key and rank."""
        server = [np.concatenate([np.zeros(0), *(self.s[block] for block in blocks)]) for blocks in self.served]
        return {"worker_residual": self.e, "server_residual": server}

    @property
    def served(self) -> list[list[slice]]:
        """The blocks of each rank."""
        blocks = blocks_of(self.numels, len(self.e), self.scale, self.block_size)
        return [[block for block, owner in blocks if owner == rank] for rank in range(len(self.e))]

    @classmethod
    def of(cls, states: list[dict[str, Any]], numels: list[int], scale: str, block_size: int = 2048) -> SignExchange:
        """With the residuals of these ranks."""
        server = server_at_home([state["server_residual"] for state in states], numels, scale, block_size)
        return cls(numels, scale, np.stack([state["worker_residual"] for state in states]), server, block_size)

    def mean(self, x: F64) -> F64:
        """x: (N, n)"""
        blocks = [block for served in self.served for block in served]
        each = [[block] for block in blocks]
        workers = {"l2": [[t] for t in tensors_of(self.numels)], "model": [blocks]}.get(self.scale, each)
        servers = [group for group in self.served if group] if self.scale == "model" else each
        c = x + self.e
        q, clear = zip(*(signs(row, workers, self.scale) for row in c), strict=True)
        a = np.mean(q, axis=0) + self.s
        y, distance = signs(a, servers, self.scale)
        self.e, self.s, self.margin = c - np.stack(q), a - y, np.min([*clear, distance], axis=0)
        return y
