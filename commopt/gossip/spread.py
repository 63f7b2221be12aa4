"""How far apart replicas are, from a few hundred numbers of each: a random projection instead of a full exchange."""

import math

import numpy as np
import torch
from torch import Tensor

from commopt.groups.peers import Peers
from commopt.wire import noise
from commopt.wire.payload import Payload

WIDTH = 512  # numbers in a sketch; the estimate's relative standard deviation is about sqrt(1 / (2 WIDTH)) for two replicas: 3 %
_EVERY_STEPS = 10
PIECE = 1 << 18  # elements that are sketched at once, in which no column is cut
_AHEAD = 1000  # steps of which sketches are kept that came too early


class Spread:
    """The root mean square over replicas of ||x_i - mean|| / ||mean||, estimated from sketches.

    Charikar et al. 2002 (count sketch), Alon et al. 1996: each element is added to one of WIDTH sums with a random sign; the squared
    norm of a sketch is an unbiased estimate of that of x, and sketches of differences are differences of sketches. Signs are the same
    on every rank. A sketch of 2 KB goes to each peer at most once in ten steps. Only sketches of the same step are compared, as
    replicas move further in one round than they are apart. That is mostly the round before, as the others' sketches of this one are
    still on their way.
    """

    def __init__(self, elements: int, rank: int) -> None:
        self.rank = rank
        count = np.asarray([-(-elements // 64)], dtype=np.int64)
        key = noise.keys(0, "sketch", 0, np.zeros(1, np.int64), np.zeros(1, np.int64))
        self._signs = noise.bits(key, count).view(np.uint8)  # (elements / 8,), a bit for each
        self._known: dict[int, dict[int, Tensor]] = {}  # by step, then by rank
        self._last_step, self._oldest = -(10**9), 0

    def is_due(self, step: int) -> bool:
        return step // _EVERY_STEPS != self._last_step // _EVERY_STEPS  # so that ranks which start at any step agree

    def sketch(self, x: Tensor) -> Tensor:
        """(WIDTH,) f32 of (elements,) f32."""
        total, room = x.new_zeros(WIDTH), x.new_empty(min(PIECE, len(x) + -len(x) % WIDTH))
        for at in range(0, len(x), PIECE):
            piece, n = x[at : at + PIECE], min(PIECE, len(x) - at)
            bits = torch.from_numpy(np.unpackbits(self._signs[at // 8 : (at + PIECE) // 8], count=n).view(np.bool_))
            signed, padded = room[:n], room[: n + -n % WIDTH]
            torch.where(bits, piece, torch.neg(piece, out=signed), out=signed)
            padded[n:] = 0
            total += padded.view(-1, WIDTH).sum(0)
        return total

    def begin(self, step: int) -> None:
        """Note that a sketch of this step follows."""
        # three of this rank's own intervals
        self._oldest = step - 3 * min(max(step - self._last_step, _EVERY_STEPS), step)
        self._last_step = step

    def exchange(self, peers: Peers, own: Tensor, step: int) -> Tensor:
        """Send this replica's sketch to the peers that are up; `squares` of the step with the most sketches, the newest of several."""
        for peer in peers.others:
            if peers.is_up(peer):
                peers.send(peer, "sketch", step, Payload.of(own), expires_s=5.0)
        for peer, letter in peers.drain("sketch"):
            if (sketch := letter.payload.opened((torch.float32, WIDTH))) is not None:
                self._known.setdefault(letter.sequence, {})[peer] = sketch[0]
        self._known.setdefault(step, {})[self.rank] = own
        self._known = {at: sketches for at, sketches in self._known.items() if self._oldest <= at <= step + _AHEAD}
        present = [
            (at, [sketch for rank, sketch in sorted(sketches.items()) if peers.is_up(rank)])
            for at, sketches in self._known.items()
            if at <= step
        ]
        return squares(max(present, key=lambda one: (len(one[1]), one[0]))[1])


def squares(sketches: list[Tensor]) -> Tensor:
    """(2,) f64: the mean square distance of replicas with these sketches from their mean, and its own; NaN for fewer than two."""
    stacked = torch.stack(sketches).double() if len(sketches) > 1 else torch.full((1, 1), math.nan, dtype=torch.float64)
    mean = stacked.mean(0)
    return torch.stack([(stacked - mean).square().sum(1).mean(), mean.square().sum()])


def spread_of(squares: Tensor) -> float | None:
    """The spread of replicas, from the sum of the squares of their shares; None if it is not finite."""
    apart, size = squares.sqrt().tolist()
    if not math.isfinite(size) or not math.isfinite(apart):
        return None
    return apart / size if size > 0 else 0.0
