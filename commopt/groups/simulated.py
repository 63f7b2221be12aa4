"""Ranks as threads of one process, with virtual time from a LinkModel: 64 ranks on a laptop, no network."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from commopt.errors import GroupError
from commopt.groups.base import Group, Traffic, summed
from commopt.groups.simulated_peers import NO_END, Killed, PostOffice, SimFault, SimPeers
from commopt.groups.world import World
from commopt.plan.links import LinkModel, rounds
from commopt.wire.payload import Layout, Payload, gathered_bytes

T = TypeVar("T")


class _Released(GroupError):
    """Raised on a rank that waits for what another rank will not do."""


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
        self.meetings: dict[tuple[int, ...], dict[int, Any]] = {}  # by members: what those who have come put down
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
        for other in (*range(rank + 1, self.ranks), *range(rank + 1)):
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
        x.copy_(summed(self._meet_alike("all_reduce", x)))

    def all_gather(self, payload: Payload, layouts: Sequence[Layout] | None = None) -> list[Payload]:
        nbytes = payload.nbytes if self.is_spread else gathered_bytes(layouts or [payload.layout])
        sent = self._count("all_gather", nbytes)
        copied = replace(payload, buffer=payload.buffer.clone())
        gathered: list[Payload] = self._meet("all_gather", copied, sent)
        for rank, one in enumerate(gathered):
            if one.layout != (payload.layout if layouts is None else layouts[rank]):
                raise GroupError(f"all_gather: rank {rank} sent another layout than rank {self.rank} expects")
        return gathered

    def all_to_all(self, payloads: Sequence[Payload]) -> list[Payload]:
        sent = self._count_direct("all_to_all", payloads)
        copied = [replace(payload, buffer=payload.buffer.clone()) for payload in payloads]
        everything = self._meet("all_to_all", copied, sent)
        received: list[Payload] = [row[self.rank] for row in everything]
        if any(one.layout != payloads[self.rank].layout for one in received):
            raise GroupError(f"all_to_all: ranks sent rank {self.rank} different layouts")
        return received

    def broadcast(self, x: Tensor, src: int = 0) -> None:
        x.copy_(self._meet_alike("broadcast", x, src)[src])

    def tell(self, text: str) -> list[str]:
        """Takes no virtual time."""
        return [words for words, _, _ in self._put_down("tell", text, {})]

    def _put_down(self, operation: str, contribution: Any, sent: Mapping[int, float]) -> list[tuple[Any, Any, float]]:
        """Put one contribution down and take everybody's up: by rank, each with what it sends and with the rank's clock."""
        world = self.world
        meeting = world.meetings.setdefault(self.members, {})
        meeting[self.rank] = operation, (contribution, sent, self.seconds)
        if len(meeting) < self.size:
            world.office.waiting[self.place] = NO_END
            world.wait(self.place, lambda: world.meetings.get(self.members) is not meeting, operation)
        else:
            del world.meetings[self.members]
            for place in self.members:
                world.office.waiting.pop(place, None)
        asked = {name for name, _ in meeting.values()}
        if len(asked) > 1:
            what = "one of them is at attach, save or load" if "tell" in asked else ", ".join(sorted(asked))
            raise GroupError(f"ranks ask for different exchanges at the same time: {what}")
        return [meeting[rank][1] for rank in range(self.size)]

    def _meet(self, operation: str, contribution: Any, sent: Mapping[int, float]) -> list[Any]:
        """Exchange contributions, and move all clocks to the end of the exchange."""
        contributions, sends, clocks = zip(*self._put_down(operation, contribution, sent), strict=True)
        cost_s = self.links.seconds(sends, rounds(operation, self.size)) if self.links else 0.0
        self.world.clocks[self.place] = max(clocks) + cost_s
        return list(contributions)

    def _meet_alike(self, operation: str, x: Tensor, root: int = 0) -> list[Tensor]:
        """Exchange tensors of one shape and dtype."""
        parts = self._meet(operation, x.clone(), self._count(operation, x.nbytes, root=root))
        for rank, part in enumerate(parts):
            if (part.shape, part.dtype) != (parts[0].shape, parts[0].dtype):
                raise GroupError(
                    f"{operation}: rank {rank} has {tuple(part.shape)} {part.dtype}, rank 0 {tuple(parts[0].shape)} {parts[0].dtype}"
                )
        return parts
