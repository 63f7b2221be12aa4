"""Peers as threads of one process, with virtual time from a LinkModel, and with faults."""

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
_KINDS = ("kill", "restart", "add", "cut", "slow", "hang")
_EACH = ("kill", "slow", "hang")  # each of their ranks is hit at that step of its own
_Wait = tuple[float, Callable[[], bool]]  # a rank's deadline, and whether its wait is over
_COMPUTES: _Wait = (float("inf"), lambda: True)  # of a rank that does not wait
NO_END: _Wait = (float("inf"), lambda: False)  # of a rank that has ended, or waits in a collective for all others


class Killed(BaseException):
    """Ends the thread of a rank that a fault kills."""


@dataclass(frozen=True)
class SimFault:
    """A fault: its kind, the ranks that it hits, and at which step of the first of them it begins.

    A restart and an add begin at that step of the lowest rank that is up. Ranks that are added must be the last; the others' lists of
    members are without them.
    """

    kind: str
    ranks: tuple[int, ...]
    at_step: int
    for_s: float = float("inf")
    factor: float = 1.0

    @classmethod
    def all_of(cls, entry: Mapping[str, Any], ranks: int) -> list[SimFault]:
        """Read an entry of a run's YAML, which may hit several ranks; "node2" and 2 are both rank 2. Raises ConfigError."""
        kinds = [kind for kind in _KINDS if kind in entry]
        if len(kinds) != 1 or "at_step" not in entry:
            raise ConfigError(f"faults: {dict(entry)!r}: write at_step and one of {', '.join(_KINDS)}")
        named = entry[kinds[0]]
        names = named if isinstance(named, list | tuple) else [named]
        known = {name: rank for rank in range(ranks) for name in (str(rank), f"node{rank}")}
        if any(str(name) not in known for name in names):
            raise ConfigError(f"faults: {kinds[0]}: {named!r} is not among {ranks} ranks")
        hit = tuple(known[str(name)] for name in names)
        try:
            for_s, factor = float(entry.get("for_s", "inf")), float(entry.get("factor", 1.0))
            step, together = int(entry["at_step"]), [(rank,) for rank in hit] if kinds[0] in _EACH else [hit]
            return [cls(kinds[0], some, step, for_s, factor) for some in together]
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(f"faults: {dict(entry)!r}: at_step, for_s and factor must be numbers") from None


class PostOffice:
    """What the peers of one world share: messages in flight, waiting ranks and their deadlines, ranks that are gone, and faults."""

    def __init__(self, world: SimWorld[Any]) -> None:
        self.world, self.clocks, ranks = world, world.clocks, world.ranks
        # and not there yet
        self.added = {rank for fault in world.faults if fault.kind == "add" for rank in fault.ranks}
        self.on_the_way: list[list[tuple[float, int, str, Letter]]] = [[] for _ in range(ranks)]
        self.waiting: dict[int, _Wait] = dict.fromkeys(self.added, NO_END)
        self.gone_s = dict.fromkeys(self.added, float("-inf"))
        self.progress = [Progress()] * ranks
        self.free_s = [0.0] * ranks  # when the last message of each rank has left it
        self.cuts: list[tuple[frozenset[int], float, float]] = []
        self.slow: dict[int, list[tuple[float, float]]] = {}  # (until, factor)
        self.played: set[int] = set()  # faults, by their place in the list
        self.returned: set[int] = set()
        self.reached = [0] * ranks  # the step that each rank announces, or announced last
        self.is_broken = False

    def may_time_out(self, rank: int) -> bool:
        """Whether no rank can still send a message that arrives before this rank's deadline."""
        deadline_s, _ = self.waiting[rank]
        for other in range(self.world.ranks):
            until_s, is_over = self.waiting.get(other, _COMPUTES)
            sends = self.clocks[other] <= deadline_s if is_over() else (until_s, other) < (deadline_s, rank)
            if sends:
                return False
        return True

    def down_s(self, rank: int, peer: int) -> float:
        """When a rank notices that a peer is down, as it died or is cut off: DETECT_S after that; inf for one that is up."""
        since_s = [self.gone_s[peer]] if peer in self.gone_s else []
        since_s += [begin_s for pair, begin_s, end_s in self.cuts if pair == {rank, peer} and self.clocks[rank] < end_s]
        return min(since_s, default=float("inf")) + DETECT_S

    def wait_for_slower(self, rank: int, step: int) -> None:
        """Let ranks whose clock is behind run first, so that what this rank sees of them does not depend on real time."""
        self.reached[rank] = step
        self.world.wait(rank, lambda: not any(self._comes_before(other, rank) for other in range(self.world.ranks)))

    def _comes_before(self, other: int, rank: int) -> bool:
        until_s, is_over = self.waiting.get(other, _COMPUTES)
        if not is_over():
            return until_s < self.clocks[rank]
        return (self.clocks[other], self.reached[other]) < (self.clocks[rank], self.reached[rank])

    def deliver_s(self, sender: int, receiver: int, nbytes: int, expires_s: float) -> float | None:
        """When a message sent now arrives; None if a cut loses it."""
        links, now = self.world.links, self.clocks[sender]
        ready_s = start_s = max(now, self.free_s[sender])
        for pair, begin_s, end_s in self.cuts:
            if pair == {sender, receiver} and begin_s <= start_s < end_s:
                start_s = end_s
        if start_s > now + expires_s or start_s == float("inf"):
            return None
        if links is None:
            return start_s
        took_s = links.message_seconds(sender, receiver, nbytes)
        if start_s == ready_s:  # a message that a cut holds back does not delay others
            self.free_s[sender] = start_s + took_s - links.latency_s[links.node_of_rank[sender]]
        return start_s + took_s

    def play(self, rank: int, step: int) -> None:
        """Begin the faults that are due at this step of this rank."""
        for number, fault in enumerate(self.world.faults):
            up = [r for r in range(self.world.ranks) if r not in self.gone_s]
            witnesses = up if fault.kind in ("restart", "add") else fault.ranks
            if number in self.played or step < fault.at_step or rank not in witnesses[:1]:
                continue
            self.played.add(number)
            now = self.clocks[rank]
            if fault.kind == "cut":
                self.cuts.append((frozenset(fault.ranks), now, now + fault.for_s))
            elif fault.kind == "slow":
                self.slow.setdefault(rank, []).append((now + fault.for_s, fault.factor))
            elif fault.kind == "hang":
                self.clocks[rank] += fault.for_s
            elif fault.kind == "kill":
                raise Killed
            else:
                for dead in fault.ranks:
                    if self.gone_s.pop(dead, None) is not None:
                        del self.waiting[dead]
                        self.on_the_way[dead].clear()
                        self.returned |= {dead} - self.added
                        self.added.discard(dead)
                        self.progress[dead], self.reached[dead] = Progress(), 0
                        self.clocks[dead] = self.free_s[dead] = now
                        self.world.start(dead)

    def slowness(self, rank: int) -> float:
        """How many times longer this rank's arithmetic takes now."""
        return max((f for until_s, f in self.slow.get(rank, []) if self.clocks[rank] < until_s), default=1.0)


