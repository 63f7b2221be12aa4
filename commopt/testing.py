"""The contract that every method keeps, as one call: for the methods here and for those of others.

    check_method(MyMethod)

Gradient and update methods; ranks are simulated in threads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from commopt.choice import Choice
from commopt.errors import ConfigError
from commopt.frameworks.plain import PlainRun
from commopt.groups import SimGroup, SimWorld
from commopt.method import Method
from commopt.methods import resolve
from commopt.optim import LAMB, Lion
from commopt.run.door import attach
from commopt.wire.state import Saved

__all__ = ["check_method"]

Factory = Callable[[], Method]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
_SIZES = (1, 2, 3, 5)
_STEPS, _BUCKET_BYTES = 12, 25 << 20
_HALF = _STEPS // 2
_ZERO_AT = _HALF + 1  # a step in which all gradients are zero


class _Model(nn.Module):
    """Sizes that nothing divides, a parameter of one element, and one that no step uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(13, 173), nn.Linear(173, 5)
        self.gain = nn.Parameter(torch.ones(1))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.gain * self.second(torch.tanh(self.first(x)))
        return y


@dataclass
class _Trained:
    parameters: Tensor
    replica: Tensor | None = None  # the parameters after the last step that left all ranks with the same
    losses: list[float] = field(default_factory=list)
    voided: list[tuple[int, str]] = field(default_factory=list)
    payload_bytes: float = 0.0
    state: Saved = field(default_factory=lambda: {"shared": {}, "rank": {}})
    half: tuple[_Model, Any, Saved] | None = None  # model, optimizer and method after half of the steps
    is_synchronised: bool = True
    void_steps: list[int] = field(default_factory=list)  # in which this rank must have heard of a NaN


def default_optimizer(method: Method) -> MakeOptimizer:
    """SGD with momentum, or one whose place an update method takes."""
    kinds: dict[str, Any] = {"AdamW": torch.optim.AdamW, "LAMB": LAMB, "Lion": Lion, "SGD": torch.optim.SGD}
    if not method.stands_for:
        return lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    kind = next((kinds[name] for name in kinds if name in method.stands_for), torch.optim.AdamW)
    return lambda model: kind(model.parameters(), lr=0.003)


@dataclass(frozen=True)
class _Case:
    """A method under test, and the optimizer that it goes with."""

    make: Factory
    optimizer: MakeOptimizer
    max_norm: float | None

    def attach(self, model: _Model, group: SimGroup, bucket_bytes: int = _BUCKET_BYTES) -> PlainRun:
        run = attach(model, self.make(), self.optimizer(model), group=group, max_norm=self.max_norm)
        assert isinstance(run, PlainRun)
        run.bucket_bytes = bucket_bytes
        return run


def check_method(
    method: type[Method] | Choice | Factory,
    *,
    optimizer: MakeOptimizer | None = None,
    max_norm: float | None = None,
    ranks: tuple[int, ...] = _SIZES,
) -> None:
    """Raise AssertionError, saying what broke and on how many ranks, unless the method

    - trains: the loss falls, on 1, 2, 3 and 5 ranks, with sizes that nothing divides;
    - keeps replicas equal, bit for bit, wherever it `is_synchronised`, and leaves a parameter alone that no rank uses;
    - does not depend on how gradients are bucketed, on the most ranks;
    - survives a NaN on one rank: every rank sees it in that step, or in a local step that rank alone, nothing is harmed, and
      training goes on;
    - survives a step of zero gradients;
    - continues bit for bit from its own state, and from the states of a world of another size;
    - sends nothing that its group does not count, and nothing at all if it is alone.

    method: a class, a name or block, or a function that makes one. optimizer: makes the one that the method goes with, or stands
        in for; `default_optimizer` if None. max_norm: as `attach` takes it. Raises ConfigError for an outer method.
    """
    factory: Factory = method if callable(method) and not isinstance(method, type) else lambda: resolve(method)
    first = factory()
    if first.kind == "outer":
        raise ConfigError(f"{first.name}: check_method is for methods that exchange in every step")
    case = _Case(factory, optimizer or default_optimizer(first), max_norm)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = _Model()
    for n in ranks:
        world = _train(case, start, n)
        _check_training(world, start, n)
        if n == max(ranks):
            _check_buckets(case, start, n, world)
        _check_resume(case, start, n, world)
        _check_nan(case, start, n)
    _check_resharding(case, start)


