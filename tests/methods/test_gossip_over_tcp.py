"""The methods that gossip in every step, over real sockets on this machine: what a simulated mailbox may hide."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from outer_rig import spread
from rig import flat, loss_of, make_batch, make_model
from torch import Tensor

from commopt import attach, build
from commopt.groups.tcp import TcpPeers, local_memberships

RANKS, STEPS = 3, 25


def train(peers: TcpPeers, name: str, options: dict[str, Any], results: dict[int, tuple[Tensor, list[Any]]]) -> None:
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    method: Any = build(name, timeout_s=30.0, **options)
    run: Any = attach(model, method, optimizer, group=peers)
    for step in run.range(STEPS):
        x, y = make_batch(peers.rank, step % 5)
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
    run.finish()
    results[peers.rank] = flat(model), run.reports


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
    peers = [TcpPeers(membership, listener=listener) for membership, listener in local_memberships(RANKS)]
    results: dict[int, tuple[Tensor, list[Any]]] = {}
    threads = [threading.Thread(target=train, args=(one, name, options, results)) for one in peers]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120.0)
    finally:
        for one in peers:
            one.close()
    assert len(results) == RANKS
    for _, reports in results.values():
        assert len(reports) == STEPS
        assert not any(report.missed for report in reports)
    assert spread([x for x, _ in results.values()]) < 0.1
