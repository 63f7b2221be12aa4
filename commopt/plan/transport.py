"""What exchanges among machines take, before anything was measured: from the links of a cluster's file, and assumptions that are told."""

import math
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np

from commopt.plan.curve import Curve
from commopt.plan.links import LinkModel, rounds
from commopt.plan.model import Transport
from commopt.plan.pipes import Collective, Groups, Pipes
from commopt.plan.profile import Operation

SLOW_BYTES_PER_S, FAST_BYTES_PER_S = 10e9 / 8, 32e9 / 8


@dataclass(frozen=True)
class Assumed:
    """What is assumed where nothing was measured, and can be told.

    efficiency: the share of a link's rate that TCP and the collectives fill up to 10 Gbit/s; fast_efficiency: from 32 Gbit/s on (NCCL
    over TCP fills at most 60 % of that: nccl issue 209). call_s: what a call costs beside its messages, and round_s each of its rounds.
    inside_bytes_per_s: what a rank sends to the others of its machine: through memory, or from GPU to GPU.
    """

    efficiency: float = 0.85
    fast_efficiency: float = 0.6
    call_s: float = 1e-4
    round_s: float = 5e-5
    inside_bytes_per_s: float = 5e9
    inside_gpu_bytes_per_s: float = 20e9

    def share(self, bytes_per_s: float) -> float:
        """The share of a link of this rate that is filled."""
        if bytes_per_s <= SLOW_BYTES_PER_S:
            return self.efficiency
        way = min(1.0, math.log(bytes_per_s / SLOW_BYTES_PER_S) / math.log(FAST_BYTES_PER_S / SLOW_BYTES_PER_S))
        return self.efficiency + way * (self.fast_efficiency - self.efficiency)


BEST = Assumed(
    efficiency=0.95,
    fast_efficiency=0.95,
    call_s=3e-5,
    round_s=1e-5,
    inside_bytes_per_s=10e9,
    inside_gpu_bytes_per_s=200e9,
)
LIKELY = Assumed()
WORST = Assumed(
    efficiency=0.6, fast_efficiency=0.35, call_s=1e-3, round_s=2e-4, inside_bytes_per_s=2e9, inside_gpu_bytes_per_s=8e9
)


def transport_of(links: LinkModel, slots: int, assumed: Assumed = LIKELY, *, has_gpus: bool = False) -> Transport:
    """Transport over the links of a cluster: rounds x latency + bytes over the rate of the busiest pipe.

    links: of all ranks, `slots` on each machine, which use their machine's link at the same time.
    """
    machines = links.of_one_rank(slots)
    slowest = min(machines.bytes_per_s + machines.between_bytes_per_s) * slots
    own = replace(
        machines,
        bytes_per_s=_filled(machines.bytes_per_s, assumed.share(slowest)),
        between_bytes_per_s=_filled(machines.between_bytes_per_s, assumed.share(slowest)),
    )
    seconds: dict[str, Curve] = {}
    if machines.ranks > 1:
        for operation in get_args(Operation):
            per_byte, latency_s = _costs(own, operation)
            calls_s = assumed.call_s + rounds(operation, own.ranks) * assumed.round_s
            seconds[operation] = Curve.line(calls_s + latency_s, per_byte)
    if slots == 1:
        return Transport(seconds)
    # each rank sends and receives 2 (L - 1) / L of the tensor
    inside_bytes_per_s = assumed.inside_gpu_bytes_per_s if has_gpus else assumed.inside_bytes_per_s
    return Transport(seconds, inside=Curve.line(2 * assumed.call_s, 2 * (slots - 1) / slots / inside_bytes_per_s))


def _filled(bytes_per_s: tuple[float, ...], share: float) -> tuple[float, ...]:
    return tuple(rate * share for rate in bytes_per_s)


def _costs(links: LinkModel, operation: Operation) -> tuple[float, float]:
    """(seconds per contributed byte, seconds of latency) of one operation with one rank per machine."""
    latency_s = _seconds(links, operation, 1e-9)
    return _seconds(links, operation, 1.0) - latency_s, latency_s


def _seconds(links: LinkModel, operation: Operation, nbytes: float) -> float:
    """Seconds of one operation of all ranks that contribute `nbytes` each."""
    if operation == "send":  # to partners, at worst in another site
        there = range(links.ranks)
        sent = [{(rank + links.ranks // 2) % links.ranks: nbytes} for rank in there]
        return links.seconds(sent, rounds(operation, links.ranks))
    everyone = Groups(np.arange(links.ranks), np.zeros(1, np.int64))
    seconds, _ = Pipes(links).round(everyone, [Collective(operation, nbytes)])
    return float(seconds[0])


def same_links(links: LinkModel, bytes_per_s: float) -> LinkModel:
    """The same machines, each with a link of this rate, and nothing slower between sites."""
    return replace(
        links,
        bytes_per_s=tuple(bytes_per_s for _ in links.bytes_per_s),
        between_bytes_per_s=tuple(math.inf for _ in links.between_bytes_per_s),
    )
