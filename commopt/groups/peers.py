"""Members that come and go: a mailbox between any two of them, and a group of those that are up.

A `Group` needs every rank in every call. `Peers` does not: a message waits in the receiver's mailbox until it is read.
So a rank that is ahead, behind, dead or unreachable costs another one at most the timeout of one `receive`.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from commopt.errors import GroupError
from commopt.groups.base import Group, Traffic, summed
from commopt.wire.payload import Layout, Payload

ROOM_BYTES = 1 << 30  # for the unread messages of one peer, until it is known how large the model is
KEPT = 8  # unread messages that are kept per channel and peer, the newest
GROUP = "group "  # prefix of the channels of a PeerGroup, whose messages are all kept
T = TypeVar("T")
_SMALL = 1024  # bytes up to which an all-reduce is a gather: one message round instead of two
_PIECE, _PIECES = 1 << 21, 64  # of a larger all-reduce: least elements of a piece, most pieces


Sizes = tuple[tuple[int, int], ...]  # (round, members): how many members a job has from which round on


@dataclass(frozen=True)
class Progress:
    """What a peer last reported: optimizer steps done, and whether it trains (not if it still joins, or has left)."""

    step: int = 0
    is_training: bool = False
    sizes: Sizes = ()


def size_at(sizes: Sizes, round: int) -> int:
    """The number of members that are drawn from in a round."""
    return max((members for first, members in sizes if first <= round), default=0)


def merged(own: Sizes, theirs: Sizes) -> Sizes:
    """What two members know, which is the same in any order: of two rounds for the same number of members the later one counts."""
    first: dict[int, int] = {}
    for round, members in (*own, *theirs):
        first[members] = max(round, first.get(members, 0))
    return tuple((round, members) for members, round in sorted(first.items()))


@dataclass(frozen=True)
class Letter:
    """A message in a mailbox."""

    sequence: int
    payload: Payload

    @property
    def nbytes(self) -> int:
        """About as much memory as it takes."""
        return self.payload.nbytes + 1024


class Mailbox:
    """Unread messages by (peer, channel); not thread-safe, its owner holds a lock."""

    def __init__(self) -> None:
        self._boxes: dict[int, dict[str, dict[int, Letter]]] = {}
        self._most: dict[int, float] = {}  # bytes that each peer's may have at most

    def put(self, peer: int, channel: str, letter: Letter, room_bytes: float = math.inf) -> None:
        """Keep a message; drop the oldest of more than KEPT per channel and peer, and all of a peer if they do not fit into its room."""
        boxes, most = self._boxes.setdefault(peer, {}), self._most.get(peer, 0) + letter.nbytes
        if most > room_bytes:  # what was taken since is still counted
            most = letter.nbytes + sum(one.nbytes for box in boxes.values() for one in box.values())
            if most > room_bytes:
                boxes.clear()
                most = letter.nbytes
        self._most[peer], box = most, boxes.setdefault(channel, {})
        box[letter.sequence] = letter
        if not channel.startswith(GROUP):
            for sequence in sorted(box)[:-KEPT]:
                del box[sequence]

    def take(self, peer: int, channel: str, sequence: int, *, or_newer: bool = False) -> Letter | None:
        """The message with this sequence number, or with `or_newer` the newest later one; drops earlier ones as out of date."""
        box = self._boxes.get(peer, {}).get(channel, {})
        for old in [s for s in box if s < sequence]:
            del box[old]
        if sequence in box:
            return box.pop(sequence)
        return box[max(box)] if box and or_newer else None  # stays in the box, as its own round may still come

    def drain(self, channel: str) -> list[tuple[int, Letter]]:
        """Take all messages of a channel, sorted by peer and sequence."""
        found = [(peer, boxes.pop(channel, {})) for peer, boxes in sorted(self._boxes.items())]
        return [(peer, box[sequence]) for peer, box in found for sequence in sorted(box)]

    def forget(self, peer: int) -> None:
        """Drop what a peer sent before it was restarted."""
        self._most.pop(peer, None)
        self._boxes.pop(peer, None)


class Peers(ABC):
    """The configured members of a job, as one of them sees them.

    Which peers are up is only a hint, from their last messages: it saves a timeout, and nothing else depends on it.
    """

    rank: int  # of this member
    size: int  # how many there are, up or not; the training script's thread lets it grow, up to `known`
    sizes: Sizes  # how many are drawn from in which rounds
    fixed_because: str | None = ""  # why no member can be added; None if one can, "" if that is not known yet
    traffic: Traffic  # what this member has sent
    room_bytes: float = ROOM_BYTES  # for what one peer has sent and nobody has read; nothing larger is taken
    is_used = False  # by an outer run that is open: two would read each other's messages
    returns = False  # whether this member was restarted and has to catch up; known only if the launcher says so

    @abstractmethod
    def send(self, peer: int, channel: str, sequence: int, payload: Payload, *, expires_s: float = 30.0) -> None:
        """Queue a message and return at once; it is dropped if it cannot be delivered within `expires_s`."""

    @abstractmethod
    def receive(
        self, peer: int, channel: str, sequence: int, timeout_s: float, *, or_newer: bool = False
    ) -> Letter | None:
        """The message with this sequence number (or the newest later one); None after `timeout_s`, or at once if the peer is down."""

    @abstractmethod
    def drain(self, channel: str) -> list[tuple[int, Letter]]:
        """Every unread message of a channel, with its sender; does not wait."""

    @abstractmethod
    def is_up(self, peer: int) -> bool:
        """Whether this peer has been heard from lately; true for this member itself."""

    @abstractmethod
    def last_progress(self, peer: int) -> Progress:
        """What a peer last reported, up or not."""

    def progress(self, peer: int) -> Progress | None:
        """What a peer last reported; None if it is down."""
        return self.last_progress(peer) if self.is_up(peer) else None

    @property
    def known(self) -> int:
        """How many members have been heard of; more than `size` if one has been added since."""
        return self.size

    @property
    def refusals(self) -> Mapping[int, str]:
        """Why peers do not let this member in, by peer."""
        return {}

    @property
    def unheard(self) -> list[int]:
        """Peers that this member can reach, and that do not reach it."""
        return []

    def name_of(self, peer: int) -> str:
        return f"rank {peer}"

    @abstractmethod
    def announce(self, step: int, *, is_training: bool = True) -> None:
        """Tell the others how far this member is."""

    @abstractmethod
    def sleep(self, seconds: float) -> None:
        """Let time pass, real or virtual."""

    @abstractmethod
    def start(self, job: Callable[[], T]) -> Callable[[], T]:
        """Run a job in the background, after those started before; the returned function waits for its result."""

    @property
    @abstractmethod
    def seconds(self) -> float:
        """The clock of timeouts, real or virtual."""

    def is_quiet(self) -> bool:
        """Whether everything sent has left this machine and been acknowledged."""
        return True

    def close(self, linger_s: float = 5.0) -> None:
        """Leave, and tell the others; waits at most `linger_s` for unsent messages."""

    @property
    def others(self) -> list[int]:
        return [peer for peer in range(self.size) if peer != self.rank]

    def size_at(self, round: int) -> int:
        """How many members are drawn from in a round."""
        return size_at(self.sizes, round)


class PeerGroup(Group):
    """The members of one exchange as a `Group`; messages go directly from sender to receiver.

    An all-reduce is a reduce-scatter and an all-gather, 2(N-1)/N of the tensor in two message rounds. One member sums each part, in
    rank order, so that all get the same bits. A large tensor goes in pieces, a few of which travel at once, so that messages take
    little memory. `timeout_s` is for all calls together. Each group of a channel needs its own range of sequence numbers, from `first`
    on. Raises GroupError if a member does not answer; the tensor may have changed by then.
    """

    def __init__(self, peers: Peers, members: Sequence[int], channel: str, first: int, timeout_s: float) -> None:
        self.peers, self.members, self.channel = peers, tuple(members), GROUP + channel
        self.rank, self.size = self.members.index(peers.rank), len(self.members)
        self.traffic = peers.traffic
        self._numbers, self._deadline_s = itertools.count(first), peers.seconds + timeout_s

    def all_reduce(self, x: Tensor) -> None:
        if self.size == 1:
            return
        flat = x.detach().reshape(-1)
        if flat.nbytes <= _SMALL:
            flat = summed([one.tensors[0] for one in self.all_gather(Payload.of(flat))])
        else:
            pieces = torch.tensor_split(flat, min(_PIECES, -(-flat.numel() // _PIECE)))
            steps = [self._reduce_(piece) for piece in pieces]
            for at in range(len(steps) + 3):
                for behind in (2, 0, 3):  # an answer goes out before a new piece, for which nobody waits yet
                    if 0 <= at - behind < len(steps):
                        next(steps[at - behind], None)
        x.copy_(flat.view_as(x))

    def _reduce_(self, piece: Tensor) -> Iterator[None]:
        """Replace a piece by its sum: pauses before it waits for the terms of this rank's part, and for the other parts' sums."""
        parts = torch.tensor_split(piece, self.size)
        arrived = self._sent([Payload.of(part) for part in parts])
        yield
        total = Payload.of(summed([one.tensors[0] for one in arrived()]))  # in the order of ranks
        arrived = self._sent([total] * self.size, [((piece.dtype, part.numel()),) for part in parts])
        yield
        for part, one in zip(parts, arrived(), strict=True):
            part.copy_(one.tensors[0])

    def all_gather(self, payload: Payload, layouts: Sequence[Layout] | None = None) -> list[Payload]:
        return self._exchange([payload] * self.size, layouts or [payload.layout] * self.size)

    def all_to_all(self, payloads: Sequence[Payload]) -> list[Payload]:
        return self._exchange(payloads)

    def broadcast(self, x: Tensor, src: int = 0) -> None:
        sequence = next(self._numbers)
        if self.rank != src:
            layout = ((x.dtype, x.numel()),)
            x.copy_(self._receive(src, sequence, layout).tensors[0].view_as(x))
            return
        for peer in range(self.size):
            if peer != src:
                self._send(peer, sequence, Payload.of(x))

    def _exchange(self, payloads: Sequence[Payload], layouts: Sequence[Layout] | None = None) -> list[Payload]:
        """Send payloads[j] to member j; return what each member sent here, by rank."""
        return self._sent(payloads, layouts)()

    def _sent(
        self, payloads: Sequence[Payload], layouts: Sequence[Layout] | None = None
    ) -> Callable[[], list[Payload]]:
        """`_exchange` whose result is waited for later, by the returned function."""
        sequence, own = next(self._numbers), payloads[self.rank]
        order = [(self.rank + k) % self.size for k in range(1, self.size)]  # else all would send to one member first
        for peer in order:
            self._send(peer, sequence, payloads[peer])

        def arrived() -> list[Payload]:
            received = {self.rank: own}
            for peer in order:
                received[peer] = self._receive(peer, sequence, own.layout if layouts is None else layouts[peer])
            return [received[rank] for rank in range(self.size)]

        return arrived

    def _left_s(self) -> float:
        return max(0.0, self._deadline_s - self.peers.seconds)

    def _send(self, peer: int, sequence: int, payload: Payload) -> None:
        self.peers.send(self.members[peer], self.channel, sequence, payload, expires_s=self._left_s())

    def _receive(self, peer: int, sequence: int, layout: Layout) -> Payload:
        letter = self.peers.receive(self.members[peer], self.channel, sequence, self._left_s())
        if letter is None:
            raise GroupError(f"{self.channel}: rank {self.members[peer]} did not answer rank {self.peers.rank} in time")
        if letter.payload.layout != layout:
            raise GroupError(
                f"{self.channel}: rank {self.members[peer]} sent another layout than rank {self.peers.rank}"
            )
        return letter.payload


@dataclass(frozen=True)
class Roll:
    """The members of a round, and the card that each of them sent: (k,) i64, by rank."""

    members: tuple[int, ...]
    cards: Mapping[int, Tensor]


class Latecomers:
    """Peers that were late for a roll. The next roll does not wait for them; later, the next 2, 4 and at most 8 rolls do not."""

    def __init__(self) -> None:
        self._pause: dict[int, int] = {}
        self._left: dict[int, int] = {}

    def is_waited_for(self, peer: int) -> bool:
        """Whether the next roll waits for this peer; counts that roll."""
        left = self._left.get(peer, 0)
        self._left[peer] = max(0, left - 1)
        return left == 0

    def note_late(self, peer: int) -> None:
        """Note that the roll waited for this peer, and it did not come."""
        self._left[peer] = self._pause[peer] = min(8, 2 * self._pause.get(peer, 0) or 1)

    def forget(self, peer: int) -> None:
        """Note that this peer was in time, or is down; the next roll waits for it again if it is up."""
        self._pause.pop(peer, None)
        self._left.pop(peer, None)


def call_roll(
    peers: Peers,
    channel: str,
    sequence: int,
    card: Tensor,
    timeout_s: float,
    *,
    expected: Sequence[int] | None = None,
    late: Latecomers | None = None,
) -> Roll:
    """Agree with the peers that are up on the members of this round; this rank alone if no peer answers.

    The lowest rank that is up convenes: the others send it a card, it waits for peers that it sees as up (at most half of
    `timeout_s`) and sends the list to all that are up. A member whose card comes too late is not in the list, and continues alone
    when it reads that. card: (k,) i64. expected: the ranks that should take part; all of them if None. late: kept by the caller
    between rounds, so that not every round waits for a peer that is up but slow.
    """
    late = Latecomers() if late is None else late
    start_s, alone = peers.seconds, Roll((peers.rank,), {peers.rank: card})
    wanted = sorted(range(peers.size) if expected is None else expected)
    convener = next((peer for peer in wanted if peers.is_up(peer)), peers.rank)
    if convener != peers.rank:
        peers.send(convener, f"{channel} card", sequence, Payload.of(card), expires_s=timeout_s)
        letter = peers.receive(convener, f"{channel} roll", sequence, timeout_s)
        cards = None if letter is None else _cards_of(letter.payload, wanted, card.numel())
        if letter is None or cards is None:
            # withdraw the card: a convener that comes up now must not count on this rank
            peers.send(convener, f"{channel} card", sequence, Payload.of(card[:0]), expires_s=timeout_s)
            return alone
        for peer in wanted:  # a peer without a card cannot reach the convener, and need not wait for it
            if peer not in (peers.rank, convener) and peer not in cards and peers.is_up(peer):
                peers.send(peer, f"{channel} roll", sequence, letter.payload, expires_s=timeout_s)
        return Roll(tuple(cards), {**cards, peers.rank: card}) if peers.rank in cards else alone
    cards = {peers.rank: card}
    for peer in wanted:
        if peer != peers.rank:
            is_waited_for = late.is_waited_for(peer)
            left_s = max(0.0, start_s + timeout_s / 2 - peers.seconds) if is_waited_for else 0.0
            letter = peers.receive(peer, f"{channel} card", sequence, left_s)
            if letter is not None or not peers.is_up(peer):
                late.forget(peer)
            elif is_waited_for:
                late.note_late(peer)
            tensors = None if letter is None else letter.payload.opened((torch.int64, card.numel()))
            if tensors is not None:
                cards[peer] = tensors[0].clone()
    members = tuple(sorted(cards))
    rows = torch.stack([torch.cat([torch.tensor([rank]), cards[rank]]) for rank in members])
    for peer in wanted:
        if peer != peers.rank and (peer in cards or peers.is_up(peer)):
            peers.send(peer, f"{channel} roll", sequence, Payload.of(rows), expires_s=timeout_s)
    return Roll(members, {rank: cards[rank] for rank in members})


def _cards_of(payload: Payload, wanted: Sequence[int], numel: int) -> dict[int, Tensor] | None:
    """The cards in a convener's list, by rank; None if it is not a list of cards of some that were wanted."""
    tensors = payload.opened((torch.int64, None))
    if tensors is None or tensors[0].numel() % (1 + numel):
        return None
    rows = tensors[0].view(-1, 1 + numel)
    cards = {int(row[0]): row[1:].clone() for row in rows}
    return cards if len(cards) == len(rows) and cards.keys() <= set(wanted) else None
