"""Ranks as threads of one process, with virtual time from a LinkModel: 64 ranks on a laptop, no network."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from commopt.errors import GroupError
from commopt.groups.base import Group, Traffic, summed
from commopt.groups.simulated_peers import NO_END, Killed, PostOffice, SimFault, SimPeers
from commopt.groups.world import World
from commopt.plan.links import LinkModel, rounds
from commopt.wire.payload import Layout, Payload, cut, gathered_bytes, joined, layout_bytes

T = TypeVar("T")


class _Released(GroupError):
    """Raised on a rank that waits for what another rank will not do."""


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Look for garbage in cycles less often: 256 ranks hold some 65,000 messages at a time, and none is in a cycle."""
    before = gc.get_threshold()
    gc.set_threshold(max(before[0], 100_000) if before[0] else 0, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


class SimWorld(Generic[T]):
    """`SimWorld(64, links).run(train)` calls train(group) on 64 threads and returns what each returned, by rank.

    Sums are taken in rank order. `links` gives each exchange its virtual seconds; without it exchanges are free.
    faults: entries as in a run's YAML, for outer methods ({at_step: 120, kill: 2}, {at_step: 150, cut: [0, 1], for_s: 20}, ...). Each
    begins at that step of the rank that it hits (a cut: of the first), a restart at that step of the lowest rank that is up. A killed
    rank returns None. {at_step: 20, add: 3} starts the last rank then, of which the others were not told. One rank computes at a time,
    until it waits for others, as threads that compete for the interpreter take up to twice as long. Only a rank's own thread may use
    its group. timeout_s: real seconds that a rank may compute while others wait for it.
    """

    def __init__(
        self,
        ranks: int,
        links: LinkModel | None = None,
        *,
        timeout_s: float = 300.0,
        faults: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        if ranks < 1:
            raise ValueError(f"a world has at least 1 rank, got {ranks}")
        if links is not None and links.ranks != ranks:
            raise ValueError(f"the link model describes {links.ranks} ranks, the world has {ranks}")
        self.ranks, self.links, self.timeout_s = ranks, links, timeout_s
        self.clocks = [0.0] * ranks
        self.meetings: dict[tuple[int, ...], _Meeting] = {}  # by members
        self.faults = [fault for entry in faults for fault in SimFault.all_of(entry, ranks)]
        self.office = PostOffice(self)

    def run(self, train: Callable[[SimGroup], T]) -> list[T]:
        """Run `train` on every rank. Raises what the first failing rank raised; the others stop."""
        self._train, self._results, self._errors = train, dict[int, T](), dict[int, BaseException]()
        self.meetings.clear()
        self._waits: dict[int, tuple[Callable[[], bool], threading.Lock]] = {}  # when a rank may go on, what wakes it
        self._turns = 0
        self.office = PostOffice(self)
        self._threads: list[threading.Thread] = []
        with _rare_collections():
            for rank in sorted(set(range(self.ranks)) - self.office.added):
                self.start(rank)
            self._pass_on(-1)
            for thread in self._threads:  # grows while faults restart ranks
                thread.join()
        if self._errors:
            raise min(self._errors.values(), key=lambda error: isinstance(error, _Released))
        return [cast(T, self._results.get(rank)) for rank in range(self.ranks)]

    def start(self, rank: int) -> None:
        """Start the thread of a rank, which waits for its turn; for `run`, and for a fault that restarts a rank."""
        turn = threading.Lock()
        turn.acquire()
        self._waits[rank] = (lambda: True), turn
        thread = threading.Thread(target=self._work, args=(rank, turn), name=f"rank {rank}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def wait(self, rank: int, is_over: Callable[[], bool], what: str = "peers") -> None:
        """Let others compute until `is_over`. Raises GroupError if it never is, or if one turn takes `timeout_s` of real time."""
        if not is_over():
            turn = threading.Lock()
            turn.acquire()
            self._waits[rank] = is_over, turn
            self._pass_on(rank)
            turns = -1
            while not turn.acquire(timeout=self.timeout_s):
                if turns == self._turns:
                    self.office.is_broken = True
                    self._waits.pop(rank, None)
                    break
                turns = self._turns
        if self.office.is_broken:
            raise _Released(f"{what}: another rank failed, has ended, or did not join within {self.timeout_s:g} s")

    def _pass_on(self, rank: int) -> None:
        """Give the turn to the next rank that can go on; if none can, all of them fail."""
        for other in chain(range(rank + 1, self.ranks), range(rank + 1)):
            if other in self._waits and (self.office.is_broken or self._waits[other][0]()):
                self._turns += 1
                self._waits.pop(other)[1].release()
                return
        if self._waits:
            self.office.is_broken = True
            self._pass_on(rank)

    def _work(self, rank: int, turn: threading.Lock) -> None:
        turn.acquire()
        torch.set_num_threads(torch.get_num_threads())  # a new thread's MKL does not know the number
        try:
            self._results[rank] = self._train(SimGroup(self, rank))
        except Killed:
            pass
        except BaseException as error:
            self._errors[rank] = error
            self.office.is_broken = True
        self.office.gone_s[rank], self.office.waiting[rank] = self.clocks[rank], NO_END
        self._pass_on(rank)

    @property
    def seconds(self) -> float:
        """Virtual seconds of the slowest rank so far."""
        return max(self.clocks)


class SimGroup(Group):
    """One rank's view of a SimWorld, or of some of its ranks."""

    def __init__(
        self, world: SimWorld[Any], rank: int, members: Sequence[int] | None = None, links: LinkModel | None = None
    ) -> None:
        self.members = tuple(range(world.ranks) if members is None else members)
        self.world, self.place, self.traffic = world, rank, Traffic()
        self.links = world.links if members is None else links
        self.rank, self.size = self.members.index(rank), len(self.members)
        self.peers = SimPeers(world.office, rank, self.traffic, self.members)

    def by_machine(self, ranks: int) -> World:
        """The ranks on machines of `ranks` each, which take no time among themselves; the world's links are between machines.

        Raises ValueError if the ranks, or the nodes of the links, are not such machines.
        """
        machines = tuple(rank // ranks for rank in range(self.size))
        if self.size % ranks or (self.links is not None and self.links.node_of_rank != machines):
            raise ValueError(f"{self.size} ranks, or the nodes of their links, are not machines of {ranks} ranks")
        first, links = self.rank - self.rank % ranks, self.links and self.links.of_one_rank(ranks)
        inside = SimGroup(self.world, self.place, range(first, first + ranks))
        between = SimGroup(self.world, self.place, range(self.rank % ranks, self.size, ranks), links)
        return World(inside, between, is_even=True)

    @property
    def is_spread(self) -> bool:
        return self.links is None or len(set(self.links.node_of_rank)) == self.size

    @property
    def seconds(self) -> float:
        """This rank's virtual clock."""
        return self.world.clocks[self.place]

    def advance(self, seconds: float) -> None:
        """Spend virtual time, such as that of a training step's arithmetic."""
        self.world.clocks[self.place] += seconds * self.world.office.slowness(self.place)

    def all_reduce(self, x: Tensor) -> None:
        sent = self._count("all_reduce", x.nbytes)
        x.copy_(self._meet("all_reduce", x, sent, lambda parts: summed(_alike("all_reduce", parts))))

    def all_gather(self, payload: Payload, layouts: Sequence[Layout] | None = None) -> list[Payload]:
        nbytes = payload.nbytes if self.is_spread else gathered_bytes(layouts or [payload.layout])
        sent, expected = self._count("all_gather", nbytes), layouts or [payload.layout] * self.size
        gathered = self._meet("all_gather", Payload(payload.buffer.clone(), payload.layout), sent, tuple)
        for rank, (one, layout) in enumerate(zip(gathered, expected, strict=True)):
            if one.layout != layout:
                raise GroupError(f"all_gather: rank {rank} sent another layout than rank {self.rank} expects")
        return list(gathered)

    def all_to_all(self, payloads: Sequence[Payload]) -> list[Payload]:
        sent, layouts = self._count_direct("all_to_all", payloads), tuple(payload.layout for payload in payloads)
        columns = self._meet("all_to_all", (joined(payloads), layouts), sent, _columns)
        return cut(columns[self.rank].flatten(), [layouts[self.rank]] * self.size)

    def broadcast(self, x: Tensor, src: int = 0) -> None:
        sent = self._count("broadcast", x.nbytes, root=src)
        x.copy_(self._meet("broadcast", x, sent, lambda parts: _alike("broadcast", parts)[src].clone()))

    def tell(self, text: str) -> list[str]:
        """Takes no virtual time."""
        return list(self._meet("tell", text, None, tuple))

    def _meet(
        self, operation: str, own: Any, sent: Mapping[int, float] | None, make: Callable[[Sequence[Any]], T]
    ) -> T:
        """Return what `make` makes of all ranks' own: it is called once, while all wait, and all get the same object.

        Moves all clocks to the end of the exchange; sent: the bytes for each peer, None if it takes no virtual time. Raises GroupError on
        all ranks if `make` does, or if they ask for different operations.
        """
        world = self.world
        meeting = world.meetings.setdefault(self.members, _Meeting())
        meeting.came[self.rank] = operation, own, sent, self.seconds
        if len(meeting.came) < self.size:
            world.office.waiting[self.place] = NO_END
            world.wait(self.place, lambda: meeting.is_over, operation)
        else:
            del world.meetings[self.members]
            for place in self.members:
                world.office.waiting.pop(place, None)
            meeting.end(self.links, make)
        if meeting.failure:
            raise GroupError(meeting.failure)
        if sent is not None:
            world.clocks[self.place] = meeting.end_s
        return cast(T, meeting.made)


@dataclass(eq=False)
class _Meeting:
    """An exchange of some ranks: what those who have come put down, and what the last of them made of it for all."""

    came: dict[int, tuple[str, Any, Any, float]] = field(default_factory=dict)
    made: Any = None
    end_s: float = 0.0
    failure: str = ""
    is_over: bool = False

    def end(self, links: LinkModel | None, make: Callable[[Sequence[Any]], Any]) -> None:
        ranks = range(len(self.came))
        operations, every, sent, clocks = zip(*(self.came[rank] for rank in ranks), strict=True)
        asked = sorted(set(operations))
        if len(asked) > 1:
            what = "one of them is at attach, save or load" if "tell" in asked else ", ".join(asked)
            self.failure = f"ranks ask for different exchanges at the same time: {what}"
        else:
            try:
                self.made = make(every)
            except GroupError as error:
                self.failure = str(error)
            takes_time = links is not None and asked != ["tell"]
            cost_s = links.seconds(sent, rounds(asked[0], len(ranks))) if links and takes_time else 0.0
            self.end_s = max(clocks) + cost_s
        self.is_over = True


def _alike(operation: str, parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Tensors that must have one shape and dtype."""
    for rank, part in enumerate(parts):
        if (part.shape, part.dtype) != (parts[0].shape, parts[0].dtype):
            raise GroupError(
                f"{operation}: rank {rank} has {tuple(part.shape)} {part.dtype}, rank 0 {tuple(parts[0].shape)} {parts[0].dtype}"
            )
    return parts


def _columns(sent: Sequence[tuple[Tensor, tuple[Layout, ...]]]) -> Sequence[Tensor]:
    """By receiver, (N, nbytes) u8: what each rank sends it. sent: each rank's payloads end to end, and their layouts."""
    rows, layouts = zip(*sent, strict=True)
    for rank, own in enumerate(layouts):
        if own != layouts[0]:
            raise GroupError(f"all_to_all: rank {rank} sends other layouts than rank 0")
    return torch.split(torch.stack(rows), [layout_bytes(layout) for layout in layouts[0]], dim=1)
