"""Parameters whose gradients the tests write themselves, and the frame of an oracle test over them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rig import start
from torch import Tensor, nn

from commopt.groups import Group, SimWorld
from commopt.wire.bucket import Bucket

F64 = NDArray[np.float64]
Shapes = Sequence[tuple[int, ...]]


class Parameters(nn.Module):
    """The same on every rank; the first `dead` elements of the first parameter never get a gradient."""

    def __init__(self, *shapes: tuple[int, ...], mean: float = 0.3, dead: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.all = nn.ParameterList([nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes])
        self.mean, self.dead = mean, dead

    def set_gradients(self, rank: int, step: int) -> None:
        """A mean plus each rank's own noise; the size cycles through 1, 0.1 and 0.01 over the parameters."""
        generator = torch.Generator().manual_seed(1000 * rank + step)
        for k, p in enumerate(self.all):
            gradient = (self.mean + torch.randn(p.shape, generator=generator)) * 10.0 ** -(k % 3)
            if k == 0:
                gradient.view(-1)[: self.dead] = 0.0
            p.grad = gradient.to(p.dtype)

    def flat(self) -> F64:
        return flat(self.all)


def parameters(*shapes: tuple[int, ...]) -> Parameters:
    """With two elements that never get a gradient, which methods must not move."""
    return Parameters(*shapes, mean=0.5, dead=2)


def flat(tensors: Iterable[Tensor | None]) -> F64:
    """(n,) all of them in float64."""
    return np.asarray(torch.cat([x.detach().reshape(-1) for x in tensors if x is not None]).double())


def gradients(shapes: Shapes, ranks: int, step: int, **options: Any) -> F64:
    """(ranks, n) what `set_gradients` writes."""
    rows = []
    for rank in range(ranks):
        model = Parameters(*shapes, **options)
        model.set_gradients(rank, step)
        rows.append(flat(p.grad for p in model.all))
    return np.stack(rows)


def exchange(method: Any, bucket: Bucket, group: Group) -> Bucket:
    """Exchange one bucket and count it, as a run does."""
    method.exchange(bucket, group)
    if bucket.void is None:
        method.exchanges[[method.index.position[name] for name in bucket.names]] += 1
    return bucket


def sent_for(make: Callable[[], Any], g: Tensor, steps: int) -> tuple[Tensor, Tensor, list[Any]]:
    """Of three ranks, where rank i has (i + 1) g: (steps, n) what they get, (steps + 1, n) their mean residual, and their methods."""

    def work(group: Group) -> tuple[Tensor, Tensor, Any]:
        method = make()
        method.bind([("x", g)], group)
        out, residuals = [], [method.worker.residual.clone()]
        for _ in range(steps):
            out.append(exchange(method, Bucket.of([("x", g * (group.rank + 1))]), group).flat)
            residuals.append(method.worker.residual.clone())
        return torch.stack(out), torch.stack(residuals), method

    out, residuals, methods = zip(*SimWorld[Any](3).run(work), strict=True)
    assert all(torch.equal(one, out[0]) for one in out)
    return out[0], torch.stack(residuals).float().mean(0), list(methods)


def spans(shapes: Shapes) -> list[slice]:
    """Where each parameter lies in a flat tensor of all."""
    starts = np.cumsum([0, *map(math.prod, shapes)])
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(starts)]


def snapshot(run: Any) -> dict[str, F64]:
    """The parameters "x" and every tensor of `saved()`."""
    saved = run.method.saved()
    tensors = {**saved["shared"], **saved["rank"]}
    return {"x": flat(run.parameters.values()), **{key: np.asarray(x.double().clone()) for key, x in tensors.items()}}


def simulate(
    ranks: int,
    shapes: Shapes,
    steps: int,
    name: str,
    make: Any = Parameters,
    *,
    rate_of: Any = None,
    observe: Any = snapshot,
    **options: Any,
) -> list[list[Any]]:
    """[rank][step] what `observe` sees of a run before each step, and after the last.

    rate_of: the learning rate of a step, by its number. options: those of `rig.start`.
    """

    def work(group: Group) -> list[Any]:
        model = make(*shapes)
        run = start(model, name, group, **options)
        states = [observe(run)]
        for step in range(steps):
            if rate_of is not None:
                run.optimizer.param_groups[0]["lr"] = rate_of(step)
            model.set_gradients(group.rank, step)
            run.optimizer.step()
            states.append(observe(run))
        return states

    return SimWorld[Any](ranks).run(work)


Paper = Callable[[int, list[dict[str, F64]]], Any]


def check_steps(
    runs: list[list[dict[str, F64]]],
    paper: Paper,
    *,
    share: float = 0.9,
    rtol: float = 1e-5,
    atol: float = 2e-6,
    residual_atol: float = 1e-5,
    tolerances: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """Compare every step with the paper's from the state before it.

    paper: takes a step and each rank's state before it; returns the state wanted by key, (n,) for all ranks or (N, n), and (n,) which
        elements are far enough from another choice or sign to be compared; also the exchange that has made it, if that keeps residuals.
        State that has not n elements is compared in full.
    share: how many must be. tolerances: (rtol, atol) of single keys.
    """
    compared, steps = 0, len(runs[0]) - 1
    for step in range(steps):
        expected, clear, *exchanges = paper(step, [run[step] for run in runs])
        compared += int(clear.sum())
        for key, value in expected.items():
            found = np.stack([np.atleast_1d(run[step + 1][key]) for run in runs])
            assert np.ndim(value) == 2 or (found == found[0]).all(), f"{key} differs between ranks in step {step}"
            near = (tolerances or {}).get(key, (rtol, atol))
            where = clear if found.shape[1] == len(clear) else slice(None)
            wanted = np.broadcast_to(value, found.shape)
            np.testing.assert_allclose(found[:, where], wanted[:, where], *near, err_msg=f"{key} in step {step}")
        for one in exchanges:
            one.check_after([run[step + 1] for run in runs], clear, residual_atol)
    assert compared > share * steps * len(clear)


def check_free_run(
    runs: list[list[dict[str, F64]]],
    paper: Paper,
    steps: int,
    *,
    share: float = 1.0,
    rtol: float = 0.0,
    atol: float = 1e-5,
) -> None:
    """Compare the parameters after so many steps with the paper's, each from its own state before it. share: how many must be near."""
    states = [run[0] for run in runs]
    for step in range(steps):
        expected, _, *exchanges = paper(step, states)
        for one in exchanges:
            expected = {**expected, **one.residuals()}
        states = [
            state | {key: x[rank] if isinstance(x, list) or np.ndim(x) == 2 else x for key, x in expected.items()}
            for rank, state in enumerate(states)
        ]
    for run, state in zip(runs, states, strict=True):
        assert np.isclose(run[steps]["x"], state["x"], rtol, atol).mean() >= share
        assert float(np.abs(state["x"] - run[0]["x"]).max()) > 0.05


def stacked(states: list[dict[str, F64]], key: str) -> F64:
    """(N, n) what each rank has."""
    return np.stack([state[key] for state in states])
