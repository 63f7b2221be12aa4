"""What each rank of sync.py runs: a pair's swap, a binomial tree and Gloo's own all-reduce, timed side by side.

sync_exchange.py --elements 65536 --repeats 20 --out FILE                       messages take what the link makes them take
sync_exchange.py --elements 512 --repeats 100 --mean-s 0.03 --spread 1 ...      and at least a time that is drawn for each

Plain torch.distributed over Gloo. All ranks begin at the same moment of the machine's clock, which emulated nodes share,
so that a rank's seconds are those since the exchange began, and no barrier is part of them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from commopt.wire.draws import group_of

TIMEOUT_S = 60.0
LEAD_S = 0.05  # from the news of a beginning to the beginning: longer than the news takes


class Messages:
    """Sends and receives whole tensors; with a mean, each one arrives no sooner than a drawn time after it was sent.

    The first element of a delayed message, a float64, is the moment when it was sent. Its receiver draws how long it
    takes and waits for the rest of it, so that two messages can be under way to one rank at a time.
    """

    def __init__(self, rank: int, *, mean_s: float = 0.0, spread: float = 0.0) -> None:
        self._random = np.random.default_rng([rank, 1])  # message times are independent
        self._mean_s, self._sigma = mean_s, math.sqrt(math.log1p(spread**2))
        self._word = torch.zeros(1)

    def send(self, x: torch.Tensor, to: int) -> dist.Work:
        if self._mean_s:
            x[0] = time.monotonic()
        work = dist.isend(x, to)
        assert work is not None
        return work

    def deliver(self, x: torch.Tensor, to: int) -> None:
        """Send, and wait for the word that it is there: a send alone ends when the kernel has taken the message."""
        word = dist.irecv(self._word, to)
        assert word is not None
        self.send(x, to).wait()
        word.wait()

    def receive(self, into: torch.Tensor, source: int, *, confirm: bool = False) -> Callable[[], None]:
        """Begin to receive, and return what waits until the message is there; confirm: what `deliver` waits for."""
        work = dist.irecv(into, source)
        assert work is not None

        def wait() -> None:
            work.wait()
            if confirm:
                dist.send(self._word, source)
            if self._mean_s:
                takes_s = self._mean_s * self._random.lognormal(-(self._sigma**2) / 2, self._sigma)
                sleep_until(float(into[0]) + takes_s)

        return wait


def swap_mean_(x: torch.Tensor, other: torch.Tensor, partner: int, messages: Messages) -> None:
    """Both ranks of a pair send what they have, at the same time, and average.

    Gloo sends once it knows of the receive, and the news of one travels behind what is being sent already: with the send
    begun first, half of the swaps go one way after the other.
    """
    arrived = messages.receive(other, partner)
    sending = messages.send(x, partner)
    arrived()
    sending.wait()
    x.add_(other).div_(2)


def tree_mean_(x: torch.Tensor, other: torch.Tensor, rank: int, world: int, messages: Messages) -> None:
    """Reduce to rank 0 over a binomial tree, then broadcast over the same: 2 log2(world) whole messages in a row."""
    height = (world - 1).bit_length()
    joins = (rank & -rank).bit_length() - 1 if rank else height  # the level at which this rank sends its sum up
    children = [rank + (1 << level) for level in range(joins) if rank + (1 << level) < world]
    for child in children:
        messages.receive(other, child)()
        x.add_(other)
    if rank == 0:
        x.div_(world)
    else:
        arrived = messages.receive(other, rank - (1 << joins), confirm=True)
        messages.send(x, rank - (1 << joins)).wait()
        arrived()
        x.copy_(other)
    for child in reversed(children):  # in a row: two at once would halve the rate of the one that is passed on
        messages.deliver(x, child)


def ring_mean_(x: torch.Tensor, world: int) -> None:
    """Gloo's all-reduce: 2 (world - 1) messages of 1 / world of the tensor in a row, on all links at once."""
    dist.all_reduce(x)
    x.div_(world)


def begin() -> float:
    """Agree on a moment soon, wait for it, and return it."""
    dist.barrier()  # so that nobody is still busy with what came before
    moment = torch.tensor([time.monotonic() + LEAD_S], dtype=torch.float64)
    dist.broadcast(moment, 0)
    sleep_until(float(moment))
    return float(moment)


def sleep_until(moment_s: float) -> None:
    """Wait for a moment of the monotonic clock; spinning would take the cores from the other ranks."""
    while (left_s := moment_s - time.monotonic()) > 0:
        time.sleep(left_s)


def timed(exchange: Callable[[], None]) -> float:
    """Seconds from the common beginning until this rank has its mean."""
    start_s = begin()
    exchange()
    return time.monotonic() - start_s


def main(elements: int, repeats: int, mean_s: float, spread: float, out: Path) -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT_S))
    rank, world = dist.get_rank(), dist.get_world_size()
    messages = Messages(rank, mean_s=mean_s, spread=spread)
    x = torch.full((elements,), float(rank), dtype=torch.float64 if mean_s else torch.float32)
    other = torch.empty_like(x)
    names = ("swap", "tree") if mean_s else ("swap", "tree", "ring")  # nobody can delay what Gloo sends inside
    seconds: dict[str, list[float]] = {name: [] for name in names}
    partners = []
    # in turn, so that a busy neighbour meets all of them alike; the first is a warm-up
    for repeat in range(repeats + 1):
        (partner,) = {*group_of(rank, world, 2, seed=1, round=repeat)} - {rank}
        exchanges: dict[str, Callable[[], None]] = {
            "swap": partial(swap_mean_, x, other, partner, messages),
            "tree": partial(tree_mean_, x, other, rank, world, messages),
            "ring": partial(ring_mean_, x, world),
        }
        for name in seconds:
            x.fill_(rank)
            took_s = timed(exchanges[name])
            expected = (rank + partner) / 2 if name == "swap" else (world - 1) / 2
            if float(x[-1]) != expected:
                raise RuntimeError(f"{name}: rank {rank} ends with {float(x[-1])}, not with the mean, {expected}")
            if repeat:
                seconds[name].append(took_s)
        if repeat:
            partners.append(partner)
    everyone: list[object] = [None] * world
    dist.all_gather_object(everyone, {"seconds": seconds, "partners": partners})
    if rank == 0:
        out.write_text(json.dumps(everyone))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, required=True, help="of a message: float32, and float64 with --mean-s")
    parser.add_argument("--repeats", type=int, required=True, help="timed ones of each exchange")
    parser.add_argument("--mean-s", type=float, default=0.0, help="mean of the message times that are drawn")
    parser.add_argument("--spread", type=float, default=0.0, help="their std / mean")
    parser.add_argument("--out", type=Path, required=True, help="where rank 0 writes all ranks' seconds")
    given = parser.parse_args()
    main(given.elements, given.repeats, given.mean_s, given.spread, given.out)
