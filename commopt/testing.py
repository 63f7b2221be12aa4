"""The contract that every method keeps, as one call, for commopt's methods and your own.

    check_method(MyMethod)

Gradient and update methods; ranks are simulated in threads.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

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

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
_STEPS = 12
_HALF = _STEPS // 2
_ZERO_AT = _HALF + 1  # a step in which all gradients are zero


class _Model(nn.Module):
    """Sizes that do not divide evenly, a parameter of one element, and one that no step uses."""

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
    run: PlainRun
    replica: Tensor | None = None  # the parameters after the last step that left all ranks with the same
    losses: list[float] = field(default_factory=list)
    half: tuple[_Model, Any, Saved] | None = None  # model, optimizer and method after half of the steps
    void_steps: list[int] = field(default_factory=list)  # in which this rank must detect a NaN

    @property
    def state(self) -> Saved:
        return self.run.method.saved()

    @property
    def parameters(self) -> Tensor:
        return parameters_to_vector(self.run.model.parameters()).detach()


def default_optimizer(method: Method) -> MakeOptimizer:
    """SGD with momentum, or an optimizer that the update method can replace."""
    kinds: dict[str, Any] = {"AdamW": torch.optim.AdamW, "LAMB": LAMB, "Lion": Lion, "SGD": torch.optim.SGD}
    if not method.stands_for:
        return lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    kind = next((kinds[name] for name in kinds if name in method.stands_for), torch.optim.AdamW)
    return lambda model: kind(model.parameters(), lr=0.003)


_Begin = Callable[[_Model, SimGroup], PlainRun]  # by the method under test, and its optimizer


def check_method(
    method: type[Method] | Choice | Callable[[], Method],
    *,
    optimizer: MakeOptimizer | None = None,
    max_norm: float | None = None,
    ranks: tuple[int, ...] = (1, 2, 3, 5),
) -> None:
    """Raise AssertionError, saying what broke and on how many ranks, unless the method

    - trains: the loss falls, on 1, 2, 3 and 5 ranks, with sizes that do not divide evenly;
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
    make = method if callable(method) and not isinstance(method, type) else lambda: resolve(method)
    first = make()
    if first.kind == "outer":
        raise ConfigError(f"{first.name}: check_method is for methods that exchange in every step")
    optimizer = optimizer or default_optimizer(first)

    def begin(model: _Model, group: SimGroup) -> PlainRun:
        run = attach(model, make(), optimizer(model), group=group, max_norm=max_norm)
        assert isinstance(run, PlainRun)
        return run

    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = _Model()
    for n in ranks:
        world = _train(begin, start, n)
        _check_training(world, start, n)
        if n == max(ranks):
            _check_buckets(begin, start, n, world)
        _check_resume(begin, start, n, world)
        _check_nan(begin, start, n)
    _check_resharding(begin, start)


def _train(begin: _Begin, start: _Model, n: int, halves: Sequence[_Trained] = (), **options: Any) -> list[_Trained]:
    """Train on n ranks, from the start or from half of the steps, as `halves` kept it."""
    world: SimWorld[_Trained] = SimWorld(n)
    starts = [halves[rank].half if halves else (copy.deepcopy(start), None, None) for rank in range(n)]
    return world.run(lambda group: _train_rank(begin, starts[group.rank], group, **options))


def _train_rank(
    begin: _Begin,
    start: Any,
    group: SimGroup,
    *,
    steps: int = _STEPS,
    bucket_bytes: int = PlainRun.bucket_bytes,
    nan_at: Mapping[int, int] | None = None,
    resized: Sequence[Saved] = (),
) -> _Trained:
    """resized: the states of a world of another size, to continue from."""
    model, optimizer, state = start
    run = begin(model, group)
    run.bucket_bytes = bucket_bytes
    trained = _Trained(run)
    if state is not None:
        run.optimizer.load_state_dict(optimizer)
        run.method.load(state)
    if resized:
        run.method.resize(copy.deepcopy(resized))
    for step in range(0 if state is None else _HALF, steps):
        if step == _HALF:
            trained.half = copy.deepcopy((model, run.optimizer.state_dict(), run.method.saved()))
        x = torch.randn(16, 13, generator=torch.Generator().manual_seed(1000 * step + group.rank))
        loss = (model(x) - x[:, :5].tanh()).square().mean()
        run.optimizer.zero_grad()
        (loss * 0 if step == _ZERO_AT else loss).backward()
        if step in (nan_at or {}):
            _step_with_nan(trained, group, step, nan_at[step])  # type: ignore[index]
        else:
            run.optimizer.step()
        if run.method.is_synchronised:
            trained.replica = trained.parameters
        trained.losses.append(loss.item())
    run.close()
    return trained


