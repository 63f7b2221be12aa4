"""Parameters in compressed messages: both ranks of a pair keep copies of each other's, and only changes to these are sent."""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from commopt.errors import ConfigError
from commopt.gossip.loop import Exchanged
from commopt.gossip.messages import Message
from commopt.groups.peers import KEPT, Letter, Peers
from commopt.wire.bucket import ParameterIndex
from commopt.wire.payload import Payload, checksum, is_sound
from commopt.wire.state import Saved, State, Stateful

_HEADER = 3  # i64: whether this is a full message, the checksum of the copy that it changes, whether the sender wants a full one
_SAMPLE = 1 << 14  # elements of the Gaussian vector that a compressor is judged by


@dataclass(eq=False)
class _Pair:
    """The copies of two ranks. marks: (4,) i64: checksums of `mine` and `theirs`, is a full message due, is one wanted."""

    mine: Tensor  # (P,) f32: what the peer has of this rank
    theirs: Tensor  # (P,) f32: what this rank has of the peer
    marks: Tensor
    late: list[int] = field(default_factory=list)  # rounds whose message may still come


class PublicCopies(Stateful):
    """Copies x^ that change by q = C(x - x^) on both sides of a pair, so that they approach x with any compressor C.

    Koloskova et al. 2019, arXiv:1902.00340, Algorithm 1. The paper has one x^_i for all neighbours; here each pair has its own, so
    that a lost message affects one pair only. A message names the copy that it changes by a checksum of that copy's history. If it
    does not match (a message was lost, a rank restarted), the message is dropped, and the next answer asks for the parameters in
    full. A pair mixes again three of its rounds after the loss.
    State: 8 bytes a parameter for each neighbour. C may be unbiased: `scale` then makes it a contraction.
    """

    def __init__(self, message: Message) -> None:
        self.message = message
        self.scale, self.delta = quality(message)

    def bind(self, index: ParameterIndex, neighbours: Collection[int]) -> None:
        """Allocate the copies, which start at zero, or at what `begin` gets."""
        self.index, self.device = index, torch.device("cpu")
        self._neighbours = sorted(neighbours)
        self.allocate()
        self.pairs = {
            peer: _Pair(self.state[f"copy for {peer}"], self.state[f"copy of {peer}"], self.state[f"marks of {peer}"])
            for peer in self._neighbours
        }
        self._start: Tensor | None = None

    def declare(self) -> list[State]:
        found = []
        for peer in self._neighbours:
            found += [State(f"{what} {peer}", held="rank", on_resize="reset") for what in ("copy for", "copy of")]
            marks = State(f"marks of {peer}", of="run", numel=4, held="rank", on_resize="reset", dtype=torch.int64)
            found.append(marks)
        return found

    def saved(self) -> Saved:
        self._restart()
        return super().saved()

    def load(self, saved: Saved) -> None:
        self._start = None
        super().load(saved)

    def begin(self, x: Tensor) -> None:
        """Set all copies to x, (P,) f32, at the next round; full messages follow between ranks whose x differ."""
        self._start = x.clone()

    def mix(
        self, peers: Peers, channel: str, x: Tensor, number: int, weights: Mapping[int, float], timeout_s: float
    ) -> Exchanged:
        """One round with the neighbours in `weights`: x + sum of weight (theirs - mine) over those whose message came and matched."""
        self._restart()
        end_s, answered_in_full = peers.seconds + timeout_s, set()
        for peer in weights:
            pair = self.pairs[peer]
            if not peers.is_up(peer):
                pair.marks[2] = 1
                continue
            if pair.marks[2]:
                answered_in_full.add(peer)
            peers.send(peer, channel, number, self._pack(pair, x, number), expires_s=timeout_s)
        mixed, members = x, [peers.rank]
        for peer in sorted(weights):
            pair = self.pairs[peer]
            if self._receive(peers, channel, number, peer, end_s, has_answered=peer in answered_in_full):
                members.append(peer)
                mixed = mixed + weights[peer] * (pair.theirs - pair.mine)
        return Exchanged(tuple(sorted(members)), len(members) <= len(weights), {"mixed": mixed})

    def _restart(self) -> None:
        if self._start is None:
            return
        start, self._start = self._start, None
        mark = checksum(start)
        for pair in self.pairs.values():
            pair.mine.copy_(start)
            pair.theirs.copy_(start)
            pair.marks.copy_(torch.tensor([mark, mark, 0, 0]))
            pair.late.clear()

    def _receive(self, peers: Peers, channel: str, number: int, peer: int, end_s: float, *, has_answered: bool) -> bool:
        """Apply a peer's messages up to this round, in order, as each builds on the last; whether this round's matched."""
        pair = self.pairs[peer]
        pair.late = [*pair.late, number][-KEPT:]
        for target in list(pair.late):
            letter = peers.receive(peer, channel, target, max(0.0, end_s - peers.seconds), or_newer=True)
            if letter is None:
                return False
            pair.late.remove(target)  # it came, or it is lost: a later one came, and none overtakes another
            if letter.sequence == target:
                is_last = target == number
                fits = self._take(pair, letter, has_answered=has_answered or not is_last)
                if is_last:
                    return fits
        return False

    def _pack(self, pair: _Pair, x: Tensor, number: int) -> Payload:
        base, is_full, is_wanted = int(pair.marks[0]), int(pair.marks[2]), int(pair.marks[3])
        header = torch.tensor([is_full, base, is_wanted])
        if is_full:
            payload = Payload.of(header, x)
            pair.mine.copy_(x)
            pair.marks[0] = checksum(_body(payload).buffer)
        else:
            codes = self.message.pack(x - pair.mine, number)
            payload = Payload.of(header, *codes.tensors)
            change = self.message.unpack(_body(payload), number)  # as the peer will
            if change is not None:
                pair.mine.add_(change, alpha=self.scale)
            pair.marks[0] = checksum(_body(payload).buffer, base)
        pair.marks[2] = 0
        return payload

    def _take(self, pair: _Pair, letter: Letter, *, has_answered: bool) -> bool:
        """Update the copy of the peer; whether the message matched. has_answered: a full message that it asks for was sent already."""
        layout = letter.payload.layout
        if len(layout) < 2 or layout[0] != (torch.int64, _HEADER):
            return False
        is_full, base, is_wanted = (int(word) for word in letter.payload.tensors[0])
        if is_wanted and not has_answered:
            pair.marks[2] = 1
        body, is_good = _body(letter.payload), False
        if is_full:
            x = body.tensors[0]
            is_good = x.shape == pair.theirs.shape and x.dtype == torch.float32 and is_sound(x)
            if is_good:
                pair.theirs.copy_(x)
                base = 0
        elif base == int(pair.marks[1]):
            change = self.message.unpack(body, letter.sequence)
            is_good = change is not None
            if change is not None:
                pair.theirs.add_(change, alpha=self.scale)
        if is_good:
            pair.marks[1] = checksum(body.buffer, base)
        pair.marks[3] = 0 if is_good else 1
        return is_good


