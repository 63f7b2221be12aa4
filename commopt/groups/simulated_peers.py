"""Peers as threads of one process, with virtual time: who waits, waits by the clock of the links, and faults are played on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from commopt.errors import ConfigError
from commopt.groups.base import Traffic
from commopt.groups.peers import Letter, Mailbox, Peers, Progress
from commopt.wire.payload import Payload

if TYPE_CHECKING:
    from commopt.groups.simulated import SimWorld

DETECT_S = 1.0  # virtual seconds after which a peer that died or cannot be reached is known to be down
T = TypeVar("T")
_KINDS = ("kill", "restart", "cut", "slow", "hang")
_EACH = ("kill", "slow", "hang")  # these befall each of their ranks at a step of its own


class Killed(BaseException):
    """Ends the thread of a rank that a fault kills."""


@dataclass(frozen=True)
class SimFault:
    """One fault: its kind, the ranks that it hits, and the step of each (a cut: of the first) of them at which it begins."""

    kind: str
    ranks: tuple[int, ...]
    at_step: int
    for_s: float = float("inf")
    factor: float = 1.0

    @classmethod
    def of(cls, entry: Mapping[str, Any], ranks: int) -> SimFault:
        """Read an entry as it stands in a run's YAML; "node2" and 2 are both rank 2. Raises ConfigError."""
        kinds = [kind for kind in _KINDS if kind in entry]
        if len(kinds) != 1 or "at_step" not in entry:
            raise ConfigError(f"faults: {dict(entry)!r}: write at_step and one of {', '.join(_KINDS)}")
        named = entry[kinds[0]]
        hit = tuple(
            int(str(name).removeprefix("node")) for name in (named if isinstance(named, list | tuple) else [named])
        )
        if any(not 0 <= rank < ranks for rank in hit):
            raise ConfigError(f"faults: {kinds[0]}: {named!r} is not among {ranks} ranks")
        for_s, factor = float(entry.get("for_s", "inf")), float(entry.get("factor", 1.0))
        return cls(kinds[0], hit, int(entry["at_step"]), for_s, factor)


@dataclass
class _Waiting:
    deadline_s: float
    is_over: Callable[[], bool]