def _train(case: _Case, start: _Model, n: int, halves: list[_Trained] | None = None, **options: Any) -> list[_Trained]:
    """Train on n ranks, or go on where `halves` had done half of the steps."""
    world: SimWorld[_Trained] = SimWorld(n)
    starts = [(copy.deepcopy(start), None, None) if halves is None else halves[rank].half for rank in range(n)]
    return world.run(lambda group: _train_rank(case, starts[group.rank], group, **options))


def _train_rank(
    case: _Case,
    start: Any,
    group: SimGroup,
    *,
    steps: int = _STEPS,
    bucket_bytes: int = _BUCKET_BYTES,
    nan_at: Mapping[int, int] | None = None,
) -> _Trained:
    model, optimizer, state = start
    run = case.attach(model, group, bucket_bytes)
    trained = _Trained(torch.empty(0))
    if state is not None:
        run.optimizer.load_state_dict(optimizer)
        run.method.load(state)
    for step in range(0 if state is None else _HALF, steps):
        if step == _HALF:
            trained.half = copy.deepcopy((model, run.optimizer.state_dict(), run.method.saved()))
        loss = _loss(model, 1000 * step + group.rank)
        run.optimizer.zero_grad()
        (loss * 0 if step == _ZERO_AT else loss).backward()
        if step in (nan_at or {}):
            _step_with_nan(model, run, group, trained, step, nan_at[step])  # type: ignore[index]
        else:
            run.optimizer.step()
        if run.method.is_synchronised:
            trained.replica = _flat(model)
        trained.losses.append(loss.item())
    trained.parameters, trained.voided = _flat(model), run.voided
    trained.payload_bytes = group.traffic.payload_bytes
    trained.state, trained.is_synchronised = copy.deepcopy(run.method.saved()), run.method.is_synchronised
    run.close()
    return trained


def _step_with_nan(model: _Model, run: PlainRun, group: SimGroup, trained: _Trained, step: int, bad: int) -> None:
    """Step with a NaN in the gradient of one rank, which may change nothing of its parameter on any rank that exchanges."""
    weight, method = model.first.weight, run.method
    if group.rank == bad:
        assert weight.grad is not None
        weight.grad[3, 4] = float("nan")
    is_local, before = method.is_local, weight.detach().clone()
    views = [] if is_local else method.state_views("first.weight")
    kept = [view.clone() for view in views]
    run.optimizer.step()
    if group.rank == bad or not is_local:
        trained.void_steps.append(step)
    assert is_local or torch.equal(weight, before), "a parameter with a NaN in its gradient was changed"
    for view, old in zip(views, kept, strict=True):
        assert torch.allclose(view.double(), old.double(), rtol=1e-4, atol=1e-6), (
            f"a NaN on rank {bad} changed the method's state of first.weight: an exchange that sets bucket.void must "
            "leave all state as it was"
        )


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def _check_training(world: list[_Trained], start: _Model, n: int) -> None:
    _check_replicas(world, n)
    losses = [sum(one.losses[step] for one in world) / n for step in range(_STEPS)]
    assert losses[-1] < losses[0], f"the loss did not fall on {n} ranks: {losses[0]:.4f} to {losses[-1]:.4f}"
    model = copy.deepcopy(start)
    nn.utils.vector_to_parameters(world[0].parameters, model.parameters())
    assert torch.equal(model.unused, start.unused), f"a parameter that no rank uses was changed on {n} ranks"
    assert not any(one.voided for one in world), f"a step without a NaN was void on {n} ranks"
    if all(one.is_synchronised for one in world):
        for key, x in world[0].state["shared"].items():
            assert all(_same(x, one.state["shared"][key]) for one in world), (
                f"the state {key!r} differs between {n} ranks: declare it as held='rank', or compute it from what all ranks have"
            )
    assert all(bool(one.parameters.isfinite().all()) for one in world), f"zero gradients break {n} ranks"
    sent = [one.payload_bytes for one in world]
    assert (min(sent) > 0) if n > 1 else (sent == [0.0]), f"counted {sent} bytes on {n} ranks"


