"""NoLoCo's figure 5, by Monte Carlo: what an all-reduce over a tree costs in pair averages, and what waiting for all costs.

Kolehmainen et al. 2025, arXiv:2506.10911, figure 5 and equations 5 to 7. Nothing is sent here: message times and step
times are drawn, and nodes wait for each other as the two algorithms make them wait; for training, in `plan.simulate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from commopt.plan.links import LinkModel
from commopt.plan.pipes import F64
from commopt.plan.simulate import Exchange, Times, simulate

NODES = (4, 16, 64, 256, 1024)
SPREADS = (0.01, 0.5, 1.0, 1.5, 2.0, 2.5)  # std / mean of a message's time
INNER_STEPS = (10, 25, 50, 100)
OUTER_STEPS = (250, 500)  # by the paper's text, and by its caption
# The paper writes LogNormal(1, 0.5); its 20 % at 1,024 nodes come out if 0.5 is the variance, as in its LogNormal(mu, sigma^2).
STEP_LOG_MEAN, STEP_LOG_VARIANCE = 1.0, 0.5
STEP = Times(math.exp(STEP_LOG_MEAN + STEP_LOG_VARIANCE / 2), math.sqrt(math.expm1(STEP_LOG_VARIANCE)))
RUNS, QUICK_RUNS = 4000, 100
REPLICAS, QUICK_REPLICAS = 2048, 256  # nodes over all runs of a point of figure 5B
PAIRS = 100_000  # drawn for the mean of a pair's exchange


# ---- figure 5A: messages ---------------------------------------------------------------------------------------------


def message(spread: float) -> Times:
    """Times of messages, in their mean."""
    return Times(1.0, spread)


def swap_mean(spread: float) -> float:
    """E max of two messages of mean 1: how long a pair takes to swap, on average; equation 7.

    (1 + erf(sigma / 2)) exp(mu + sigma^2 / 2), whose second factor is the mean of a message.
    """
    return 1 + math.erf(message(spread).sigma / 2)


def swap_times(rng: np.random.Generator, spread: float, pairs: int) -> F64:
    """Times until both of a pair have the other's message; (pairs,)."""
    latest: F64 = message(spread).draw(rng, (pairs, 2)).max(axis=1)
    return latest


def tree_times(rng: np.random.Generator, nodes: int, spread: float, runs: int) -> F64:
    """Times of all-reduces over a binary tree whose leaves are the nodes; (runs,).

    Up: a parent is ready when the messages of both children have come. Down: each child gets a message of its own. It
    ends when the last leaf has the mean. All 4 (nodes - 1) messages are drawn: this is the paper's curve. Its mean is
    2 log2(nodes) without spread. Raises ValueError for a number of nodes that is no power of two.
    """
    ready = np.zeros((runs, _power_of_two(nodes)))  # (runs, nodes of this level)
    while ready.shape[1] > 1:
        come = ready + message(spread).draw(rng, ready.shape)
        ready = np.maximum(come[:, ::2], come[:, 1::2])
    while ready.shape[1] < nodes:
        ready = np.repeat(ready, 2, axis=1)
        ready = ready + message(spread).draw(rng, ready.shape)
    latest: F64 = ready.max(axis=1)
    return latest


def binomial_times(rng: np.random.Generator, nodes: int, spread: float, runs: int) -> F64:
    """The same where a parent is one of its two children, and sends itself nothing: 2 (nodes - 1) messages; (runs,).

    This is what a program can do on `nodes` machines, and what is measured. Raises ValueError as `tree_times` does.
    """
    ready = np.zeros((runs, _power_of_two(nodes)))
    while ready.shape[1] > 1:
        own, other = ready[:, ::2], ready[:, 1::2]
        ready = np.maximum(own, other + message(spread).draw(rng, other.shape))
    while ready.shape[1] < nodes:
        ready = np.stack([ready, ready + message(spread).draw(rng, ready.shape)], axis=2).reshape(runs, -1)
    latest: F64 = ready.max(axis=1)
    return latest