def _step_with_nan(trained: _Trained, group: SimGroup, step: int, bad: int) -> None:
    """Step with a NaN in one rank's gradient; no rank that exchanges may change that parameter or its state."""
    run, method = trained.run, trained.run.method
    weight = run.parameters["first.weight"]
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


def _check_training(world: list[_Trained], start: _Model, n: int) -> None:
    _check_replicas(world, n)
    losses = [sum(one.losses[step] for one in world) / n for step in range(_STEPS)]
    assert losses[-1] < losses[0], f"the loss did not fall on {n} ranks: {losses[0]:.4f} to {losses[-1]:.4f}"
    unused = world[0].run.parameters["unused"]
    assert torch.equal(unused, start.unused), f"a parameter that no rank uses was changed on {n} ranks"
    assert not any(one.run.voided for one in world), f"a step without a NaN was void on {n} ranks"
    if all(one.run.method.is_synchronised for one in world):
        for key, x in world[0].state["shared"].items():
            assert all(_same(x, one.state["shared"][key]) for one in world), (
                f"the state {key!r} differs between {n} ranks: declare it as held='rank', or compute it from what all ranks have"
            )
    assert all(bool(one.parameters.isfinite().all()) for one in world), f"zero gradients broke parameters on {n} ranks"
    sent = [one.run.traffic.payload_bytes for one in world]
    assert (min(sent) > 0) if n > 1 else (sent == [0.0]), f"counted {sent} bytes on {n} ranks"


def _check_replicas(world: list[_Trained], n: int) -> None:
    replicas = [one.replica for one in world if one.replica is not None]
    assert len(replicas) == n, f"replicas were never synchronised on {n} ranks"
    assert all(torch.equal(replicas[0], replica) for replica in replicas), f"replicas differ on {n} ranks"


def _check_buckets(begin: _Begin, start: _Model, n: int, world: list[_Trained]) -> None:
    small = _train(begin, start, n, steps=_HALF, bucket_bytes=1000)
    assert world[0].half is not None
    large = parameters_to_vector(world[0].half[0].parameters()).detach()
    difference = float((small[0].parameters - large).abs().max())
    tolerance = 1e-6 if world[0].run.max_norm is None else 1e-5  # a norm's rounding depends on buckets
    assert difference <= tolerance, f"smaller buckets change parameters by {difference:.2g} on {n} ranks"


def _check_resume(begin: _Begin, start: _Model, n: int, world: list[_Trained]) -> None:
    resumed = _train(begin, start, n, world)
    for one, other in zip(world, resumed, strict=True):
        assert torch.equal(one.parameters, other.parameters), f"resuming is not bitwise on {n} ranks"
        for held, tensors in one.state.items():
            for key, x in tensors.items():
                assert _same(x, other.state[held][key]), f"resuming on {n} ranks does not restore the state {key!r}"


def _check_nan(begin: _Begin, start: _Model, n: int) -> None:
    """A NaN early and a NaN late, on the first and on the last rank."""
    nan_at = {1: 0, _STEPS - 2: n - 1} if n % 2 else {1: n - 1, _STEPS - 2: 0}
    world = _train(begin, start, n, nan_at=nan_at)
    for rank, one in enumerate(world):
        expected = [(step, "first.weight") for step in one.void_steps]
        assert one.run.voided == expected, f"NaN at {{step: rank}} {nan_at} of {n}: rank {rank} saw {one.run.voided}"
        for key, x in one.state["rank"].items():
            assert bool(x.isfinite().all()), f"a NaN reached the state {key!r}, a residual or a momentum"
        assert bool(one.parameters.isfinite().all()), "a NaN reached a parameter"
    _check_replicas(world, n)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _check_resharding(begin: _Begin, start: _Model) -> None:
    """Two ranks that continue from the states of three stay equal and finite."""
    states = [one.state for one in _train(begin, start, 3, steps=1)]
    first, second = (one.parameters for one in _train(begin, start, 2, steps=1, resized=states))
    assert torch.equal(first, second), "replicas differ after a change from 3 ranks to 2"
    assert bool(first.isfinite().all()), "a change from 3 ranks to 2 broke the parameters"