class SimPeers(Peers):
    """One rank's mailbox in a `SimWorld`, for letters from some of its ranks, the members; place: the rank's number in the world."""

    def __init__(self, office: PostOffice, place: int, traffic: Traffic, members: Sequence[int]) -> None:
        self._office, self._place, self._members = office, place, tuple(members)
        self.rank, self.size, self.traffic = self._members.index(place), self.known, traffic
        self.sizes = ((0, self.size),)
        self._mailbox = Mailbox()
        self._background_s, self.returns = 0.0, place in office.returned

    @property
    def seconds(self) -> float:
        return self._office.clocks[self._place]

    def sleep(self, seconds: float) -> None:
        self.receive(self.rank, "", 0, seconds)  # a rank sends itself nothing

    def start(self, job: Callable[[], T]) -> Callable[[], T]:
        """Run the job now, on a clock of its own; waiting for its result moves this rank's clock to its end."""
        clocks, begin_s = self._office.clocks, self.seconds
        clocks[self._place] = max(begin_s, self._background_s)
        result = job()
        self._background_s = end_s = self.seconds
        clocks[self._place] = begin_s

        def wait() -> T:
            clocks[self._place] = max(self.seconds, end_s)
            return result

        return wait

    def send(self, peer: int, channel: str, sequence: int, payload: Payload, *, expires_s: float = 30.0) -> None:
        office, to = self._office, self._members[peer]
        self.traffic.record(channel, {peer: float(payload.nbytes)})
        arrival_s = office.deliver_s(self._place, to, payload.nbytes, expires_s)
        if arrival_s is not None and to not in office.gone_s:
            letter = Letter(sequence, Payload(payload.buffer.clone(), payload.layout))
            office.on_the_way[to].append((arrival_s, self.rank, channel, letter))

    def receive(
        self, peer: int, channel: str, sequence: int, timeout_s: float, *, or_newer: bool = False
    ) -> Letter | None:
        """Advances this rank's clock to the message's arrival, to when the peer is known to be down, or to the deadline."""
        office, place, deadline_s = self._office, self._place, self.seconds + timeout_s

        def take() -> Letter | None:
            self._sort_in()
            return self._mailbox.take(peer, channel, sequence, or_newer=or_newer)

        def next_s() -> float:
            """The earliest time at which this wait ends, as known now."""
            known_s = [max(self.seconds, office.down_s(place, self._members[peer]))]
            for at_s, sender, name, letter in office.on_the_way[place]:
                is_wanted = letter.sequence >= sequence if or_newer else letter.sequence == sequence
                if (sender, name) == (peer, channel) and is_wanted:
                    known_s.append(at_s)
            return min(known_s)

        def is_over() -> bool:
            return next_s() <= deadline_s

        letter = take()
        if letter is not None or timeout_s <= 0:
            return letter
        office.waiting[place] = deadline_s, is_over
        try:
            office.world.wait(place, lambda: is_over() or office.may_time_out(place))
        finally:
            del office.waiting[place]
        office.clocks[place] = max(self.seconds, min(next_s(), deadline_s))
        return take()

    def drain(self, channel: str) -> list[tuple[int, Letter]]:
        self._office.wait_for_slower(self._place, self._office.reached[self._place])
        self._sort_in()
        return self._mailbox.drain(channel)

    def is_up(self, peer: int) -> bool:
        return self.seconds < self._office.down_s(self._place, self._members[peer])

    def last_progress(self, peer: int) -> Progress:
        return self._office.progress[self._members[peer]]

    @property
    def known(self) -> int:
        return sum(member not in self._office.added for member in self._members)

    def announce(self, step: int, *, is_training: bool = True) -> None:
        self._office.wait_for_slower(self._place, step)
        self._office.progress[self._place] = Progress(step, is_training, self.sizes)
        self._office.play(self._place, step)

    def _sort_in(self) -> None:
        """Move messages that have arrived by this rank's clock into the mailbox."""
        coming = self._office.on_the_way[self._place]
        arrived = sorted((one for one in coming if one[0] <= self.seconds), key=lambda one: one[:2])
        for _, sender, channel, letter in arrived:
            self._mailbox.put(sender, channel, letter)
        coming[:] = [one for one in coming if one[0] > self.seconds]
