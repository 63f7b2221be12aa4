"""Training runs of thousands of nodes, simulated: step times are drawn, and nodes wait for each other and for their links.

Between two exchanges nothing happens that another node could see, so the steps between them are drawn and added up at once.
Where nodes wait, each event is computed: who is there, when the last of a group is ready, and how long the links take. Nothing
here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from commopt.errors import ConfigError
from commopt.plan.links import LinkModel
from commopt.plan.pipes import F64, I64, Collective, Groups, Pipes
from commopt.plan.profile import Profile
from commopt.wire.draws import random_order

_DRAWN_AT_ONCE = 1_000_000  # step times; 8 MB


@dataclass(frozen=True)
class Times:
    """Seconds that something takes: log-normal, with this mean; spread: standard deviation / mean, 0 for the same each time."""

    mean_s: float
    spread: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.mean_s < math.inf and 0 <= self.spread < math.inf):
            raise ConfigError(f"{self} is out of range; write a mean above 0 and a spread from 0")

    @property
    def sigma(self) -> float:
        """The standard deviation of the times' logarithm."""
        return math.sqrt(math.log1p(self.spread**2))

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> F64:
        drawn: F64 = rng.lognormal(math.log(self.mean_s) - self.sigma**2 / 2, self.sigma, shape)
        return drawn


