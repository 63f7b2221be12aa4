"""What methods compute beside their network: one rank's exchange and step, timed with ranks that only echo."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from commopt.errors import AttachError
from commopt.groups.echo import Echo
from commopt.method import EveryStep, Method
from commopt.methods import METHODS, build
from commopt.optim import make_optimizer
from commopt.run.door import attach
from commopt.wire.bucket import Bucket

Shapes = Sequence[Sequence[int]]
MODELS: Sequence[Shapes] = ([(128, 128)], [(256, 256)] * 2, [(512, 512)] * 4)  # 16 k, 131 k and 1 M elements
Clock = Callable[[], float]
_COPIED = 1 << 22  # elements, more than caches hold
_WARM, _TURNS, _SLOW_S = 2, 3, 0.25
# what lets a method reach its steady phase at once, and send in every step
STEADY: dict[str, dict[str, Any]] = {
    "onebit_adam": {"freeze_step": 1},
    "onebit_lamb": {"freeze_step": 1},
    "zero_one_adam": {"var_freeze_step": 1, "local_step_scaler": 1, "local_step_clipper": 1},
}
NEEDED: dict[str, dict[str, Any]] = {  # what has no default
    "threshold": {"threshold": 2.5},  # one of a normal draw in a hundred
    "dice_sgd": {"noise_multiplier": 1e-3, "noise_seed": 1},
}
FITTING = ("adamw", "adam", "lamb", "lion", "sgd")  # the first one that a method stands in for, or goes with
# the common ones first, if the time does not suffice for all
FIRST = (
    *("dense", "fp16", "two_way(int8)", "two_way(4bit)", "loco", "onebit_adam", "ef_sign", "powersgd", "top_k", "dgc"),
    *("distributed_lion", "qsgd", "zero_one_adam", "signum", "ef21", "random_k", "terngrad", "natural"),
)


def timed_methods() -> list[str]:
    """Every method that exchanges in every step, the common ones first."""
    every_step = [name for name, method in METHODS.items() if issubclass(method, EveryStep)]
    return [*FIRST, *(name for name in every_step if name not in FIRST)]


def made(name: str) -> Method:
    """The method whose costs are measured. Raises ConfigError for a name that is unknown, or of an outer method."""
    return build(name, **(STEADY | NEEDED).get(name.partition("(")[0], {}))


def models_of(shapes: Shapes = ()) -> list[Shapes]:
    """What methods are timed with: MODELS, or a smaller one of them and these parameters, which some methods' costs depend on."""
    own = sum(map(math.prod, shapes))
    smaller = [model for model in MODELS if sum(map(math.prod, model)) < own / 2]
    return [*smaller[-1:], shapes] if own else [*MODELS]


def fitting_optimizer(method: Method) -> str:
    """The name of an optimizer that the method can stand in for, or goes with."""
    for name in FITTING:
        optimizer = make_optimizer({"name": name, "lr": 1e-3}, [nn.Parameter(torch.zeros(1, dtype=torch.float32))])
        if method.stands_for and type(optimizer).__name__ not in method.stands_for:
            continue
        try:
            method.check_optimizer(optimizer)
        except AttachError:
            continue
        return name
    raise ValueError(f"{method.name} goes with none of {', '.join(FITTING)}")


def attached(method: Method, shapes: Shapes, ranks: int, device: torch.device) -> tuple[Any, Bucket, Echo]:
    """A run of the method among so many ranks, and a bucket of all gradients."""
    model, group = _model(shapes, device), Echo(ranks)
    optimizer = make_optimizer({"name": fitting_optimizer(method), "lr": 1e-6}, model.parameters())
    run = attach(model, method, optimizer, group=group)
    bucket = Bucket.of([(key, torch.zeros_like(p).view(-1)) for key, p in model.named_parameters()])
    for (_, view), p in zip(bucket.views(), model.parameters(), strict=True):
        p.grad = view.view_as(p)
    return run, bucket, group


def costs_of(
    name: str, ranks: int, device: torch.device, clock: Clock, models: Sequence[Shapes] = MODELS
) -> dict[str, list[tuple[int, float]]]:
    """(elements, seconds) of a method's exchange among so many ranks, and of its optimizer's step; medians.

    For a method that leaves the step to the user's optimizer, only of the exchange. models: the shapes of each one's parameters.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for shapes in models:
        elements, method = sum(map(math.prod, shapes)), made(name)
        run, bucket, _ = attached(method, shapes, ranks, device)
        gradient = torch.randn(elements, dtype=torch.float32, device=device)
        exchange, step = partial(run.exchange, [bucket]), run.optimizer.step
        with torch.no_grad():
            timed = _timed({"exchange": exchange, "step": step}, partial(bucket.flat.copy_, gradient), clock)
        for key in ("exchange", "step") if method.stands_for else ("exchange",):
            found.setdefault(key, []).append((elements, timed[key]))
        run.close()
    return found


def adamw_costs(device: torch.device, clock: Clock, models: Sequence[Shapes] = MODELS) -> list[tuple[int, float]]:
    """(elements, seconds) of a step of AdamW, which stands for the user's optimizer."""
    found = []
    for shapes in models:
        model = _model(shapes, device)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        step = torch.optim.AdamW(model.parameters(), lr=1e-4).step
        found.append((sum(map(math.prod, shapes)), _timed({"step": step}, lambda: None, clock)["step"]))
    return found


def copied_bytes_per_s(device: torch.device, clock: Clock) -> float:
    """The rate at which a float32 tensor, larger than caches, is copied."""
    x = torch.ones(_COPIED, dtype=torch.float32, device=device)
    return x.nbytes / _timed({"copy": partial(torch.empty_like(x).copy_, x)}, lambda: None, clock)["copy"]


def _timed(calls: dict[str, Callable[[], object]], before: Callable[[], object], clock: Clock) -> dict[str, float]:
    """The median seconds of each call, made in turn, after those in which tables are made and warm-ups end."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(_WARM + _TURNS):
        before()
        for name, call in calls.items():
            seconds[name].append(seconds_of(call, clock))
        if turn >= _WARM and sum(map(sum, seconds.values())) > _SLOW_S:
            break
    return {name: median(own[_WARM:]) for name, own in seconds.items()}


def seconds_of(call: Callable[[], object], clock: Clock) -> float:
    """How long a call takes by a clock."""
    began_s = clock()
    call()
    return clock() - began_s


def clock_of(device: torch.device, cores: float = 1.0) -> Clock:
    """Seconds until the device has done what it was given; of the processor, if a rank has less than a core of its own."""
    if device.type == "cpu":
        return time.perf_counter if cores >= 1 else lambda: time.process_time() / cores

    def finished_s() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return finished_s


def _model(shapes: Shapes, device: torch.device) -> nn.Module:
    return nn.ParameterList(torch.zeros(*shape, device=device, dtype=torch.float32) for shape in shapes)