def _power_of_two(nodes: int) -> int:
    if nodes < 2 or nodes & (nodes - 1):
        raise ValueError(f"{nodes} nodes make no full binary tree; write a power of two, from 2")
    return nodes


def message_point(nodes: int, spread: float, *, runs: int, seed: int) -> dict[str, Any]:
    """A point of figure 5A: the all-reduce over 2 E max, the paper's cost of a pair average."""
    rng = np.random.default_rng([seed, nodes, round(100 * spread)])
    pair = 2 * swap_mean(spread)
    tree, binomial = (times(rng, nodes, spread, runs) / pair for times in (tree_times, binomial_times))
    return {
        "nodes": nodes,
        "spread": spread,
        "ratio": float(tree.mean()),
        "standard_error": float(tree.std(ddof=1)) / math.sqrt(runs),
        "binomial_ratio": float(binomial.mean()),
    }


def swap_point(spread: float, *, seed: int) -> dict[str, Any]:
    """The mean of a pair's swap, by equation 7 and drawn."""
    times = swap_times(np.random.default_rng([seed, round(100 * spread)]), spread, PAIRS)
    error = float(times.std(ddof=1)) / math.sqrt(PAIRS)
    return {"spread": spread, "equation": swap_mean(spread), "drawn": float(times.mean()), "standard_error": error}


# ---- figure 5B: waiting ----------------------------------------------------------------------------------------------


def blocking_ratios(nodes: int, inner: int, outer: int, *, runs: int, seed: int) -> F64:
    """Training time with a barrier of all nodes after every `inner` steps, over that with a barrier of random pairs; (runs,).

    Messages take no time. Both have the same step times. Training ends when the last node has done its `outer` rounds.
    """

    def total_s(group_size: int | None) -> F64:
        rng, exchange = np.random.default_rng([seed, nodes, inner, outer]), Exchange(every=inner, group_size=group_size)
        links = LinkModel.uniform(nodes)
        return simulate(links, exchange, steps=inner * outer, step=STEP, runs=runs, seed=seed, rng=rng).total_s

    return total_s(None) / total_s(2)


def blocking_point(nodes: int, inner: int, outer: int, *, replicas: int, seed: int) -> dict[str, Any]:
    """A point of figure 5B, over as many runs as `replicas` nodes are enough for."""
    runs = max(1, replicas // nodes)
    ratios = blocking_ratios(nodes, inner, outer, runs=runs, seed=seed)
    return {"nodes": nodes, "inner_steps": inner, "outer_steps": outer, "runs": runs, "ratio": float(ratios.mean())}


# ---- both ------------------------------------------------------------------------------------------------------------


def settings(*, quick: bool, seed: int) -> dict[str, Any]:
    """What is simulated; a result that is stored with other settings is simulated again."""
    return {
        "seed": seed,
        "runs": QUICK_RUNS if quick else RUNS,
        "replicas": QUICK_REPLICAS if quick else REPLICAS,
        "nodes": list(NODES[:4] if quick else NODES),
        "spreads": list(SPREADS),
        "inner_steps": list(INNER_STEPS),
        "outer_steps": list(OUTER_STEPS[:1] if quick else OUTER_STEPS),
    }


def points(given: dict[str, Any]) -> Sequence[tuple[str, dict[str, Any]]]:
    """Every point that `settings` asks for, as (part, arguments), in the order in which to simulate them."""
    seed, made = given["seed"], list[tuple[str, dict[str, Any]]]()
    made += [("swap", {"spread": spread, "seed": seed}) for spread in given["spreads"]]
    made += [
        ("message", {"nodes": nodes, "spread": spread, "runs": given["runs"], "seed": seed})
        for nodes in given["nodes"]
        for spread in given["spreads"]
    ]
    made += [
        ("blocking", {"nodes": nodes, "inner": inner, "outer": outer, "replicas": given["replicas"], "seed": seed})
        for outer in given["outer_steps"]
        for nodes in given["nodes"]
        for inner in given["inner_steps"]
    ]
    return made


POINTS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "swap": swap_point,
    "message": message_point,
    "blocking": blocking_point,
}
