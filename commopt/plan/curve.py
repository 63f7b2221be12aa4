"""A measured dependence, such as seconds against bytes: straight lines between points."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """Goes through its points, and on beyond the last one with the slope of the last two; below the first it is as high as there.

    points: (x, y) in any order; of those with the same x, the last counts. Raises ValueError without points.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError("a curve needs a point")
        object.__setattr__(self, "points", tuple(sorted({float(x): float(y) for x, y in self.points}.items())))

    @classmethod
    def of(cls, points: Iterable[Iterable[float]], column: int = 1) -> Curve:
        """The curve of rows (x, y, z, ...), with y or another column."""
        rows = [tuple(row) for row in points]
        return cls(tuple((row[0], row[column]) for row in rows))

    @classmethod
    def line(cls, start: float, slope: float) -> Curve:
        """start + slope x."""
        return cls(((0.0, start), (1.0, start + slope)))

    def __call__(self, x: float) -> float:
        points = self.points
        if len(points) == 1 or x <= points[0][0]:
            return points[0][1]
        right = min(bisect.bisect_left(points, (x,)), len(points) - 1)
        (x0, y0), (x1, y1) = points[right - 1], points[right]
        return y0 + (y1 - y0) * (x - x0) / (x1 - x0)

    def scaled(self, by: float) -> Curve:
        """The curve with every y multiplied."""
        return Curve(tuple((x, y * by) for x, y in self.points))
