"""What every transport promises, as one table over transports and numbers of ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import mpi_pool
import pytest
import torch
import torch.distributed as dist
from exchanges import content, every_operation, expected, message
from pool import Pool
from rig import normal
from transports import RANKS, Run, on_mpi, over_simulated_peers, over_tcp_peers

from commopt.groups import Group, PacedGroup, PeerGroup, SimWorld, TorchGroup
from commopt.groups.peers import Peers
from commopt.plan.links import LinkModel, schedule
from commopt.wire.payload import Payload

COLLECTIVE = ["simulated", "gloo", "mpi"]
# some tests leave peers out, whose groups count bytes as they are sent
on_every_transport = pytest.mark.parametrize("run", [*COLLECTIVE, "simulated peers", "tcp peers"], indirect=True)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64]


def on_gloo(process_group: dist.ProcessGroup, function: Callable[..., Any], *args: Any) -> Any:
    return function(TorchGroup(process_group), *args)


def on_peers(peers: Peers, function: Callable[..., Any], *args: Any) -> Any:
    return function(PeerGroup(peers, range(peers.size), "test", 0, 20.0), *args)


@pytest.fixture(params=COLLECTIVE)
def run(request: pytest.FixtureRequest) -> Run:
    """run(n, function, *args): function(group, *args) on n ranks of one transport."""
    if request.param == "simulated":
        return lambda n, function, *args: SimWorld[Any](n, timeout_s=30).run(lambda group: function(group, *args))
    if request.param == "mpi":
        ranks = mpi_pool.shared()
        return lambda n, function, *args: ranks.run(n, on_mpi, function, *args)
    if request.param == "gloo":
        pool: Pool = request.getfixturevalue("pool")
        return lambda n, function, *args: pool.run(n, on_gloo, function, *args)
    over = over_tcp_peers if request.param == "tcp peers" else over_simulated_peers
    return lambda n, function, *args: over(n, on_peers, function, *args)


def summands(rank: int) -> list[torch.Tensor]:
    """None, one, some and many elements of each dtype: up to 1 KB a group of peers gathers, beyond it scatters."""
    return [normal(elements, rank).mul(10).to(dtype) for dtype in DTYPES for elements in (0, 1, 5, 1001)]


def all_reduce(group: Group) -> list[torch.Tensor]:
    sums = summands(group.rank)
    for x in sums:
        group.all_reduce(x)
    return sums


@on_every_transport
@pytest.mark.parametrize("n", RANKS)
def test_all_reduce_gives_every_rank_the_same_sum(run: Run, n: int) -> None:
    parts = [summands(rank) for rank in range(n)]
    for sums, *terms in zip(zip(*run(n, all_reduce), strict=True), *parts, strict=True):
        assert all(torch.equal(sums[0], other) for other in sums)
        eps = torch.finfo(sums[0].dtype).eps if sums[0].is_floating_point() else 0.0
        exact = torch.stack(terms).double().sum(0)
        torch.testing.assert_close(sums[0].double(), exact, rtol=0, atol=40 * n * n * eps)


@on_every_transport
@pytest.mark.parametrize("n", RANKS)
def test_every_rank_receives_what_each_gave(run: Run, n: int) -> None:
    assert run(n, every_operation) == [expected(rank, n) for rank in range(n)]


def large(rank: int, peer: int) -> torch.Tensor:
    """From one rank to another: none, some bytes, or more than one rank lets several send to it at once."""
    return torch.full(((0, 7, 100_001)[peer % 3],), 10 * rank + peer, dtype=torch.uint8)


def large_messages(group: Group) -> list[torch.Tensor]:
    rank, n = group.rank, group.size
    calls = [
        group.all_to_all([Payload.of(large(rank, peer)) for peer in range(n)]),
        group.all_gather_ragged(Payload.of(large(rank, rank))),
        group.all_gather(Payload.of(large(rank, 2))),
    ]
    return [payload.tensors[0] for every in calls for payload in every]


@on_every_transport
@pytest.mark.parametrize("n", RANKS)
def test_large_messages_arrive_beside_empty_and_small_ones(run: Run, n: int) -> None:
    for rank, received in enumerate(run(n, large_messages)):
        sent = [large(peer, rank) for peer in range(n)] + [large(peer, peer) for peer in range(n)]
        sent += [large(peer, 2) for peer in range(n)]
        assert all(torch.equal(one, other) for one, other in zip(received, sent, strict=True))


def everything(group: Group) -> dict[str, Any]:
    traffic = group.traffic
    traffic.method, traffic.bucket = "m", "b"
    group.tell("outside the count")
    group.all_reduce(torch.zeros(7))
    group.all_gather(message(group.rank, 2, 3))
    group.all_gather_ragged(message(group.rank, group.rank, 0))
    group.all_to_all([message(0, peer, 0) for peer in range(group.size)])
    group.broadcast(torch.zeros(5), src=group.size - 1)
    return {**traffic.as_dict(), "is spread": group.is_spread}


@pytest.mark.parametrize("n", RANKS)
def test_traffic_is_counted_by_the_schedule_of_each_collective(run: Run, n: int) -> None:
    for rank, counted in enumerate(run(n, everything)):

        def sent(operation: str, nbytes: int, root: int = 0, rank: int = rank) -> float:
            return sum(schedule(operation, nbytes, rank, n, root=root).values())

        # each rank's own, or those of the largest in whole words
        lengths, own = 2 * 8, 4 * rank if counted["is spread"] else -(-4 * (n - 1) // 8) * 8
        by_operation = {
            "all_reduce": sent("all_reduce", 28),
            "all_gather": sent("all_gather", 12) + sent("all_gather", lengths) + sent("all_gather", own),
            "all_to_all": float(sum(4 * peer for peer in range(n) if peer != rank)),
            "broadcast": sent("broadcast", 20, root=n - 1),
        }
        assert {row["operation"]: row["bytes"] for row in counted["by_operation"]} == pytest.approx(by_operation)
        assert {(row["method"], row["bucket"]) for row in counted["by_operation"]} == {("m", "b")}
        assert counted["payload_bytes"] == pytest.approx(sum(counted["by_peer"].values()))
        assert counted["payload_bytes"] == pytest.approx(sum(by_operation.values()))


def paced(group: Group) -> tuple[list[tuple[str, float, float]], torch.Tensor, list[Any]]:
    """(operation, seconds by the model, seconds taken) of each; and what came of two of them."""
    links, x, own = (
        LinkModel.uniform(group.size, "8mbit", "2ms"),
        normal(2000, group.rank),
        message(group.rank, 2000, 0),
    )
    slow, ring = PacedGroup(group, links), links.collective_seconds
    calls: dict[str, tuple[float, Callable[[], Any]]] = {
        "all_reduce": (ring("all_reduce", 8000), lambda: slow.all_reduce(x)),
        "all_gather": (ring("all_gather", 8000), lambda: slow.all_gather(own)),
        "broadcast": (ring("broadcast", 8000), lambda: slow.broadcast(torch.zeros(2000))),
        "all_to_all": (links.seconds([{1: 8000.0}, {0: 8000.0}]), lambda: slow.all_to_all([own] * group.size)),
    }
    taken = []
    for name, (seconds, call) in calls.items():
        start = time.perf_counter()
        call()
        taken.append((name, seconds, time.perf_counter() - start))
    assert slow.traffic is group.traffic
    return taken, x, [content(one) for one in slow.all_gather_ragged(message(group.rank, group.rank, 0))]


def test_a_paced_group_takes_at_least_the_seconds_of_its_model_and_returns_the_same(run: Run) -> None:
    for taken, x, gathered in run(2, paced):
        for name, modelled_s, taken_s in taken:
            assert 0.009 < modelled_s <= taken_s, name
        torch.testing.assert_close(x, normal(2000, 0) + normal(2000, 1))
        assert gathered == [content(message(rank, rank, 0)) for rank in range(2)]


def test_a_paced_group_refuses_a_model_of_another_size() -> None:
    with pytest.raises(ValueError, match="describes 3 ranks, the group has 1"):
        SimWorld[Any](1).run(lambda group: PacedGroup(group, LinkModel.uniform(3)))
