"""Outer methods in tests: single rounds without any training, and a small model's training in a SimWorld."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rig import flat, loss_of, make_batch, make_model, normal
from torch import Tensor

from commopt import attach, build
from commopt.groups import SimGroup, SimWorld
from commopt.plan.links import LinkModel
from commopt.run.outer import OuterRun

SHAPES = {"a": (5, 7), "b": (7,), "c": (7, 4), "d": (4,)}  # 74 elements
EVERY, STEP_S = 5, 0.1


@dataclass(frozen=True)
class Played:
    """One round of one rank: x after its inner steps, what the method made of it, and the members."""

    x: Tensor
    new: Tensor
    members: tuple[int, ...]


def parameters(shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> list[tuple[str, Tensor]]:
    return [(name, torch.zeros(shape)) for name, shape in shapes.items()]


def start_values(elements: int) -> Tensor:
    return normal(elements, 11)


def drift(rank: int, number: int, elements: int) -> Tensor:
    """What a rank's inner steps add between two rounds."""
    return normal(elements, 7919 * number + rank) * 0.1


def gradient(model: torch.nn.Module, x: Tensor, rank: int, step: int) -> Tensor:
    """(P,) f64: the small model's gradient at the parameters x, on a rank's batch."""
    torch.nn.utils.vector_to_parameters(x, model.parameters())
    model.zero_grad()
    inputs, targets = make_batch(rank, step, torch.float64)
    loss_of(model(inputs), targets).backward()
    return torch.cat([p.grad.reshape(-1).clone() for p in model.parameters() if p.grad is not None])


def play(
    ranks: int, name: str, options: Mapping[str, Any], rounds: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES
) -> list[list[Played]]:
    """[rank][round] of a method, on flat tensors that drift apart between the rounds."""

    def rank_of(group: SimGroup) -> list[Played]:
        method: Any = build(name, **{"every": 1, **options})
        method.bind(parameters(shapes), group.peers)
        theta = start_values(method.index.total)
        method.begin(theta)
        method.ready(0)
        steps, played = 0, list[Played]()
        while len(played) < rounds:
            steps += 1
            round = method.round_after(steps)
            if round is None:
                continue
            theta = theta + drift(group.rank, round.number, len(theta))
            x = theta[round.part].clone()
            exchanged = method.exchange(x, round)
            new = method.apply(x, round, exchanged).clone()
            played.append(Played(theta.clone(), new, exchanged.members))
            theta[round.part] = new
        return played

    return SimWorld[list[Played]](ranks).run(rank_of)


def thetas_of(played: list[list[Played]]) -> list[list[Tensor]]:
    """[round][rank] x after the inner steps."""
    return [[rank[t].x for rank in played] for t in range(len(played[0]))]


def bound(name: str, group: SimGroup, elements: int, **options: Any) -> Any:
    """A method for one parameter of so many elements."""
    method: Any = build(name, **options)
    method.bind([("x", torch.zeros(elements))], group.peers)
    return method


def after_round(method: Any, x: Tensor, number: int) -> tuple[Tensor, Any]:
    """What round `number` makes of x, and what was exchanged in it."""
    round = method.round_after(number + 1)
    exchanged = method.exchange(x, round)
    return method.apply(x, round, exchanged), exchanged


@dataclass
class Diary:
    """What one rank did: its data steps in order, across restarts, and copies of its parameters."""

    seen: list[int] = field(default_factory=list)
    begun_at: list[int] = field(default_factory=list)
    before: dict[int, Tensor] = field(default_factory=dict)  # by steps done: after the inner step, before any round
    after: dict[int, Tensor] = field(default_factory=dict)
    learning_rate: dict[int, float] = field(default_factory=dict)  # by steps done before
    momentum: dict[int, list[Tensor]] = field(default_factory=dict)  # of the inner optimizer, by steps done before
    started: list[Tensor] = field(default_factory=list)  # the parameters at each start
    run: OuterRun | None = None

    @property
    def attached(self) -> OuterRun:
        assert self.run is not None
        return self.run

    @property
    def reports(self) -> list[Any]:
        return self.attached.reports

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.attached.events if name == kind]