class PostOffice:
    """What the peers of one world share: letters on their way, who waits until when, who is gone, and the faults."""

    def __init__(self, world: SimWorld[Any], faults: Sequence[Mapping[str, Any]]) -> None:
        self.world = world
        self.faults = [SimFault.of(entry, world.ranks) for entry in faults]
        self.reset()

    def reset(self) -> None:
        ranks = self.world.ranks
        self.on_the_way: list[list[tuple[float, int, str, Letter]]] = [[] for _ in range(ranks)]
        self.waiting: dict[int, _Waiting] = {}
        self.gone_s: dict[int, float] = {}
        self.progress = [Progress(0, False)] * ranks
        self.free_s = [0.0] * ranks  # when what a rank has sent so far has left it
        self.cuts: list[tuple[frozenset[int], float, float]] = []
        self.slow: dict[int, list[tuple[float, float]]] = {}  # (until, factor)
        self.played: set[tuple[SimFault, int]] = set()
        self.returned: set[int] = set()
        self.reached = [0] * ranks  # the step that each rank announces, or announced last
        self.parked: set[int] = set()  # ranks in a collective, which wait for all others
        self.is_broken = False

    def clock(self, rank: int) -> float:
        return self.world.clocks[rank]

    def may_time_out(self, rank: int) -> bool:
        """Whether nobody can still send something that arrives before this rank's deadline."""
        deadline = (self.waiting[rank].deadline_s, rank)
        for other in range(self.world.ranks):
            if other == rank or other in self.gone_s:
                continue
            wait = self.waiting.get(other)
            if wait is None or wait.is_over():
                if self.clock(other) <= deadline[0]:
                    return False
            elif (wait.deadline_s, other) < deadline:
                return False
        return True

    def down_s(self, rank: int, peer: int) -> float:
        """When a rank takes a peer to be down, which died or is cut off from it: some time after it was last heard; inf if never."""
        since_s = [self.gone_s[peer]] if peer in self.gone_s else []
        since_s += [begin_s for pair, begin_s, end_s in self.cuts if pair == {rank, peer} and self.clock(rank) < end_s]
        return min(since_s, default=float("inf")) + DETECT_S

    def wait_for_slower(self, rank: int, step: int) -> None:
        """Let those run first whose clock is behind this rank's, so that what they are seen to do does not depend on real time."""
        self.reached[rank] = step
        others = [other for other in range(self.world.ranks) if other != rank]
        self.world.wait(rank, lambda: not any(self._comes_before(other, rank) for other in others))

    def _comes_before(self, other: int, rank: int) -> bool:
        if other in self.gone_s or other in self.parked:
            return False
        wait = self.waiting.get(other)
        if wait is not None and not wait.is_over():
            return wait.deadline_s < self.clock(rank)
        return (self.clock(other), self.reached[other]) < (self.clock(rank), self.reached[rank])

    def deliver_s(self, sender: int, receiver: int, nbytes: int, expires_s: float) -> float | None:
        """When a message sent now arrives; None if a cut loses it."""
        links, now = self.world.links, self.clock(sender)
        ready_s = start_s = max(now, self.free_s[sender])
        for pair, begin_s, end_s in self.cuts:
            if pair == {sender, receiver} and begin_s <= start_s < end_s:
                start_s = end_s
        if start_s > now + expires_s or start_s == float("inf"):
            return None
        if links is None:
            return start_s
        sent: list[Mapping[int, float]] = [{} for _ in range(self.world.ranks)]
        sent[sender] = {receiver: float(nbytes)}
        took_s = links.seconds(sent)
        if start_s == ready_s:  # what a cut holds back does not hold up messages to others
            self.free_s[sender] = start_s + took_s - links.latency_s[links.node_of_rank[sender]]
        return start_s + took_s

    def play(self, rank: int, step: int) -> None:
        """Begin the faults whose time has come by the step of the rank that they hit, or that a restart is seen from."""
        for fault in self.faults:
            key = (fault, rank if fault.kind in _EACH else -1)
            if key in self.played or step < fault.at_step or rank not in self._witnesses(fault):
                continue
            self.played.add(key)
            now = self.clock(rank)
            if fault.kind == "cut":
                self.cuts.append((frozenset(fault.ranks), now, now + fault.for_s))
            elif fault.kind == "slow":
                self.slow.setdefault(rank, []).append((now + fault.for_s, fault.factor))
            elif fault.kind == "hang":
                self.world.clocks[rank] += fault.for_s
            elif fault.kind == "kill":
                raise Killed
            elif fault.kind == "restart":
                for dead in fault.ranks:
                    if self.gone_s.pop(dead, None) is not None:
                        self.on_the_way[dead].clear()
                        self.returned.add(dead)
                        self.progress[dead], self.reached[dead] = Progress(0, False), 0
                        self.world.clocks[dead] = self.free_s[dead] = now
                        self.world.start(dead)

    def _witnesses(self, fault: SimFault) -> Sequence[int]:
        """The ranks whose step tells when a fault begins."""
        if fault.kind in _EACH:
            return fault.ranks
        if fault.kind == "cut":
            return fault.ranks[:1]
        return [next((r for r in range(self.world.ranks) if r not in self.gone_s), -1)]

    def slowness(self, rank: int) -> float:
        """How many times longer this rank's arithmetic takes now."""
        return max((f for until_s, f in self.slow.get(rank, []) if self.clock(rank) < until_s), default=1.0)


