"""DiLoCo: inner steps alone, then an outer optimizer's step on the mean of what they changed, over the ranks that are up."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from commopt.compress.feedback import NOTHING_KEPT, Kept
from commopt.errors import ConfigError, GroupError, check_finite, check_option, did_you_mean
from commopt.exchange.base import Exchange
from commopt.exchange.compressed import Compressed
from commopt.exchange.gather import GatherMean
from commopt.exchange.mean import Mean
from commopt.exchange.two_way import TwoWayMean
from commopt.gossip.loop import Exchanged, MessageOptions, OuterMethod, Round
from commopt.groups.peers import Latecomers, PeerGroup, Roll, call_roll
from commopt.kernels.reference.runs import element_indices
from commopt.method import options
from commopt.optim.outer import FedAdagrad, FedAdam, FedYogi
from commopt.options import Count, Number, Share
from commopt.wire.bucket import Bucket
from commopt.wire.draws import permutation
from commopt.wire.payload import checksum, is_sound
from commopt.wire.state import Saved, State

OUTER: Mapping[str, tuple[Any, Mapping[str, Any]]] = {
    # foreach: else nesterov takes a copy of the gradient
    "nesterov": (torch.optim.SGD, {"lr": 0.7, "momentum": 0.9, "nesterov": True, "foreach": True}),
    "sgd": (torch.optim.SGD, {"lr": 0.7, "momentum": 0.0}),
    "adagrad": (FedAdagrad, {}),
    "adam": (FedAdam, {}),
    "yogi": (FedYogi, {}),
}
_CALLS = 1 << 12  # sequence numbers of one round's exchange


@options
class AveragingOptions(MessageOptions):
    every: Count = 100
    fragments: Count = 1
    participation: Share = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = f"a whole number from 1 to every, {self.every}"
        check_option("fragments", self.fragments, lambda n: n <= self.every, wanted)


@options
class DiLoCoOptions(AveragingOptions):
    outer: Any = "nesterov"
    lr: Number | None = None
    momentum: Number | None = None


class DiLoCo(OuterMethod):
    """Average what `every` inner steps changed, and pass it to an outer optimizer as a gradient.

    Douillard et al. 2023, arXiv:2311.08105, Algorithm 1; with fragments, Streaming DiLoCo (arXiv:2501.18512). With
    fragments, a round exchanges one fragment of the parameters, in turn. With `delay`, the fragment is sent while the
    next inner steps run. What these steps change is kept in full; the paper mixes it half and half.
        Delta = mean over those present of (phi - theta_i);  phi <- OuterOpt(phi, Delta);  theta_i <- phi
    The lowest rank that is up convenes each round. It waits for the ranks that are up, at most a quarter of timeout_s,
    and the round is theirs. A rank that hears from no other makes its outer step alone. Every member sends which slow
    weights it has. If they differ, after a partition or a missed round, those of the latest round are averaged first
    (twice a round's bytes, once).
    Sends 8 (N-1)/N / every bytes a parameter and step; with a compressed message, the share of two_way or, for top_k
    and similar compressors, of a gather.
    State: slow weights 4, the outer optimizer's 4 or 8 (and residuals of 4 + 4/N with a compressed message).
    Use it if hundreds of steps fit between two exchanges, and all machines are about equally fast.
    Not for a machine that is often late. All others wait for it, up to a quarter of timeout_s, in every second round,
    then every ninth.

    outer: nesterov, sgd, adagrad, adam or yogi (the last three of arXiv:2003.00295), or its name and options, as in
        {name: adam, lr: 0.01}.
    lr, momentum: of nesterov and sgd; 0.7 and 0.9 if None (no momentum with sgd).
    fragments: parts of about equal size, cut between parameters.
    participation: the share of ranks, drawn by every rank from (seed, round), that takes part in a round.
    """

    name = "diloco"
    Options: ClassVar[type[AveragingOptions]] = DiLoCoOptions
    positional: ClassVar[tuple[str, ...]] = ("outer",)

    def set_up(self) -> None:
        super().set_up()
        self.fragments = self.options.fragments
        self.make_outer = self.outer_optimizer()
        self._outer_state = _initial_state(self.make_outer(torch.zeros(1, dtype=torch.float32)))  # may raise

    def outer_optimizer(self) -> Any:
        """A function that makes the outer optimizer: see `make_outer_optimizer`."""
        return make_outer_optimizer(self.options.outer, self.options.lr, self.options.momentum)

    def cut(self, numels: Sequence[int]) -> list[int]:
        return _between_parameters([0, *itertools.accumulate(numels)], self.fragments)

    def declare(self) -> list[State]:
        outer = [State(f"outer {key}", initial=first) for key, first in self._outer_state.items()]
        version = State("version", of="run", numel=self.fragments, dtype=torch.int64)  # each fragment's last round
        return [State("slow"), *outer, version, *super().declare()]

    def bound(self) -> None:
        self.outer = [self.make_outer(self.state["slow"][part]) for part in self.fragment_parts]
        for optimizer, part in zip(self.outer, self.fragment_parts, strict=True):
            (parameter,) = optimizer.param_groups[0]["params"]
            optimizer.state[parameter] = {key: self.state[f"outer {key}"][part] for key in self._outer_state}
        self.late = Latecomers()
        self._means: dict[int, tuple[tuple[int, ...], Exchange]] = {}

    def begin(self, x: Tensor) -> None:
        self.state["slow"].copy_(x)

    def participants(self, number: int) -> list[int]:
        """The ranks drawn for a round; the same on all ranks."""
        ranks = self.peers.size_at(number)
        return sorted(permutation(ranks, self.seed, "participation", number)[: self._drawn(ranks)])

    def exchange(self, x: Tensor, round: Round) -> Exchanged:
        me, expected = self.peers.rank, self.participants(round.number)
        if me not in expected:
            return Exchanged((me,))
        start_s = self.peers.seconds
        mark = functools.reduce(lambda before, own: checksum(own, before), self._shared(round.fragment), 0)
        card = torch.tensor([int(self.state["version"][round.fragment]), mark])
        roll = call_roll(
            self.peers, "diloco", round.number, card, self.timeout_s / 2, expected=expected, late=self.late
        )
        if len(roll.members) == 1:
            return dataclasses.replace(self.alone(x, round), is_missed=len(expected) > 1)
        left_s = max(0.1, start_s + self.timeout_s - self.peers.seconds)
        group = PeerGroup(self.peers, roll.members, "diloco", round.number * _CALLS, left_s)
        try:
            shared = self._reconciled(roll, round.fragment, group)
            mean = self._mean(self._delta(x, round), round, roll.members, group)
        except (GroupError, ValueError):  # the second one: codes are damaged
            return Exchanged((me,), is_missed=True)
        if mean is None or not all(map(is_sound, (mean, *shared.values()))):
            return Exchanged((me,), is_missed=True)
        is_missed = len(roll.members) < len(expected)
        return Exchanged(roll.members, is_missed, {"delta": mean, **shared})

    def alone(self, x: Tensor, round: Round, exchanged: Exchanged | None = None) -> Exchanged:
        return Exchanged((self.peers.rank,), is_missed=True, values={"delta": self._delta(x, round)})

    def apply(self, x: Tensor, round: Round, exchanged: Exchanged) -> Tensor:
        if "delta" not in exchanged.values:  # not drawn: continue with the inner steps
            return x
        for k, own in enumerate(self._shared(round.fragment)):
            own.copy_(exchanged.values.get(f"shared {k}", own))
        optimizer = self.outer[round.fragment]
        (parameter,) = optimizer.param_groups[0]["params"]
        parameter.grad = exchanged.values["delta"]
        optimizer.step()
        parameter.grad = None
        self.state["version"][round.fragment] = round.number + 1
        return self.state["slow"][round.part]

    def skipped_to(self, steps: int) -> None:
        cycle, within = divmod(steps, self.every)
        for fragment in range(self.fragments):
            is_over = within >= (fragment + 1) * self.every // self.fragments
            self.state["version"][fragment] = (cycle if is_over else cycle - 1) * self.fragments + fragment + 1

    def saved(self) -> Saved:
        saved = super().saved()
        for k, (members, mean) in self._means.items():
            for held, tensors in mean.saved().items():
                saved["rank"] |= {f"mean {k} {held} {key}": x for key, x in tensors.items()}
            saved["rank"][f"mean {k} members"] = torch.tensor(members)
        return saved

    def load(self, saved: Saved) -> None:
        for k in range(self.fragments):
            if f"mean {k} members" in saved["rank"]:
                members = tuple(int(rank) for rank in saved["rank"][f"mean {k} members"])
                mean = self._new_mean(k, PeerGroup(self.peers, members, "diloco", 0, self.timeout_s))
                own: Saved = {"shared": {}, "rank": {}}
                for held, tensors in own.items():
                    prefix, every = f"mean {k} {held} ", saved["rank"].items()
                    tensors |= {key.removeprefix(prefix): x for key, x in every if key.startswith(prefix)}
                mean.load(own)
                self._means[k] = (members, mean)
        super().load(saved)

    def bytes_per_parameter(self, ranks: int) -> float:
        drawn = self._drawn(ranks)
        dense = 8 * (drawn - 1) / drawn
        sent = dense if self.message.compressor is None else self._compressed().bytes_per_parameter(drawn)
        is_new = 1 - 1 / math.comb(ranks, drawn)  # chance that others than last time are drawn, and get the state
        return drawn / ranks * (sent + is_new * dense * (1 + len(self._outer_state))) / self.every

    def _drawn(self, ranks: int) -> int:
        share: float = self.options.participation
        return max(1, round(share * ranks))

    def _shared(self, fragment: int) -> list[Tensor]:
        """The state of a fragment that all ranks share: its slow weights, and the outer optimizer's state."""
        part = self.fragment_parts[fragment]
        return [self.state[key][part] for key in ("slow", *(f"outer {key}" for key in sorted(self._outer_state)))]

    def _delta(self, x: Tensor, round: Round) -> Tensor:
        """phi - theta; without a delay in place of x."""
        return torch.sub(self.state["slow"][round.part], x, out=None if self.delay else x)

    def _reconciled(self, roll: Roll, fragment: int, group: PeerGroup) -> dict[str, Tensor]:
        """If members differ, the mean over those of the latest round; empty if all agree, which is the usual case."""
        cards = [roll.cards[rank] for rank in roll.members]
        if all(torch.equal(card, cards[0]) for card in cards):
            return {}
        latest = max(int(card[0]) for card in cards)
        has_latest = [int(card[0]) == latest for card in cards]
        weight = (1.0 / sum(has_latest)) if has_latest[group.rank] else 0.0
        agreed = [x * weight for x in self._shared(fragment)]
        for x in agreed:
            group.all_reduce(x)
        return {f"shared {key}": x for key, x in enumerate(agreed)}

    def _mean(self, delta: Tensor, round: Round, members: tuple[int, ...], group: PeerGroup) -> Tensor | None:
        """The mean of the members' deltas, which takes the place of this one; None if one of them is not finite."""
        if self._means.get(round.fragment, ((), None))[0] != members:
            self._carry_over(round.fragment, members, group)
        named, mean = self._named(round.fragment, delta), self._means[round.fragment][1]
        starts = tuple(int(view.storage_offset() - delta.storage_offset()) for _, view in named)
        bucket = Bucket(delta, tuple(name for name, _ in named), starts)
        # random keys depend on it, and members may have taken part in different rounds
        mean.exchanges.fill_(round.number)
        mean.exchange(bucket, group)
        return bucket.flat if bucket.void is None else None

    def _carry_over(self, fragment: int, members: tuple[int, ...], group: PeerGroup) -> None:
        """Make a mean over new members; it takes over what this rank had still to send, as a worker and as a server."""
        mean = self._new_mean(fragment, group)
        before = self._means.get(fragment)
        if before is not None and isinstance(mean, Compressed) and isinstance(before[1], Compressed):
            mean.worker.residual.copy_(before[1].worker.residual)
            if isinstance(before[1], TwoWayMean) and before[1].server.residual.numel():
                home = before[1].table.at_home(before[1].rank)
                places = element_indices(home.starts, home.lengths, mean.worker.residual.device)
                mean.worker.residual[places] += before[1].server.residual * len(before[0])
        self._means[fragment] = (members, mean)

    def _new_mean(self, fragment: int, group: PeerGroup) -> Exchange:
        mean: Exchange = Mean() if self.message.compressor is None else self._compressed()
        mean.bind(self._named(fragment, self.state["slow"][self.fragment_parts[fragment]]), group)
        return mean

    def _compressed(self) -> Compressed:
        compressor, kept = self.message.compressor, Kept() if self.message.has_feedback else NOTHING_KEPT
        assert compressor is not None
        is_sparse = hasattr(compressor, "density") or compressor.is_ragged
        return (GatherMean if is_sparse else TwoWayMean)(compressor, kept, seed=self.seed)

    def _named(self, fragment: int, flat: Tensor) -> list[tuple[str, Tensor]]:
        """The parameters of a fragment that have elements, as views of a flat tensor of the fragment."""
        part, offsets = self.fragment_parts[fragment], self.index.offsets.tolist()
        inside = [k for k, n in enumerate(self.index.numels) if n and part.start <= offsets[k] < part.stop]
        return [(self.index.names[k], flat[offsets[k] - part.start : offsets[k + 1] - part.start]) for k in inside]


def _between_parameters(offsets: list[int], fragments: int) -> list[int]:
    """Edges between parameters, as their numbers, of stretches of about equal size. Raises ConfigError for too few parameters."""
    edges = [0]
    for k in range(1, fragments + 1):
        wanted = offsets[-1] * k / fragments
        edges.append(min((x for x in offsets if x > edges[-1]), key=lambda x: abs(x - wanted), default=edges[-1]))
    edges[-1] = offsets[-1]
    if any(b <= a for a, b in itertools.pairwise(edges)):
        raise ConfigError(f"fragments: {fragments} are too many for a model of {len(offsets) - 1} parameters")
    return [offsets.index(edge) for edge in edges]


def make_outer_optimizer(given: Any, lr: float | None, momentum: float | None) -> Any:
    """A function that makes an outer optimizer over one flat tensor. Raises ConfigError, as that function does."""
    options = dict(given) if isinstance(given, Mapping) else {"name": given}
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in OUTER:
        raise ConfigError(f"outer: {name!r} is not an outer optimizer{did_you_mean(str(name), OUTER)}")
    kind, preset = OUTER[name]
    if momentum is not None and kind is not torch.optim.SGD:
        raise ConfigError(f"momentum: has no effect with outer: {name}; write outer: {{name: {name}, beta1: ...}}")
    for key, value in (("lr", lr), ("momentum", momentum)):
        if value is not None and key in options:
            twice = f"outer: {{name: {name}, {key}: {options[key]}}}"
            raise ConfigError(f"{key}: {value} has no effect with {twice}; leave one of the two out")
        if value is not None:
            options[key] = value
    for key, value in options.items():
        check_finite(f"outer: {name}: {key}", value)

    def make(x: Tensor) -> torch.optim.Optimizer:
        parameter = torch.nn.Parameter(x)
        try:
            made: torch.optim.Optimizer = kind([parameter], **{**preset, **options})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"outer: {name}: {error}") from None
        return made

    return make


def _initial_state(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The tensors that an outer optimizer keeps, and their initial values."""
    group = optimizer.param_groups[0]
    if isinstance(optimizer, torch.optim.SGD):
        return {"momentum_buffer": 0.0} if group["momentum"] else {}
    return {"momentum": 0.0, "variance": float(group["tau"] ** 2)}
