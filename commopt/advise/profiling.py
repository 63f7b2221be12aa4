"""Finds out what a method sends, by letting it exchange with pretended ranks: its `Profile`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from commopt.advise.codecs import STEADY, attached, fitting_optimizer
from commopt.groups import SimGroup, SimWorld
from commopt.groups.echo import Echo
from commopt.method import EveryStep, Method
from commopt.methods import build
from commopt.optim import make_optimizer
from commopt.optim.update import UpdateMethod
from commopt.plan.profile import Phase, Profile

SIDE = 1024
LEAST = 1e-4  # bytes per parameter that count; a header is less
RANKS = (2, 4, 8, 32)  # among which contributions are measured, to see how they depend on N


def profile_of(
    method: Method,
    name: str | None = None,
    shapes: Sequence[Sequence[int]] = ((SIDE, SIDE), (SIDE, SIDE)),
    ranks: Sequence[int] = RANKS,
) -> Profile:
    """What the planner has to know of a method with its options; costs and losses, which are measured elsewhere, are left out.

    name: how it is called in tables; the method's own by default. shapes: of the parameters, which some methods' bytes depend on.
    ranks: among which numbers of machines exchanges are tried; for others, bytes are worked out from these.
    """
    optimizer = fitting_optimizer(method)
    profile: dict[str, Any] = {
        "name": name or method.name,
        "kind": method.kind,
        "options": dict(method.given) or None,
        "overlaps": not getattr(method, "merges_buckets", False),
        "warmup_steps": method.warmup_steps,
        "finds_warmup": getattr(method, "freeze_at", None) == "auto",
        "optimizer": optimizer,
    }
    if not isinstance(method, EveryStep):
        outer: Any = method
        profile |= {"every": outer.every, "fragments": outer.fragments, "delay": outer.delay}
        profile["phases"], profile["host_bytes"] = _outer_phases(outer), _outer_state(method)
        return Profile(**profile)
    if getattr(method.options, "var_freeze_step", None) is not None:
        profile["every"] = method.options.local_step_clipper  # what the intervals of its local steps grow to
    profile["phases"] = _phases(method, steady_options(method), shapes, ranks)
    profile["state_bytes"] = _state_bytes(method, optimizer)
    return Profile(**profile)


def steady_options(method: Method) -> dict[str, Any]:
    """The method's options, changed so that it is in its steady phase from the second step on."""
    given = {**method.given, **STEADY.get(method.name, {})}
    return {**given, "warmup_steps": 0, "warmup_epochs": 0, "steps_per_epoch": 0} if method.name == "dgc" else given


def _phases(
    method: EveryStep, options: Mapping[str, Any], shapes: Sequence[Sequence[int]], ranks: Sequence[int]
) -> tuple[Phase, ...]:
    """The calls of one exchange, each fitted to what a rank contributes to it among these numbers of ranks."""
    every = [_calls(type(method)(**options), shapes, n) for n in ranks]
    basis = np.array([[1.0, 1 / n, n.bit_length() / n] for n in ranks])
    elements = sum(map(math.prod, shapes))
    found = []
    for calls in zip(*every, strict=True):
        values = np.array([nbytes for _, nbytes in calls]) / elements
        for columns in ((0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)):  # the simplest that explains them
            solved, *_ = np.linalg.lstsq(basis[:, columns], values, rcond=None)
            if np.allclose(basis[:, columns] @ solved, values, rtol=2e-3, atol=LEAST):
                break
        terms = dict(zip(columns, solved.tolist(), strict=True))
        found.append(Phase(calls[0][0], *(_rounded(terms.get(k, 0.0)) for k in range(3))))
    return tuple(found)


def _calls(method: Method, shapes: Sequence[Sequence[int]], ranks: int) -> list[tuple[str, int]]:
    """The calls of one steady exchange of one bucket, and the bytes that a rank contributes to each."""
    run, bucket, group = attached(method, shapes, ranks, torch.device("cpu"))
    x = torch.randn(len(bucket.flat), generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    for _ in range(3):
        bucket.flat.copy_(x)
        group.calls.clear()
        run.exchange([bucket])
        calls = list(group.calls)
        run.optimizer.step()
    run.close()
    return calls


def _rounded(x: float) -> float:
    return float(f"{x:.4g}") if abs(x) > LEAST else 0.0


def _outer_phases(method: Any) -> tuple[Phase, ...]:
    """One round of an outer method, from its own formula: a mean over all in two phases, or messages to partners."""
    from commopt.methods.diloco import DiLoCo

    few, many = (method.bytes_per_parameter(n) * method.every for n in (2, 32))
    if not isinstance(method, DiLoCo):
        return (Phase("send", _rounded(many)),)
    is_dense = method.message.compressor is None
    if is_dense:
        return (Phase("all_reduce", _rounded(many / (2 * 31 / 32))),)
    if abs(many / few - 31) < 1:  # a gather
        return (Phase("all_gather", _rounded(few)),)
    return Phase("all_to_all", _rounded(few)), Phase("all_gather", over_ranks=_rounded(few))


def _named() -> dict[str, nn.Parameter]:
    return {f"x{k}": nn.Parameter(torch.zeros(SIDE, SIDE, dtype=torch.float32)) for k in range(8)}


def _state_bytes(method: EveryStep, optimizer: str, ranks: int = 4) -> float:
    """Bytes per parameter that the method keeps on a rank beyond the optimizer that it is compared with."""
    named, own = _named(), 0
    fresh: Any = build(method.name, **method.given)
    if isinstance(fresh, UpdateMethod):  # its state takes the place of the optimizer's
        steps = make_optimizer({"name": optimizer, "lr": 1e-3}, named.values())
        for p in named.values():
            p.grad = torch.zeros_like(p)
        steps.step()
        state = (x for kept in steps.state.values() for x in kept.values() if isinstance(x, torch.Tensor) and x.dim())
        own = sum(x.nbytes for x in state)
        fresh.follow(steps, named)
    fresh.bind([*named.items()], Echo(ranks))
    return float(round((fresh.state_bytes() - own) / sum(p.numel() for p in named.values()), 3))


def _outer_state(method: Method) -> float:
    named = _named()
    fresh: Any = build(method.name, **method.given)
    fresh.bind([*named.items()], SimGroup(SimWorld[None](4), 0).peers)
    return float(round(fresh.state_bytes() / sum(p.numel() for p in named.values()), 3))