def train_diary(
    group: Any,
    diary: Diary,
    name: str,
    options: Mapping[str, Any],
    steps: int,
    *,
    step_s: float = 0.0,
    poison: Callable[[int, torch.nn.Module], None] | None = None,
) -> Diary:
    """Train the small model on this rank's data; `poison(step, model)` may change it before a step."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
    method: Any = build(name, **options)
    run: Any = None

    def note(*_: Any) -> None:
        diary.before[run.steps + 1] = run.flat()

    optimizer.register_step_post_hook(note)
    run = attach(model, method, optimizer, group=group)
    diary.run = run

    def note_state(*_: Any) -> None:
        diary.learning_rate[run.steps] = optimizer.param_groups[0]["lr"]
        states = optimizer.state.values()
        diary.momentum[run.steps] = [state["momentum_buffer"].clone() for state in states]

    optimizer.register_step_pre_hook(note_state)
    diary.begun_at.append(run.join(schedule=schedule))
    diary.started.append(run.flat())
    for step in run.range(steps):
        diary.seen.append(step)
        if poison is not None:
            poison(step, model)
        x, y = make_batch(run.peers.rank, step % 7)
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        if step_s:
            group.advance(step_s)
        optimizer.step()
        schedule.step()
        diary.after[run.steps] = run.flat()
    run.finish()
    return diary


def train_outer(
    group: SimGroup,
    method: Mapping[str, Any],
    steps: int,
    kind: Any = torch.optim.Adam,
    *,
    per_machine: int = 1,
    lone: int = 1,
    is_alike: bool = False,
    step_s: float = 0.0,
    poison: Callable[[int, int, torch.nn.Module], None] | None = None,
    saves: Mapping[int, Path] | None = None,
    load_from: Path | None = None,
) -> tuple[Tensor, OuterRun]:
    """The parameters in the end, and the run.

    kind: of the optimizer. per_machine: ranks that train together. lone: how many batches a rank takes, as such a machine would have.
    is_alike: all ranks of a machine take the same one. saves: where to save before which steps.
    """
    model = make_model()
    optimizer = kind(model.parameters(), lr=0.01)
    run: Any = attach(model, method, optimizer, group=group.by_machine(per_machine) if per_machine > 1 else group)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 9, 0.7)
    if load_from is not None:
        schedule.load_state_dict(run.load(load_from)["schedule"])
    run.join(schedule=schedule)
    for step in run.range(steps):
        if step in (saves or {}):
            run.save(saves[step], extra={"schedule": schedule.state_dict()})  # type: ignore[index]
        if poison is not None:
            poison(run.rank, step, model)
        optimizer.zero_grad()
        for batch in range(lone):
            x, y = make_batch(run.peers.rank if is_alike else run.rank * lone + batch, step)
            loss_of(model(x), y).backward()
        for p in model.parameters():
            assert p.grad is not None
            p.grad /= lone
        if step_s:
            group.advance(step_s)
        optimizer.step()
        schedule.step()
    run.finish()
    return flat(model), run


def run_world(
    ranks: int,
    name: str,
    options: Mapping[str, Any],
    steps: int,
    *,
    faults: Sequence[Mapping[str, Any]] = (),
    links: LinkModel | None = None,
    step_s: float = 0.0,
    poison: Callable[[int, int, torch.nn.Module], None] | None = None,
) -> tuple[SimWorld[Any], list[Diary]]:
    """Train on all ranks of a simulated world with faults; a killed rank's diary is returned too."""
    diaries = [Diary() for _ in range(ranks)]
    world: SimWorld[Any] = SimWorld(ranks, links, faults=faults)

    def train(group: SimGroup) -> None:
        own = None if poison is None else functools.partial(poison, group.rank)
        train_diary(group, diaries[group.rank], name, options, steps, step_s=step_s, poison=own)

    world.run(train)
    return world, diaries


def run_linked(
    ranks: int, name: str, steps: int, faults: Sequence[Mapping[str, Any]] = (), *, poison: Any = None, **options: Any
) -> tuple[SimWorld[Any], list[Diary]]:
    """`run_world` with a round every 5 steps of 0.1 s, over links."""
    links = LinkModel.uniform(ranks, "100mbit", "5ms")
    options = {"every": EVERY, **options}
    return run_world(ranks, name, options, steps, faults=faults, links=links, step_s=STEP_S, poison=poison)


def spoil(bad_rank: int, bad_step: int, value: float = float("nan")) -> Callable[[int, int, torch.nn.Module], None]:
    """A `poison` that changes one of a rank's parameters before one of its steps."""

    def poison(rank: int, step: int, model: torch.nn.Module) -> None:
        if (rank, step) == (bad_rank, bad_step):
            next(model.parameters()).data[0, 0] = value

    return poison


def spread(replicas: Sequence[Tensor]) -> float:
    """The root mean square over replicas of ||x_i - mean|| / ||mean||."""
    stacked = torch.stack(list(replicas)).double()
    mean = stacked.mean(0)
    return float((stacked - mean).square().sum(1).mean().sqrt() / mean.norm())
