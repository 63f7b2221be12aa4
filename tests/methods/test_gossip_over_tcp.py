"""Methods that gossip in every step, over real sockets on this machine, which may show what a simulated mailbox hides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from outer_rig import over_tcp, spread
from rig import flat, make_model, train_step
from torch import Tensor

from commopt import attach, build
from commopt.groups.tcp import TcpPeers

RANKS, STEPS = 3, 25


def train(peers: TcpPeers, name: str, options: dict[str, Any]) -> tuple[Tensor, list[Any]]:
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    method: Any = build(name, timeout_s=30.0, **options)
    run: Any = attach(model, method, optimizer, group=peers)
    for step in run.range(STEPS):
        train_step(model, optimizer, peers.rank, step % 5)
    run.finish()
    return flat(model), run.reports


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("decentralized_adam", {"topology": "ring"}),
        ("decentralized_adam", {"topology": "complete", "message": "int8"}),
        ("choco", {}),
        ("choco", {"delay": 1, "message": {"compressor": "top_k", "density": 0.1}}),
        ("push_sum", {}),
        ("push_sum", {"delay": 1}),
    ],
    ids=str,
)
def test_every_round_is_complete_and_replicas_stay_together(name: str, options: dict[str, Any]) -> None:
    results = over_tcp(RANKS, lambda peers: train(peers, name, options))
    for _, reports in results:
        assert len(reports) == STEPS
        assert not any(report.missed for report in reports)
    assert spread([x for x, _ in results]) < 0.1
