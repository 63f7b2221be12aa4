"""What the planner knows of a method: what it sends, how often, what it costs to compute, and what it did to a loss."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

from commopt.plan.links import schedule

TABLE = Path(__file__).with_name("profiles.json")
Operation = Literal["all_reduce", "all_gather", "all_to_all", "send"]


@dataclass(frozen=True)
class Phase:
    """One collective of an exchange among N machines, by what one of them contributes (`nbytes` of `links.schedule`; for an
    all-to-all all that it has for all owners; for `send` the messages to its partners).

    Bytes per parameter: constant + over_ranks / N + bits_over_ranks x (bits that the number N takes) / N.
    """

    operation: Operation
    constant: float = 0.0
    over_ranks: float = 0.0
    bits_over_ranks: float = 0.0

    def nbytes(self, parameters: float, ranks: int) -> float:
        """What one machine contributes to an exchange of so many parameters."""
        return parameters * (self.constant + (self.over_ranks + self.bits_over_ranks * ranks.bit_length()) / ranks)

    def sent(self, parameters: float, ranks: int) -> float:
        """Bytes that one machine hands to the network."""
        return sent_bytes(self.operation, self.nbytes(parameters, ranks), ranks)


def sent_bytes(operation: str, nbytes: float, ranks: int) -> float:
    """Bytes that a rank hands to its peers in one collective of which it contributes `nbytes`."""
    if ranks == 1:
        return 0.0
    if operation == "all_to_all":
        return nbytes * (ranks - 1) / ranks
    if operation == "send":
        return nbytes
    return sum(schedule(operation, 1, 0, ranks).values()) * nbytes


@dataclass(frozen=True)
class Quality:
    """How much worse the final loss was than the uncompressed parent's, and in which training."""

    task: str
    worse_percent: float


@dataclass(frozen=True)
class Profile:
    """One method with its options.

    phases: of one exchange of all parameters, in their order. every: optimizer steps after which all have been exchanged, in
        `fragments` rounds. delay: steps that an outer exchange may take in the background.
    overlaps: whether buckets are exchanged one by one during backward. warmup_steps: in which it sends what dense does;
        finds_warmup: it finds their number itself.
    optimizer: the one that its state and steps are compared with. state_bytes: per parameter, beyond that optimizer's;
        host_bytes: the same in the host's memory.
    exchange_copies: processor time of an exchange beside its network, as a multiple of a copy of the parameters in float32; None if that
        was not measured. An update method's step is taken to cost what its optimizer's does, unless a probe has measured both.
    quality: the losses that were measured.
    """

    name: str
    kind: str
    phases: tuple[Phase, ...]
    options: Mapping[str, Any] | None = None
    every: int = 1
    fragments: int = 1
    delay: int = 0
    overlaps: bool = True
    warmup_steps: int = 0
    finds_warmup: bool = False
    optimizer: str = "AdamW"
    state_bytes: float = 0.0
    host_bytes: float = 0.0
    exchange_copies: float | None = None
    quality: tuple[Quality, ...] = ()

    def bytes_per_parameter(self, ranks: int) -> float:
        """What one machine sends per parameter and step."""
        return sum(phase.sent(1.0, ranks) for phase in self.phases) / self.every

    def to_json(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        default = {field.name: field.default for field in fields(Profile)}
        kept = {key: value for key, value in asdict(self).items() if value != default[key]}
        kept["phases"] = [{k: v for k, v in phase.items() if v != 0.0} for phase in kept["phases"]]
        return kept

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Profile:
        own = dict(given)
        phases: Sequence[Mapping[str, Any]] = own.pop("phases")
        quality: Sequence[Mapping[str, Any]] = own.pop("quality", ())
        return cls(**own, phases=tuple(Phase(**p) for p in phases), quality=tuple(Quality(**q) for q in quality))


@cache
def profiles() -> Mapping[str, Profile]:
    """Every registered method with its default options, by name; written by scripts/plan_table.py."""
    return {one["name"]: Profile.from_json(one) for one in json.loads(TABLE.read_text(encoding="utf-8"))}
