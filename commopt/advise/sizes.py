"""Which sizes of an exchange are timed, and how often, so that it takes no longer than it may."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

LEAST_BYTES, MOST_BYTES, MOST_S = 1 << 10, 1 << 22, 0.4  # of one call
_OFTEN, _LONG, _LONG_S = 6, 4, 0.1  # calls of one size, the first of which does not count; fewer if one takes so long
# growth from size to size, and the calls of each, None for all; the first that fits is taken
_PLANS = ((4, None), (4, 3), (16, 3), (64, 3), (1 << 12, 3), (1 << 12, 1))
Measure = Callable[[int, int], tuple[int, float, float, float]]


class Point(NamedTuple):
    nbytes: int
    seconds: float
    busy: float  # share of the processor
    calls: int


def curve(measure: Measure, byte_s: float, budget_s: float) -> list[Point]:
    """Points from small calls to large ones, as far as the time reaches. If only one was timed, a second one follows from the links.

    measure: times calls of so many bytes, so often or less (0: as often as fits): their bytes, the seconds of one, the share of the
    processor, and the seconds that all took. byte_s: what a byte takes at least, by the links.
    """
    points, wanted, calls, left_s = list[Point](), LEAST_BYTES, 0, budget_s
    while True:
        nbytes, seconds, busy, spent_s = measure(wanted, calls)
        points.append(Point(nbytes, seconds, busy, calls or calls_of(seconds, budget_s / 4)))
        left_s -= spent_s
        slope = byte_s
        if len(points) > 1:
            (n, s, *_), (m, t, *_) = points[-2:]
            slope = max(slope, (t - s) / (m - n))
        if (found := next_size(points, slope, left_s)) is None:
            break
        wanted, calls = found
    if len(points) == 1:
        points.append(Point(MOST_BYTES, seconds + byte_s * (MOST_BYTES - nbytes), busy, 0))
    return points


def calls_of(seconds: float, budget_s: float) -> int:
    """How often a call is made that takes so long."""
    wanted = _OFTEN if seconds < _LONG_S else _LONG
    return max(1, min(wanted, int(budget_s / seconds + 1e-6))) if seconds > 0 else wanted


def next_size(points: Sequence[Point], slope: float, left_s: float) -> tuple[int, int] | None:
    """(bytes, calls) of the next size; None if it is the end. slope: seconds for a byte more."""
    nbytes, seconds = points[-1][:2]
    most_s = max(MOST_S, 2 * points[0].seconds)

    def size_of(call_s: float) -> int:
        """The largest size of which a call takes so long."""
        return MOST_BYTES if slope <= 0 else int(min(MOST_BYTES, nbytes + (call_s - seconds) / slope))

    for growth, calls in _PLANS:
        top = size_of(most_s)
        expected = [seconds + slope * (n - nbytes) for n in _sizes(nbytes, top, growth)]
        if sum(s * (calls or calls_of(s, s * _OFTEN)) for s in expected) <= left_s:
            break
    else:
        growth, calls, top = *_PLANS[-1], size_of(left_s)
    wanted = next(_sizes(nbytes, top, growth), nbytes)
    more_s = slope * (wanted - nbytes)
    # a call that hardly takes longer does not tell what a byte takes
    if wanted == nbytes or (calls == 1 and more_s < seconds / 2):
        return None
    return wanted, calls or calls_of(seconds + more_s, _OFTEN * (seconds + more_s))


def _sizes(nbytes: int, top: int, growth: int) -> Iterator[int]:
    """The sizes after this one, up to the top, without one that is hardly larger than another."""
    while nbytes * 1.4 <= top:
        nbytes = nbytes * growth if nbytes * growth * 1.4 <= top else top
        yield nbytes


def were_less(points: Sequence[Point]) -> str:
    """What was left out of a curve, in words; nothing if that is nothing."""
    if not points[-1].calls:
        return "one size, once; larger ones are worked out from the links"
    fewest = min(point.calls for point in points)
    if fewest >= _LONG and all(b.nbytes <= 6 * a.nbytes for a, b in pairwise(points)):
        return ""
    return f"{len(points)} sizes, each at least {['', 'once', 'twice'][fewest] if fewest < 3 else f'{fewest} times'}"
