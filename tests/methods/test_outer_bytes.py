"""The bytes that outer methods send per inner step, against formulas that stand here and nowhere else in the code.

Not counted: what does not grow with the rounds ("start", which makes all replicas equal once), the sketches of 2 KB from which the
spread is estimated, and over TCP the heartbeats.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from members import over_tcp
from test_bytes import entry, gather, ring

from commopt import attach, build
from commopt.groups import SimGroup, SimWorld
from commopt.groups.base import Traffic
from commopt.groups.peers import Peers

ELEMENTS, ELEMENTS_OVER_TCP = 5 * 2**13, 5 * 2**15  # the cost of frames does not grow with the elements
EVERY = 4
LEFT_OUT = ("sketch", "start", "group start", "start roll", "start card", "beat")


def train(
    peers: Peers | SimGroup, name: str, options: dict[str, Any], rounds: int, elements: int = ELEMENTS
) -> tuple[Traffic, Any, int]:
    """Zero gradients: what is sent does not depend on what is learnt."""
    model = torch.nn.Linear(1024, elements // 1024, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method: Any = build(name, **{"every": EVERY, "timeout_s": 60.0, **options})
    run: Any = attach(model, method, optimizer, group=peers)
    run.join()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    noise = torch.Generator().manual_seed(run.peers.rank)
    for step in run.range(rounds * EVERY):
        if step % EVERY == EVERY - 1:
            for p in model.parameters():
                p.data.add_(torch.randn(p.shape, generator=noise), alpha=0.01)
        optimizer.step()
    run.finish()
    return run.peers.traffic, method, run.steps


def per_step(traffic: Traffic, steps: int, elements: int = ELEMENTS) -> float:
    sent = sum(nbytes for (_, operation, _), nbytes in traffic.nbytes.items() if operation not in LEFT_OUT)
    return sent / steps / elements


def mean_per_step(ranks: int, name: str, options: dict[str, Any], rounds: int) -> tuple[float, Any]:
    """Bytes per parameter and step, the mean over ranks; with an odd number of ranks one sends nothing in each round."""
    results = SimWorld[Any](ranks).run(lambda group: train(group, name, options, rounds))
    return sum(per_step(traffic, steps) for traffic, _, steps in results) / ranks, results[0][1]


CODES = {"int8": 1 + 4 / 256, "4bit": 1 / 2 + 4 / 256, "sign": 1 / 8 + 4 / 2048, "top_k": entry(0.05, 2)}
MESSAGES: dict[str, Any] = {"top_k": {"compressor": "top_k", "density": 0.05}}
PAIRS, GRID = "one_peer_exp", "alternating_exp_ring"
SLOW = 4 / 4  # a quarter of the slow weights goes with a compressed message
# bytes per parameter and round, and those of them that are also sent for the round after the last
FORMULAS: list[Any] = [
    *(
        (name, options, ranks, wanted, ahead)
        for ranks in (2, 4)
        for name, options, wanted, ahead in (
            ("noloco", {}, 4, 0),
            ("noloco", {"delay": 2}, 4, 0),
            ("noloco", {"two_tensors": True}, 8, 4),
            ("noloco", {"gamma": 1.0}, 8, 4),
            *(("noloco", {"message": MESSAGES.get(code, code)}, n + SLOW, SLOW) for code, n in CODES.items()),
            ("diloco", {}, ring(4)(ranks), 0),
            ("diloco", {"fragments": 1, "delay": 1}, ring(4)(ranks), 0),
            *(
                ("diloco", {"message": MESSAGES.get(code, code)}, (gather if code == "top_k" else ring)(n)(ranks), 0)
                for code, n in CODES.items()
            ),
            ("local_sgd", {}, ring(4)(ranks), 0),
        )
    ),
    ("noloco", {"group_size": 4}, 8, 3 * 4, 0),
    ("decentralized_adam", {"topology": PAIRS}, 4, 4, 0),
    ("decentralized_adam", {"topology": "ring"}, 6, 4, 0),
    ("decentralized_adam", {"topology": "ring"}, 5, 4 * 4 / 5, 0),
    ("decentralized_adam", {"topology": "complete"}, 5, 16, 0),
    ("decentralized_adam", {"topology": GRID, "slots": 2}, 4, 8, 0),  # 4 within a node and 12 over two, in turn
    ("decentralized_adam", {"topology": "ring", "message": "int8"}, 4, CODES["int8"], 0),
    ("choco", {}, 4, 2 * CODES["4bit"], 0),
    ("choco", {}, 2, CODES["4bit"], 0),
    ("choco", {"message": "sign", "topology": "complete"}, 4, 3 * CODES["sign"], 0),
    ("choco", {"topology": PAIRS}, 8, 3 * CODES["4bit"], 0),
    ("push_sum", {}, 2, 4, 0),
    ("push_sum", {}, 5, 4, 0),
]


@pytest.mark.parametrize(("name", "options", "ranks", "wanted", "ahead"), FORMULAS, ids=str)
def test_a_round_costs_what_the_formula_says(
    name: str, options: dict[str, Any], ranks: int, wanted: float, ahead: float
) -> None:
    rounds = 5 if ranks == 5 else 6  # so that on an odd ring each rank sits out once
    measured, method = mean_per_step(ranks, name, options, rounds)
    assert measured == pytest.approx((wanted + ahead / rounds) / EVERY, rel=0.02)
    assert method.bytes_per_parameter(ranks) == pytest.approx(
        wanted / EVERY, rel=0.02 if "message" in options else 1e-6
    )


@pytest.mark.parametrize(("name", "shared"), [("diloco", 2), ("local_sgd", 1)])
@pytest.mark.parametrize(("participation", "drawn"), [(0.5, 2), (0.75, 3)])
def test_who_is_drawn_after_a_pause_gets_what_the_last_ones_shared(
    name: str, shared: int, participation: float, drawn: int
) -> None:
    """Slow weights, and with DiLoCo the momentum, go to everybody in a round that has others in it than the last one."""
    measured, method = mean_per_step(4, name, {"participation": participation}, rounds=24)
    others = 1 - 1 / math.comb(4, drawn)
    expected = drawn / 4 * 8 * (drawn - 1) / drawn * (1 + others * shared) / EVERY
    assert method.bytes_per_parameter(4) == pytest.approx(expected)
    assert measured == pytest.approx(expected, rel=0.1)  # by how often the same ones were drawn


@pytest.mark.parametrize(
    ("ranks", "name", "options", "expected"),
    [
        (2, "noloco", {}, 4 / EVERY),
        (2, "noloco", {"message": "int8"}, (CODES["int8"] + 6 / 5 * SLOW) / EVERY),
        (4, "diloco", {}, ring(4)(4) / EVERY),
        (4, "diloco", {"message": "4bit"}, ring(CODES["4bit"])(4) / EVERY),
    ],
    ids=str,
)
def test_over_tcp_frames_add_less_than_two_percent(
    ranks: int, name: str, options: dict[str, Any], expected: float
) -> None:
    for traffic, _, steps in over_tcp(ranks, lambda peers: train(peers, name, options, 5, ELEMENTS_OVER_TCP)):
        assert per_step(traffic, steps, ELEMENTS_OVER_TCP) == pytest.approx(expected, rel=0.02)
