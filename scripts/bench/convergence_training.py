"""Training one cell of convergence.py: ranks as threads over a SimWorld, on one core."""

from __future__ import annotations

import copy
import functools
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from building import attach, training_program
from losses import finite
from torch import Tensor, nn
from torch.nn import functional as F

from commopt.errors import ConfigError
from commopt.groups import Group, SimWorld
from commopt.method import EveryStep
from commopt.run.run import Run

CURVE_POINTS = 20

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """A model that yields its loss, batches to draw, and the held-out batches that all results are judged by."""

    make_model: Callable[[], nn.Module]
    draw: Callable[[torch.Generator], Batch]
    held_out: Sequence[Batch]


@functools.cache
def corpus() -> tuple[Tensor, Tensor]:
    train, held_out = training_program().read_corpus(None)
    return train, held_out


def gpt(*, layers: int, heads: int, width: int, context: int, batch: int) -> Problem:
    program, (train, held_out) = training_program(), corpus()
    windows = torch.Generator().manual_seed(1)
    return Problem(
        make_model=lambda: program.GPT(layers, heads, width, context),
        draw=lambda generator: program.draw(train, batch, context, generator),
        held_out=[program.draw(held_out, 32, context, windows) for _ in range(32)],
    )


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.layers(x), target)


@functools.cache
def digits_data() -> tuple[Tensor, Tensor]:
    """(1797, 64) f32 in [0, 1] and (1797,) i64."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError("the digits come with scikit-learn: pip install scikit-learn") from None
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images).float() / 16, torch.from_numpy(labels).long()


def digits(*, width: int, batch: int, noise: float) -> Problem:
    """Every fifth image is held out, under 16 draws of noise."""
    images, labels = digits_data()
    is_held_out = torch.arange(len(labels)) % 5 == 4
    (x, y), (x_out, y_out) = ((images[chosen], labels[chosen]) for chosen in (~is_held_out, is_held_out))

    def noisy(clean: Tensor, generator: torch.Generator) -> Tensor:
        return clean + noise * torch.randn(clean.shape, generator=generator)

    def draw(generator: torch.Generator) -> Batch:
        chosen = torch.randint(len(y), (batch,), generator=generator)
        return noisy(x[chosen], generator), y[chosen]

    noises = torch.Generator().manual_seed(1)
    return Problem(lambda: MLP(width), draw, [(noisy(x_out, noises), y_out) for _ in range(16)])


PROBLEMS: Mapping[str, Callable[..., Problem]] = {"gpt": gpt, "digits": digits}


def run_cell(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train one cell on this core, and return what is stored of it. Divergence is a result too."""
    start_s, start_cpu_s, task = time.perf_counter(), time.process_time(), settings["task"]
    problem = PROBLEMS[task["problem"]](**task["sizes"])
    torch.manual_seed(settings["seed"])
    model = problem.make_model()
    replicas = [copy.deepcopy(model) for _ in range(task["ranks"])]
    turn = threading.Lock()  # one rank computes at a time: threads of one core only fight for the interpreter
    ranks = SimWorld[dict[str, Any]](task["ranks"]).run(
        lambda group: train(replicas[group.rank], group, problem, settings, turn)
    )
    with torch.no_grad():
        loss = statistics.fmean(replicas[0](*batch).item() for batch in problem.held_out)
    parameters = sum(p.numel() for p in model.parameters())
    every_step = [statistics.fmean(losses) for losses in zip(*(rank["losses"] for rank in ranks), strict=True)]
    steady = [rank["steady_bytes"] for rank in ranks]
    return {
        "parameters": parameters,
        "loss": finite(loss),
        "curve": curve(every_step),
        "steady_bytes": None if None in steady else statistics.fmean(steady) / parameters,
        "mean_bytes": statistics.fmean(rank["bytes"] for rank in ranks) / task["steps"] / parameters,
        "void_steps": ranks[0]["void_steps"],
        "replicas_are_equal": ranks[0]["replicas_are_equal"],
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - start_s, 2),
        "cpu_seconds": round(time.process_time() - start_cpu_s, 2),
    }


def train(
    model: nn.Module, group: Group, problem: Problem, settings: Mapping[str, Any], turn: threading.Lock
) -> dict[str, Any]:
    """What one rank does. Bytes are counted from the first step on, and again from the first steady one."""
    steps = settings["task"]["steps"]
    run = attach(settings, model, group)
    falling = steps * (1 - settings["task"]["decay_from"])
    schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: min(1.0, (steps - step) / falling))
    data = torch.Generator().manual_seed(settings["seed"] * 1000 + group.rank)  # the same data whatever the method
    begin, steady_from, losses = sent_bytes(run), None, []
    for step in range(steps):
        if steady_from is None and run.method.is_steady:
            steady_from = step, sent_bytes(run)
        with turn:
            loss = model(*problem.draw(data))
            run.optimizer.zero_grad()
            loss.backward()
        run.optimizer.step()
        schedule.step()
        losses.append(loss.item())
    end = sent_bytes(run)
    is_promised = isinstance(run.method, EveryStep) and run.method.is_synchronised
    return {
        "losses": losses,
        "bytes": end - begin,
        "steady_bytes": None if steady_from is None else (end - steady_from[1]) / (steps - steady_from[0]),
        "void_steps": len({step for step, _ in run.voided}),
        "replicas_are_equal": run.replicas_are_equal() if is_promised else None,
    }


def sent_bytes(run: Run) -> float:
    """What this rank has sent, without what plain models send to agree on which parameters a step used."""
    return sum(n for (_, _, label), n in run.traffic.nbytes.items() if label != "which parameters are used")


def curve(losses: Sequence[float]) -> list[tuple[int, float | None]]:
    """Mean training losses of some stretches of steps, each with the step at its end."""
    ends = sorted({round(len(losses) * k / CURVE_POINTS) for k in range(1, CURVE_POINTS + 1)} - {0})
    return [
        (end, finite(statistics.fmean(losses[start:end]))) for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]
