"""What the benchmarks of losses share: losses that may be infinite, and the choice of a learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

FACTOR = 2.0  # between neighbouring rates


def finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def loss_of(result: Mapping[str, Any]) -> float:
    """The final loss; infinite if training diverged."""
    return math.inf if result["loss"] is None else float(result["loss"])


def tried_rates(grid: Iterable[float], extensions: int, score: Callable[[float], float | None]) -> list[float]:
    """The rates of the grid, and at most so many beyond its edges, as long as the best rate lies there.

    score: the loss at a rate; None as long as it is not known.
    """
    rates = list(grid)
    for _ in range(extensions if len(rates) > 1 else 0):
        best = lowest({rate: score(rate) for rate in rates})
        if best == rates[0]:
            rates.insert(0, best / FACTOR)
        elif best == rates[-1]:
            rates.append(best * FACTOR)
    return rates


def lowest(scores: Mapping[float, float | None]) -> float | None:
    """The rate with the lowest loss, the first of equals; None as long as a loss is not known."""
    known = {rate: score for rate, score in scores.items() if score is not None}
    return min(known, key=lambda rate: known[rate]) if known and len(known) == len(scores) else None


def best_rate(scores: Mapping[float, float | None]) -> float | None:
    """None as long as it is not known, and if nothing converges."""
    best = lowest(scores)
    return best if best is not None and math.isfinite(scores[best] or 0.0) else None