def _check_replicas(world: list[_Trained], n: int) -> None:
    replicas = [one.replica for one in world if one.replica is not None]
    assert len(replicas) == n, f"{n} ranks have never been synchronised"
    assert all(torch.equal(replicas[0], replica) for replica in replicas), f"replicas differ on {n} ranks"


def _check_buckets(case: _Case, start: _Model, n: int, world: list[_Trained]) -> None:
    small = _train(case, start, n, steps=_HALF, bucket_bytes=1000)
    assert world[0].half is not None
    difference = float((small[0].parameters - _flat(world[0].half[0])).abs().max())
    tolerance = 1e-6 if case.max_norm is None else 1e-5  # a norm's rounding depends on buckets
    assert difference <= tolerance, f"smaller buckets change parameters by {difference:.2g} on {n} ranks"


def _check_resume(case: _Case, start: _Model, n: int, world: list[_Trained]) -> None:
    resumed = _train(case, start, n, world)
    for one, other in zip(world, resumed, strict=True):
        assert torch.equal(one.parameters, other.parameters), f"resuming is not bitwise on {n} ranks"
        for held, tensors in one.state.items():
            for key, x in tensors.items():
                assert _same(x, other.state[held][key]), f"resuming on {n} ranks does not bring back the state {key!r}"


def _check_nan(case: _Case, start: _Model, n: int) -> None:
    """A NaN early and a NaN late, on the first and on the last rank."""
    nan_at = {1: 0, _STEPS - 2: n - 1} if n % 2 else {1: n - 1, _STEPS - 2: 0}
    world = _train(case, start, n, nan_at=nan_at)
    for rank, one in enumerate(world):
        expected = [(step, "first.weight") for step in one.void_steps]
        assert one.voided == expected, f"NaN at {{step: rank}} {nan_at} of {n}: rank {rank} saw {one.voided}"
        for key, x in one.state["rank"].items():
            assert bool(x.isfinite().all()), f"a NaN reached the state {key!r}, a residual or a momentum"
        assert bool(one.parameters.isfinite().all()), "a NaN reached a parameter"
    _check_replicas(world, n)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _check_resharding(case: _Case, start: _Model) -> None:
    """What three ranks still have to send, two ranks still have to send."""

    def step(group: SimGroup, states: list[Saved] | None = None) -> tuple[Saved, Tensor]:
        model = copy.deepcopy(start)
        run = case.attach(model, group)
        if states is not None:
            run.method.resize(copy.deepcopy(states))
        _loss(model, group.rank).backward()
        run.optimizer.step()
        return run.method.saved(), _flat(model)

    states = [saved for saved, _ in SimWorld[tuple[Saved, Tensor]](3).run(step)]
    (_, first), (_, second) = SimWorld[tuple[Saved, Tensor]](2).run(lambda group: step(group, states))
    assert torch.equal(first, second), "replicas differ after a change from 3 ranks to 2"
    assert bool(first.isfinite().all()), "a change from 3 ranks to 2 broke the parameters"


def _loss(model: _Model, seed: int) -> Any:
    x = torch.randn(16, 13, generator=torch.Generator().manual_seed(seed))
    return (model(x) - x[:, :5].tanh()).square().mean()