def without_feedback(given: Any) -> Any:
    """The `message` option without a residual, as copies keep what a message left out. Raises ConfigError if it asks for one."""
    if given is None:
        return None
    options = dict(given) if isinstance(given, Mapping) else {"compressor": given}
    if "error_feedback" in options:
        raise ConfigError(
            "message: error_feedback has no effect here, as copies keep what a message left out; leave it out"
        )
    return {**options, "error_feedback": False}


def quality(message: Message) -> tuple[float, float]:
    """(scale, delta): ||x - scale C(x)||^2 = (1 - delta) ||x||^2 for a Gaussian x, and the scale that makes delta largest.

    The scale is 1 for a contraction such as top_k, and 1 / (1 + omega) for an unbiased compressor of variance omega ||x||^2.
    """
    compressor = message.compressor
    if compressor is None or compressor.is_ragged:  # a threshold's quality depends on the size of x
        return 1.0, 1.0
    probe = copy.copy(message)
    probe.bind(ParameterIndex(("x",), (_SAMPLE,)), 0)
    x = torch.randn(_SAMPLE, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    c = probe.unpack(probe.pack(x, 0), 0)
    assert c is not None
    scale = min(1.0, round(float(x @ c / (c @ c)), 2))
    return scale, 1 - float((x - scale * c).square().sum() / x.square().sum())


def consensus_step(message: Message, delta: float) -> float:
    """delta / (4 - 3 delta): 1 for exact messages, delta / 4 for coarse ones; rings, hypercubes and complete graphs converge with it.

    The step of the paper's theorem 2 is far smaller; those that it tunes are of this size (arXiv:1902.00340, table 4; 1907.09356).
    Raises ConfigError for a threshold, whose quality depends on the size of its input.
    """
    if message.compressor is not None and message.compressor.is_ragged:
        raise ConfigError("gamma: a threshold's quality depends on the size of what it is given; write gamma: 0.1, say")
    return delta / (4 - 3 * delta)


def _body(payload: Payload) -> Payload:
    """What follows the header."""
    return Payload(payload.buffer[8 * _HEADER :], payload.layout[1:])
