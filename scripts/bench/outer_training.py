"""Training one cell of outer.py: replicas as threads over a SimWorld, on one core."""

from __future__ import annotations

import copy
import functools
import math
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from building import attach
from convergence_training import Problem, gpt
from losses import finite
from torch import Tensor, nn

from commopt.groups import SimGroup, SimWorld
from commopt.run.outer import OuterRun

CURVE_POINTS, CURVE_BATCHES = 10, 4


class Gathering:
    """What all replicas have at one moment; the last one to come looks at them together."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self._parts, self._lock = ranks, dict[Any, dict[int, Any]](), threading.Lock()

    def meet(self, moment: Any, rank: int, part: Any) -> list[Any] | None:
        """The parts of all, by rank, for the last rank to come; None for the others."""
        with self._lock:
            parts = self._parts.setdefault(moment, {})
            parts[rank] = part
            if len(parts) < self.ranks:
                return None
            del self._parts[moment]
        return [parts[k] for k in range(self.ranks)]


def spread_of(replicas: Sequence[Tensor]) -> float:
    """The root mean square over replicas of ||x_i - mean|| / ||mean||; replicas: (P,) each."""
    stacked = torch.stack(list(replicas)).double()  # (N, P)
    mean = stacked.mean(0)
    return float((stacked - mean).square().sum(1).mean().sqrt() / mean.norm())


def flat_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


def rate_at(step: int, task: Mapping[str, Any]) -> float:
    """The learning rate over its peak: linear warm-up, then a cosine that ends at `decay_to`."""
    warmup = max(1, round(task["warmup"] * task["steps"]))
    if step < warmup:
        return float((step + 1) / warmup)
    share = (step - warmup) / max(1, task["steps"] - warmup)
    return float(task["decay_to"] + (1 - task["decay_to"]) * (1 + math.cos(math.pi * share)) / 2)


@torch.no_grad()
def validation(model: nn.Module, problem: Problem, batches: int) -> float:
    losses = [float(model(*batch)) for batch in problem.held_out[:batches]]
    return statistics.fmean(losses)


def run_cell(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train one cell on this core, and return what is stored of it. Divergence is a result too."""
    return Training(settings).run()


class Training:
    """All replicas of a cell, and what is seen of them together."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings, self.task, self.ranks = settings, settings["task"], settings["ranks"]
        self.problem = gpt(**self.task["sizes"])
        torch.manual_seed(settings["seed"])
        self.model = self.problem.make_model()
        self.replicas = [copy.deepcopy(self.model) for _ in range(self.ranks)]
        self.turn = threading.Lock()  # one rank computes at a time: threads of one core only fight for the interpreter
        self.gathering = Gathering(self.ranks)
        self.curve: list[tuple[int, float | None, float | None]] = []  # (step, mean loss, loss of the mean)
        self.spreads: list[tuple[int, float | None]] = []

    def run(self) -> dict[str, Any]:
        start_s, start_cpu_s, parameters = time.perf_counter(), time.process_time(), flat_of(self.model).numel()
        ranks = SimWorld[dict[str, Any]](self.ranks).run(self.train)
        held_out = self.task["held_out"]
        losses = [validation(replica, self.problem, held_out) for replica in self.replicas]
        sent = statistics.fmean(rank["bytes"] for rank in ranks) / self.task["steps"] / parameters
        estimates = [rank["spread_estimate"] for rank in ranks if rank["spread_estimate"] is not None]
        return {
            "parameters": parameters,
            "loss": finite(statistics.fmean(losses)),
            "losses": [finite(loss) for loss in losses],
            "averaged_loss": finite(validation(self.averaged(self.replicas), self.problem, held_out)),
            "curve": sorted(self.curve),
            "spreads": sorted(self.spreads),
            "spread_estimate": statistics.fmean(estimates) if estimates else None,
            "bytes": sent,
            "missed": sum(rank["missed"] for rank in ranks),
            "torch": torch.__version__,
            "seconds": round(time.perf_counter() - start_s, 2),
            "cpu_seconds": round(time.process_time() - start_cpu_s, 2),
        }

    def averaged(self, replicas: Sequence[nn.Module]) -> nn.Module:
        """A model with the mean of the parameters."""
        mean = copy.deepcopy(self.model)
        with torch.no_grad():
            for p, *parts in zip(mean.parameters(), *(replica.parameters() for replica in replicas), strict=True):
                p.copy_(torch.stack(parts).mean(0))
        return mean

    def train(self, group: SimGroup) -> dict[str, Any]:
        """What one rank does; a step takes every rank one virtual second."""
        settings, task, model = self.settings, self.task, self.replicas[group.rank]
        run = attach(settings, model, group, max_norm=task["clip"])
        schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, functools.partial(rate_at, task=task))
        data = torch.Generator().manual_seed(settings["seed"] * 1000 + group.rank)  # the same whatever the method
        run.join()
        begin = group.traffic.payload_bytes
        for step in range(task["steps"]):
            with self.turn:
                run.optimizer.zero_grad()
                model(*self.problem.draw(data)).backward()
            run.optimizer.step()
            schedule.step()
            if isinstance(run, OuterRun):
                group.advance(1.0)
            self.look(step + 1, group.rank)
        run.finish()
        return {
            "bytes": group.traffic.payload_bytes - begin,
            "missed": sum(report.missed for report in run.reports),
            "spread_estimate": run.spread if isinstance(run, OuterRun) else None,
        }

    def look(self, steps: int, rank: int) -> None:
        """Note the spread before and after each round's end, and now and then the losses on a part of the held-out text."""
        task, model = self.task, self.replicas[rank]
        if steps % task["every"] in (0, task["every"] - 1) and self.ranks > 1:
            flats = self.gathering.meet(("spread", steps), rank, flat_of(model))
            if flats is not None:
                self.spreads.append((steps, finite(spread_of(flats))))
        points = {round(task["steps"] * k / CURVE_POINTS) for k in range(1, CURVE_POINTS + 1)}
        if steps in points:
            with self.turn:
                loss = validation(model, self.problem, CURVE_BATCHES)
            parts = self.gathering.meet(("loss", steps), rank, (loss, copy.deepcopy(model)))
            if parts is not None:
                mean = validation(self.averaged([replica for _, replica in parts]), self.problem, CURVE_BATCHES)
                self.curve.append((steps, finite(statistics.fmean(loss for loss, _ in parts)), finite(mean)))
