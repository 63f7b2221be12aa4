"""Outer methods: parameters or deltas travel every `every` optimizer steps, between machines that may leave and come back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from commopt.errors import ConfigError, check_flag, check_option
from commopt.exchange.mean import State, load_tensor
from commopt.gossip.messages import Message
from commopt.groups.peers import Peers
from commopt.wire.bucket import ParameterIndex


@dataclass
class Exchanged:
    """What one round's exchange brought: its members (ranks, this one included), and the tensors that `apply` needs.

    is_missed: a member that was due did not answer in time, and the round goes on without it.
    """

    members: tuple[int, ...]
    is_missed: bool = False
    values: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Round:
    """When and what: the round's number, and the stretch of the flat parameters that it is about."""

    number: int
    part: slice
    fragment: int = 0


class OuterLoop(ABC):
    """Averages replicas that train by themselves in between, with any optimizer.

    A round begins after every `every` optimizer steps with a copy x of the parameters (flat, f32, registration order). `exchange`
    talks to the peers, beside the training where `delay` > 0; `apply` makes the new value of x. What the inner steps added to the
    parameters meanwhile stays: theta <- apply(...) + (theta - x).

    every: optimizer steps between two rounds. delay: steps after which a round's result is applied; 0 waits for it at once.
    timeout_s: what a peer that does not answer may cost a round. message: how messages are compressed, as {compressor: int8,
    error_feedback: true}. final_average: average the replicas once more at the end. seed: of draws that all ranks make alike.
    """

    name = "outer"
    positional: ClassVar[tuple[str, ...]] = ()
    warmup_steps = 0
    warmup_option = "every"
    is_steady = True
    fragments = 1  # a round is about one of so many stretches of the parameters, in turn
    averaged_state: tuple[str, ...] = ()  # state of the inner optimizer that is averaged with the parameters
    max_lag = 3  # rounds that a rank may be behind before it leaves out steps to go on with the others

    def __init__(
        self,
        *,
        every: int = 50,
        delay: int = 0,
        timeout_s: float = 20.0,
        message: Any = None,
        final_average: bool = False,
        seed: int = 0,
    ) -> None:
        check_option("every", every, lambda x: isinstance(x, int) and x >= 1, "a whole number from 1")
        wanted = f"a whole number from 0 to every, {every}"
        check_option("delay", delay, lambda x: isinstance(x, int) and 0 <= x <= every, wanted)
        check_option("timeout_s", timeout_s, lambda x: 0 < x < float("inf"), "a number of seconds above 0")
        check_option("seed", seed, lambda x: isinstance(x, int), "a whole number")
        check_flag("final_average", final_average)
        self.every, self.delay, self.timeout_s, self.seed = every, delay, float(timeout_s), seed
        self.final_average = final_average
        self.message = Message(message, seed=seed)

    def bind(self, named_parameters: Sequence[tuple[str, Tensor]], peers: Peers) -> None:
        """Allocate this rank's state; called once, at attach. Raises ConfigError for a world that the method cannot serve."""
        self.index, self.peers = ParameterIndex.of(named_parameters), peers
        self.message.bind(self.index, peers.rank, torch.device("cpu"))
        self.parts = self.message.cut(self.fragments)
        if any(part.stop <= part.start for part in self.parts):
            raise ConfigError(f"fragments: {self.fragments} are too many for a model of {self.index.total} parameters")
        self.everything = slice(0, self.index.total)

    def begin(self, x: Tensor) -> None:
        """Take (P,) f32 parameters that all ranks start with."""

    def ready(self, number: int) -> None:
        """Called when this rank has what it starts or goes on with; `number` is that of its next round."""

    def skipped_to(self, steps: int) -> None:
        """Called when this rank has left out steps to go on with a few that are ahead, and its own state counts as much as theirs."""

    def round_after(self, steps: int) -> Round | None:
        """The round that begins after so many optimizer steps, if any."""
        cycle, within = divmod(steps - 1, self.every)
        for fragment in range(self.fragments):
            if within + 1 == (fragment + 1) * self.every // self.fragments:
                return Round(cycle * self.fragments + fragment, self.parts[fragment], fragment)
        return None

    @abstractmethod
    def exchange(self, x: Tensor, round: Round) -> Exchanged:
        """Send what the peers need of x, and wait for theirs, no longer than `timeout_s`; changes no state but of messages."""

    @abstractmethod
    def apply(self, x: Tensor, round: Round, exchanged: Exchanged) -> Tensor:
        """The new value of x; may change state."""

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise AttachError where this optimizer does not go with the method."""

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called when an optimizer step begins, gradients and all: what a method does to gradients of its own, as clipping them."""

    def tensors(self) -> dict[str, Tensor]:
        """State that a rank which comes back takes over from another one, by name."""
        return {}

    def bytes_per_parameter(self, ranks: int) -> float:
        """What one rank sends per parameter and optimizer step; the formula, not a measurement."""
        raise NotImplementedError(f"{self.name} does not say what it sends")

    @property
    def state_form(self) -> str:
        """What the layout of `comm_state` depends on beside the model; a checkpoint of another form is refused."""
        return f"fragments {self.fragments}, message {self.message.compressor}"

    def comm_state(self) -> State:
        """What a checkpoint must hold; all of it is this rank's own."""
        return {"shared": {}, "local": {**self.tensors(), **self.message.state()}}

    def load_comm_state(self, state: State) -> None:
        """Continue bit for bit from this rank's own `comm_state`."""
        for key, x in self.comm_state()["local"].items():
            load_tensor(x, state["local"], key)


def mean_of(tensors: Sequence[Tensor]) -> Tensor:
    """The mean, summed in the order given; of one tensor, that tensor itself."""
    total = tensors[0].clone()
    for x in tensors[1:]:
        total += x
    return total.div_(len(tensors)) if len(tensors) > 1 else total