class SimPeers(Peers):
    """One rank's mailbox in a `SimWorld`."""

    def __init__(self, office: PostOffice, rank: int, traffic: Traffic) -> None:
        self._office, self.rank, self.size = office, rank, office.world.ranks
        self.traffic = traffic
        self._mailbox = Mailbox()
        self._background_s, self.returns = 0.0, rank in office.returned

    @property
    def seconds(self) -> float:
        return self._office.clock(self.rank)

    def sleep(self, seconds: float) -> None:
        self._wait(seconds, lambda: None)

    def start(self, job: Callable[[], T]) -> Callable[[], T]:
        """The job runs now, on a clock of its own: what it waits for is in the past of the thread that waits for the job."""
        clocks, begin_s = self._office.world.clocks, self.seconds
        clocks[self.rank] = max(begin_s, self._background_s)
        result = job()
        self._background_s = end_s = self.seconds
        clocks[self.rank] = begin_s

        def wait() -> T:
            clocks[self.rank] = max(self.seconds, end_s)
            return result

        return wait

    def send(self, peer: int, channel: str, sequence: int, payload: Payload, *, expires_s: float = 30.0) -> None:
        office = self._office
        self.traffic.record(channel, {peer: float(payload.nbytes)})
        arrival_s = office.deliver_s(self.rank, peer, payload.nbytes, expires_s)
        if arrival_s is not None and peer not in office.gone_s:
            letter = Letter(sequence, Payload(payload.buffer.clone(), payload.layout))
            office.on_the_way[peer].append((arrival_s, self.rank, channel, letter))

    def receive(
        self, peer: int, channel: str, sequence: int, timeout_s: float, *, or_newer: bool = False
    ) -> Letter | None:
        def arrivals_s() -> list[float]:
            """When what would do arrives."""
            return [
                at_s
                for at_s, sender, name, letter in self._office.on_the_way[self.rank]
                if (sender, name) == (peer, channel)
                and letter.sequence >= sequence
                and (or_newer or letter.sequence == sequence)
            ]

        def take() -> Letter | None:
            self._sort_in()
            return self._mailbox.take(peer, channel, sequence, or_newer=or_newer)

        return self._wait(timeout_s, take, peer=peer, arrivals_s=arrivals_s)

    def drain(self, channel: str) -> list[tuple[int, Letter]]:
        self._office.wait_for_slower(self.rank, self._office.reached[self.rank])
        self._sort_in()
        return self._mailbox.drain(channel)

    def is_up(self, peer: int) -> bool:
        return self.seconds < self._office.down_s(self.rank, peer)

    def progress(self, peer: int) -> Progress | None:
        return self._office.progress[peer] if self.is_up(peer) else None

    def announce(self, step: int, *, is_training: bool = True) -> None:
        self._office.wait_for_slower(self.rank, step)
        self._office.progress[self.rank] = Progress(step, is_training)
        self._office.play(self.rank, step)

    def _sort_in(self) -> None:
        """Move what has arrived by this rank's clock into the mailbox."""
        coming = self._office.on_the_way[self.rank]
        arrived = sorted((one for one in coming if one[0] <= self.seconds), key=lambda one: one[:2])
        for _, sender, channel, letter in arrived:
            self._mailbox.put(sender, channel, letter)
        coming[:] = [one for one in coming if one[0] > self.seconds]

    def _wait(
        self,
        timeout_s: float,
        take: Callable[[], Letter | None],
        *,
        peer: int | None = None,
        arrivals_s: Callable[[], list[float]] = list,
    ) -> Letter | None:
        """Advance this rank's clock to the arrival that it waits for, to the peer's end being known, or to the deadline."""
        office, rank = self._office, self.rank
        letter = take()
        if letter is not None or timeout_s <= 0:
            return letter
        deadline_s = self.seconds + timeout_s

        def next_s() -> float:
            """The earliest moment at which this wait is over by what is known now."""
            known_s = arrivals_s()
            if peer is not None:
                known_s.append(max(self.seconds, office.down_s(rank, peer)))
            return min(known_s, default=float("inf"))

        office.waiting[rank] = _Waiting(deadline_s, lambda: next_s() <= deadline_s)
        try:
            office.world.wait(rank, lambda: next_s() <= deadline_s or office.may_time_out(rank))
        finally:
            del office.waiting[rank]
        office.world.clocks[rank] = max(self.seconds, min(next_s(), deadline_s))
        return take()
