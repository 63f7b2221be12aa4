"""Compiles what methods need on a CPU, before any rank starts: ranks that compile in their first step would keep all waiting."""

import importlib
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch

from commopt import kernels
from commopt.groups import SimGroup, SimWorld
from commopt.method import Method
from commopt.methods import METHODS, build
from commopt.optim import make_optimizer

_log = logging.getLogger(__name__)


def prepare_all(tell: Callable[[str], object] = print) -> None:
    """`prepare` for all of commopt's methods, with their defaults."""
    tell("looking for the kernels of all methods")
    given = {"threshold": {"threshold": 0.01}}
    prepare((build(name, **given.get(name, {})) for name in METHODS), tell)


def prepare(methods: Iterable[Method], tell: Callable[[str], object]) -> None:
    """Compile the kernels of these methods, once on this machine, in several processes; quick if that has been done.

    A method's kernels are those that its `bind` runs, on a tiny model of two simulated ranks. tell: gets lines about the progress.
    """
    kernels.load_cpu()
    ahead = importlib.import_module("commopt.kernels.cpu.ahead")
    with ahead.noted() as found:
        for method in methods:
            try:
                SimWorld[None](2).run(lambda group, method=method: _bind(type(method)(**method.given), group))  # type: ignore[misc]
            except Exception as error:  # a method of the user's own may need more: its ranks compile
                _log.debug("%s: cannot be bound to a tiny model: %s", method.name, error)
    ahead.compile_all(list(found), tell)


def _bind(method: Any, group: SimGroup) -> None:
    weight = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.float32))
    if method.stands_for:
        kinds = (
            name for name in ("adam", "lamb", "lion", "sgd") if name in {kind.lower() for kind in method.stands_for}
        )
        method.follow(make_optimizer({"name": next(kinds), "lr": 0.1}, [weight]), {"weight": weight})
    method.bind([("weight", weight)], group.peers if method.kind == "outer" else group)
