"""Outer methods: exchange parameters or deltas every `every` optimizer steps, between machines that may leave and rejoin."""

import itertools
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from commopt.errors import check_option
from commopt.gossip.messages import Message
from commopt.groups.base import summed
from commopt.groups.peers import Peers
from commopt.method import Method, NoOptions, options
from commopt.options import Count, Flag, Positive, Whole
from commopt.wire.bucket import ParameterIndex, Share
from commopt.wire.payload import Payload


@dataclass
class Exchanged:
    """The result of one round's exchange."""

    members: tuple[int, ...]  # ranks, this one included; empty if its parameters were not finite, and it sent nothing
    is_missed: bool = False  # whether a member that was due did not answer in time
    values: dict[str, Tensor] = field(default_factory=dict)  # what `apply` needs


@dataclass(frozen=True)
class Round:
    """A round's number, and the slice of the flat parameters that it exchanges."""

    number: int
    part: slice
    fragment: int = 0


@options
class OuterOptions(NoOptions):
    every: Count = 50
    delay: Annotated[Whole, Field(ge=0)] = 0
    timeout_s: Positive = 20.0
    final_average: Flag = False
    seed: Whole = 0

    def __post_init__(self) -> None:
        check_option("delay", self.delay, lambda n: n <= self.every, f"a whole number from 0 to every, {self.every}")


@options
class MessageOptions(OuterOptions):
    message: Any = None  # see `Message`


class OuterMethod(Method):
    """Averages replicas that train independently between rounds, with any optimizer.

    A round begins every `every` optimizer steps with a copy x of the parameters (flat, f32, registration order). `exchange` sends
    and receives, in the background if `delay` > 0; `apply` computes the new value of x. What inner steps add meanwhile is kept:
    theta <- apply(...) + (theta - x).

    every: optimizer steps between two rounds. delay: steps after which a round's result is applied; 0 waits for it at once.
    timeout_s: how long a round waits for a peer that does not answer. message: how messages are compressed, such as {compressor:
    int8, error_feedback: true}. final_average: average the replicas once more at the end. seed: of draws that all ranks share.
    """

    kind = "outer"
    Options = OuterOptions
    warmup_option = "every"
    fragments = 1  # each round exchanges one of so many slices of the parameters, in turn
    needs_float32 = True
    averaged_state: tuple[str, ...] = ()  # state of the inner optimizer that is averaged with the parameters
    can_grow = True  # whether rounds can be drawn over more members than there were at first
    max_lag = 3  # rounds that a rank may be behind before it skips steps to catch up

    def set_up(self) -> None:
        o = self.options
        self.every: int = o.every
        self.delay: int = o.delay
        self.timeout_s: float = o.timeout_s
        self.seed: int = o.seed
        self.message = Message(self.message_option(), seed=o.seed)
        self.parts = (self.message,)

    def message_option(self) -> Any:
        """How messages are compressed."""
        return getattr(self.options, "message", None)

    def bind(
        self,
        named_parameters: Sequence[tuple[str, Tensor]],
        peers: Peers,
        *,
        numels: Sequence[int] | None = None,
        copies: tuple[int, int] = (0, 1),
    ) -> None:
        """Allocate this rank's state; called once, at attach. Raises ConfigError for a world that the method does not support.

        named_parameters: what this rank has of each. numels: the elements of whole parameters, if it has shards of them. copies: this
        rank's number among those of its machine that have the same, and how many these are; each exchanges its share.
        """
        held = ParameterIndex.of(named_parameters)
        self.cut_out = Share.cut(held, copies[1], copies[0], self.message.pieces)
        self.index, self.peers, self.device = self.cut_out.index, peers, torch.device("cpu")
        self.message.bind(self.index, peers.rank, self.cut_out)
        numbers = self.cut(held.numels if numels is None else numels)
        edges = [int(self.index.offsets[k]) for k in numbers]
        self.fragment_parameters = [slice(a, b) for a, b in itertools.pairwise(numbers)]
        self.fragment_parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
        self.allocate()
        self.bound()

    def cut(self, numels: Sequence[int]) -> list[int]:
        """The edges, as numbers of parameters, of the slices that rounds exchange in turn; numels: (P,) elements of each parameter."""
        return [0, len(numels)]

    def bound(self) -> None:
        """Called at the end of `bind`, when all state is there."""

    def begin(self, x: Tensor) -> None:
        """Take (P,) f32 parameters that all ranks start with."""

    def ready(self, number: int) -> None:
        """Called when this rank has started, resumed or caught up; number: of its next round."""

    def skipped_to(self, steps: int) -> None:
        """Called when this rank has skipped steps to catch up with a minority, so that its own state counts as much as theirs."""

    def round_after(self, steps: int) -> Round | None:
        """The round that begins after so many optimizer steps, if any."""
        cycle, within = divmod(steps - 1, self.every)
        for fragment in range(self.fragments):
            if within + 1 == (fragment + 1) * self.every // self.fragments:
                return Round(cycle * self.fragments + fragment, self.fragment_parts[fragment], fragment)
        return None

    @abstractmethod
    def exchange(self, x: Tensor, round: Round) -> Exchanged:
        """Send what the peers need of x, and wait for theirs, at most `timeout_s`; changes only the state of messages.

        What is missed, and has no values, counts as `alone`. Without a delay x may be overwritten, unless `apply` reads it.
        """

    def apply(self, x: Tensor, round: Round, exchanged: Exchanged) -> Tensor:
        """The new value of x; may change state."""
        return x if len(exchanged.members) == 1 else exchanged.values["mixed"]

    def alone(self, x: Tensor, round: Round, exchanged: Exchanged) -> Exchanged:
        """What a round yields if it does not count, as the machine's other ranks have not exchanged with the same machines."""
        return Exchanged((self.peers.rank,), is_missed=True, values={"mixed": x})

    def swap(self, others: Collection[int], number: int, payload: Payload) -> dict[int, Tensor]:
        """Send to others, and return what they sent for this round (or, if they are ahead, for a later one) within `timeout_s`."""
        for peer in others:
            self.peers.send(peer, self.name, number, payload, expires_s=self.timeout_s)
        end_s, received = self.peers.seconds + self.timeout_s, {}
        for peer in others:
            letter = self.peers.receive(peer, self.name, number, max(0.0, end_s - self.peers.seconds), or_newer=True)
            x = None if letter is None else self.message.unpack(letter.payload, letter.sequence)
            if x is not None:
                received[peer] = x
        return received

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called when an optimizer step begins and gradients are ready, for a method that changes them, such as by clipping."""

    def tensors(self) -> dict[str, Tensor]:
        """The state that all ranks share, which a rejoining rank takes over from another one."""
        return {key: self.state[key] for key, one in self._declared.items() if one.held == "shared"}

    @property
    def state_form(self) -> str:
        return f"fragments {self.fragments}, message {self.message.compressor}"


def mean_of(by_rank: Mapping[int, Tensor]) -> Tensor:
    """The mean, summed in the order of ranks."""
    return summed([by_rank[rank] for rank in sorted(by_rank)]).div_(len(by_rank))