@dataclass(frozen=True)
class Exchange:
    """What nodes exchange, with whom, and how often.

    collectives: those of one round, one after another. every: steps between two exchanges of the same parameters.
    group_size: None if all nodes exchange together, 2 for random pairs, and so on, drawn as noloco draws them.
    fragments: the parameters go in so many parts, one after another within `every` steps; collectives are those of one part.
    overlap_steps: steps that a node may do before it needs the result (tau).
    buckets: equal parts that a round's collectives are done for, one after another. early: share of a step, before its end, in
        which the exchange runs already; buckets are released evenly in that time. encode_s: what a round costs a node's processor.
    timeout_s: how long a round waits for a node that has failed, before the others know that it has.
    """

    collectives: Sequence[Collective] = ()
    every: int = 1
    group_size: int | None = None
    fragments: int = 1
    overlap_steps: int = 0
    early: float = 0.0
    buckets: int = 1
    encode_s: float = 0.0
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for name, least in (("every", self.fragments), ("fragments", 1), ("buckets", 1), ("overlap_steps", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: {getattr(self, name)} is out of range; write at least {least}")
        if self.group_size is not None and self.group_size < 2:
            raise ConfigError(f"group_size: {self.group_size} is out of range; write 2 or more, or None for all nodes")
        if not 0 <= self.early <= 1:
            raise ConfigError(f"early: {self.early} is out of range; write a share of a step, from 0 to 1")

    @classmethod
    def of(
        cls,
        profile: Profile,
        parameters: float,
        nodes: int,
        *,
        buckets: int = 1,
        forward_share: float = 1 / 3,
        encode_s: float = 0.0,
        timeout_s: float = 30.0,
    ) -> Exchange:
        """What a method exchanges of a model. An outer method that sends to single peers does so in random pairs.

        buckets: that backward releases, if the method exchanges in steps and not between them.
        """
        is_outer = profile.kind == "outer"
        buckets = buckets if profile.overlaps and not is_outer else 1
        part = parameters / profile.fragments
        return cls(
            [Collective(phase.operation, phase.nbytes(part, nodes)) for phase in profile.phases],
            every=profile.every,
            group_size=2 if any(phase.operation == "send" for phase in profile.phases) else None,
            fragments=profile.fragments,
            overlap_steps=profile.delay,
            early=(1 - forward_share) * (1 - 1 / buckets),
            buckets=buckets,
            encode_s=encode_s,
            timeout_s=timeout_s,
        )

    def rounds_of(self, steps: int) -> list[int]:
        """After which steps the rounds of a run begin."""
        count = steps * self.fragments // self.every
        return [(number + 1) * self.every // self.fragments for number in range(count)]


@dataclass(frozen=True)
class Failure:
    """A node that is gone once it has done `at_step` steps; it is back when the others have done `back_after_steps` more."""

    node: int
    at_step: int
    back_after_steps: int | None = None

    def __post_init__(self) -> None:
        if self.at_step < 0 or (self.back_after_steps is not None and self.back_after_steps < 1):
            raise ConfigError(f"{self} is out of range; write at_step from 0, and back_after_steps from 1 or None")


@dataclass(frozen=True)
class Simulated:
    """A run's outcome.

    total_s: (runs,) seconds until the last node is done. computed_s, waited_s: (runs, nodes) seconds that each node has spent on
    steps, and on waiting for others or for its link. sent_bytes: (nodes,) payload on each node's link. rounds: how many there were;
    missed: (nodes,) those that a node did not exchange in, as it was down or alone with one that was. down_s: (runs, nodes).
    """

    total_s: F64
    computed_s: F64
    waited_s: F64
    down_s: F64
    sent_bytes: F64
    rounds: int
    missed: I64

    @property
    def utilisation(self) -> float:
        """Share of the time in which the nodes that are up compute."""
        return float(self.computed_s.sum() / (self.total_s[:, None] - self.down_s).sum())


def simulate(
    links: LinkModel,
    exchange: Exchange,
    *,
    steps: int,
    step: Times,
    slow: Mapping[int, float] | None = None,
    failures: Sequence[Failure] = (),
    efficiency: float = 1.0,
    runs: int = 1,
    seed: int = 0,
    rng: np.random.Generator | None = None,
) -> Simulated:
    """Simulate `runs` trainings of `steps` steps side by side: the same groups and failures, other step times.

    A node's step lasts as long as that of its slowest rank, times the node's factor in `slow`. efficiency: share of each link that
    the transport fills. `rng` draws the step times, and is made from `seed` by default; `seed` draws the groups.
    Failed nodes: a round that expects one waits `exchange.timeout_s` and goes on without it; later rounds leave it out. A node
    that is back has the clock of the median of the others. Raises ConfigError for unknown nodes, and values out of range.
    """
    nodes = len(links.bytes_per_s)
    for node in (*(slow or ()), *(failure.node for failure in failures)):
        if not 0 <= node < nodes:
            raise ConfigError(f"node {node}: no such node; write 0 to {nodes - 1}")
    if not (steps >= 1 and runs >= 1 and 0 < efficiency <= 1):
        raise ConfigError(f"{steps=}, {runs=}, {efficiency=}: out of range; write 1 or more, and a share above 0")
    rng = np.random.default_rng(seed) if rng is None else rng
    clock = _Clock(_StepTimes(links, step, slow or {}, rng), runs, nodes)
    meeting = _Meeting(Pipes(links, efficiency), exchange, seed, runs)
    begins = set(exchange.rounds_of(steps))
    before = {number - 1 for number in begins} if exchange.early else set()  # the step before it is drawn on its own
    ends = {min(number + exchange.overlap_steps, steps) for number in begins}
    gone = [(failure.at_step, failure.node) for failure in failures]
    back = [(f.at_step + f.back_after_steps, f.node) for f in failures if f.back_after_steps is not None]
    changes = {number for number, _ in gone + back if number <= steps}
    needed: dict[int, F64] = {}  # after which step: (runs, nodes) seconds at which the results of rounds have come
    done = 0
    for number in sorted(begins | before | ends | changes | {steps}):
        clock.compute(number - done)
        done = number
        for node in (node for at_step, node in gone if at_step == number):
            clock.is_up[node] = False
        for node in (node for at_step, node in back if at_step == number):
            clock.start(node)
            meeting.known[node] = True
        if number in begins:
            clock.seconds[:, clock.is_up] += exchange.encode_s
            result, end = meeting.hold(clock), min(number + exchange.overlap_steps, steps)
            needed[end] = np.maximum(result, needed[end]) if end in needed else result
        if number in needed:
            clock.wait(needed.pop(number))
    return Simulated(
        total_s=clock.seconds.max(axis=1),
        computed_s=clock.computed_s,
        waited_s=clock.waited_s,
        down_s=clock.down_s + np.where(clock.is_up, 0.0, clock.seconds.max(axis=1, keepdims=True) - clock.seconds),
        sent_bytes=meeting.sent_bytes,
        rounds=meeting.count,
        missed=meeting.missed,
    )


class _StepTimes:
    """Draws what steps take each node: its slowest rank's time, times its factor."""

    def __init__(self, links: LinkModel, step: Times, slow: Mapping[int, float], rng: np.random.Generator) -> None:
        node_of_rank = np.array(links.node_of_rank)
        self._by_node = np.argsort(node_of_rank, kind="stable")
        self._firsts = np.searchsorted(node_of_rank[self._by_node], np.arange(len(links.bytes_per_s)))
        self._is_one_each = len(self._firsts) == links.ranks
        self._step, self._rng, self._ranks = step, rng, links.ranks
        self._factor = np.ones(len(self._firsts))
        for node, factor in slow.items():
            self._factor[node] = factor

    def add_up(self, count: int, runs: int) -> F64:
        """(runs, nodes) seconds of the next `count` steps."""
        if not self._step.spread:
            return np.tile(count * self._step.mean_s * self._factor, (runs, 1))
        total = np.zeros((runs, len(self._factor)))
        at_once = max(1, _DRAWN_AT_ONCE // (runs * self._ranks))
        for first in range(0, count, at_once):
            drawn = self._step.draw(self._rng, (min(at_once, count - first), runs, self._ranks))
            if not self._is_one_each:
                drawn = np.maximum.reduceat(drawn[..., self._by_node], self._firsts, axis=2)
            total += drawn.sum(axis=0)
        return total * self._factor


class _Clock:
    """Where each node is in time, and what it has spent it on; all arrays (runs, nodes) but is_up: (nodes,)."""

    def __init__(self, times: _StepTimes, runs: int, nodes: int) -> None:
        self._times, self.is_up = times, np.ones(nodes, bool)
        self.seconds, self.last_step_s = np.zeros((runs, nodes)), np.zeros((runs, nodes))
        self.computed_s, self.waited_s, self.down_s = (np.zeros((runs, nodes)) for _ in range(3))

    def compute(self, count: int) -> None:
        if count:
            took_s = self._times.add_up(count, len(self.seconds)) * self.is_up
            self.seconds += took_s
            self.computed_s += took_s
            self.last_step_s = took_s / count

    def wait(self, until: F64) -> None:
        waits_s = np.maximum(until - self.seconds, 0.0) * self.is_up
        self.waited_s += waits_s
        self.seconds = np.where(waits_s > 0, until, self.seconds)

    def start(self, node: int) -> None:
        now = np.median(self.seconds[:, self.is_up], axis=1) if self.is_up.any() else self.seconds[:, node]
        now = np.maximum(now, self.seconds[:, node])
        self.down_s[:, node] += now - self.seconds[:, node]
        self.seconds[:, node] = now
        self.is_up[node] = True


class _Meeting:
    """Holds the rounds: draws the groups, and finds when each node has the result."""

    def __init__(self, pipes: Pipes, exchange: Exchange, seed: int, runs: int) -> None:
        self._pipes, self._exchange, self._seed = pipes, exchange, seed
        self.known = np.ones(pipes.nodes, bool)  # up, as far as the others know
        self._free_s = np.zeros((runs, pipes.nodes))  # when each node's link has done the exchanges so far
        self.sent_bytes, self.missed, self.count = np.zeros(pipes.nodes), np.zeros(pipes.nodes, np.int64), 0
        self._of_bucket = [replace(one, nbytes=one.nbytes / exchange.buckets) for one in exchange.collectives]
        self._last: tuple[bytes, F64, F64] | None = None

    def hold(self, clock: _Clock) -> F64:
        """(runs, nodes) seconds at which each node has the result of the next round; -inf if it gets none."""
        exchange, members = self._exchange, np.flatnonzero(self.known)
        if exchange.group_size is None or len(members) < 2:
            expected = Groups.cut(members, max(1, len(members)))
        else:
            drawn = random_order(len(members), exchange.group_size, self._seed, self.count)
            expected = Groups.cut(members[drawn], exchange.group_size)
        groups, has_lost = expected.among(clock.is_up)
        self.known &= clock.is_up
        self.count += 1
        seconds, sent = self._cost(groups)
        order, sizes = groups.order, groups.sizes
        gets_one = np.repeat(sizes > 1, sizes)
        self.sent_bytes[order] += sent
        self.missed += 1
        self.missed[order[gets_one]] -= 1
        if exchange.group_size is not None:  # sitting out is no miss
            self.missed[self.known & ~np.isin(np.arange(len(self.known)), expected.order)] -= 1
        result = np.full_like(clock.seconds, -np.inf)
        if len(order):
            done = clock.seconds[:, order]
            ready = np.maximum.reduceat(done, groups.starts, axis=1)  # (runs, groups)
            begin = done - exchange.early * clock.last_step_s[:, order]
            begin = np.maximum.reduceat(np.maximum(begin, self._free_s[:, order]), groups.starts, axis=1)
            finish = np.maximum(begin + seconds, ready + seconds / exchange.buckets) + has_lost * exchange.timeout_s
            result[:, order] = np.repeat(finish, sizes, axis=1)
            self._free_s[:, order] = result[:, order]
        return result

    def _cost(self, groups: Groups) -> tuple[F64, F64]:
        """`Pipes.round` for all buckets, computed again only if the groups have changed."""
        key = groups.order.tobytes()
        if self._last is None or self._last[0] != key:
            seconds, sent = self._pipes.round(groups, self._of_bucket)
            self._last = (key, seconds * self._exchange.buckets, sent * self._exchange.buckets)
        return self._last[1:]
