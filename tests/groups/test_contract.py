"""What every transport promises, as one table over transports and numbers of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpi_pool
import pytest
import torch
import torch.distributed as dist
from pool import Pool

from commopt.groups import Group, PacedGroup, SimWorld, TorchGroup
from commopt.plan.links import LinkModel, schedule
from commopt.wire.payload import Layout, Payload

RANKS = (1, 2, 3, 5)
Run = Callable[..., list[Any]]


def on_gloo(process_group: dist.ProcessGroup, function: Callable[..., Any], *args: Any) -> Any:
    return function(TorchGroup(process_group), *args)


def on_mpi(communicator: Any, function: Callable[..., Any], *args: Any) -> Any:
    from commopt.groups import MPIGroup

    group = MPIGroup(communicator, timeout_s=60)
    result = function(group, *args)
    group.close()
    return result


@pytest.fixture(params=["simulated", "gloo", "mpi"])
def run(request: pytest.FixtureRequest) -> Run:
    """run(n, function, *args): function(group, *args) on n ranks of one transport."""
    if request.param == "simulated":
        return lambda n, function, *args: SimWorld[Any](n, timeout_s=30).run(lambda group: function(group, *args))
    if request.param == "mpi":
        ranks = mpi_pool.shared()
        return lambda n, function, *args: ranks.run(n, on_mpi, function, *args)
    pool: Pool = request.getfixturevalue("pool")
    return lambda n, function, *args: pool.run(n, on_gloo, function, *args)


def values(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def message(rank: int, n_floats: int, n_bytes: int) -> Payload:
    return Payload.of(torch.full((n_floats,), rank + 0.5), torch.full((n_bytes,), rank, dtype=torch.uint8))


def content(payload: Payload) -> list[list[float]]:
    return [x.tolist() for x in payload.tensors]


def all_reduce(group: Group, dtype: torch.dtype) -> torch.Tensor:
    x = values(group.rank, 1001).to(dtype)
    group.all_reduce(x)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("n", RANKS)
def test_all_reduce_gives_every_rank_the_same_sum(run: Run, n: int, dtype: torch.dtype) -> None:
    sums = run(n, all_reduce, dtype)
    exact = sum(values(rank, 1001).to(dtype).double() for rank in range(n))
    assert all(torch.equal(sums[0], other) for other in sums)
    tolerance = 0.0 if dtype == torch.int32 else n * n * torch.finfo(dtype).eps
    torch.testing.assert_close(sums[0].double(), exact, rtol=0, atol=4 * tolerance)


def all_gather(group: Group) -> list[list[list[float]]]:
    return [content(one) for one in group.all_gather(message(group.rank, 3, 5))]


@pytest.mark.parametrize("n", RANKS)
def test_all_gather_returns_every_payload_by_rank(run: Run, n: int) -> None:
    expected = [content(message(rank, 3, 5)) for rank in range(n)]
    assert run(n, all_gather) == [expected] * n


def all_gather_by_layout(group: Group, shift: int) -> list[list[list[float]]]:
    sizes = [(rank + shift, 3 * rank) for rank in range(group.size)]
    layouts: list[Layout] = [((torch.float32, floats), (torch.uint8, extra)) for floats, extra in sizes]
    return [content(one) for one in group.all_gather(message(group.rank, *sizes[group.rank]), layouts)]


@pytest.mark.parametrize("shift", [0, 2], ids=["rank 0 sends nothing", "all send"])
@pytest.mark.parametrize("n", RANKS)
def test_all_gather_takes_a_layout_for_each_rank(run: Run, n: int, shift: int) -> None:
    expected = [content(message(rank, rank + shift, 3 * rank)) for rank in range(n)]
    assert run(n, all_gather_by_layout, shift) == [expected] * n


def all_gather_of_equal_size(group: Group) -> list[list[list[float]]]:
    layouts: list[Layout] = [
        ((torch.float32, 1 + rank % 2), (torch.uint8, 4 * (1 - rank % 2))) for rank in range(group.size)
    ]
    own = message(group.rank, 1 + group.rank % 2, 4 * (1 - group.rank % 2))
    return [content(one) for one in group.all_gather(own, layouts)]


@pytest.mark.parametrize("n", RANKS)
def test_all_gather_tells_layouts_of_the_same_size_apart(run: Run, n: int) -> None:
    expected = [content(message(rank, 1 + rank % 2, 4 * (1 - rank % 2))) for rank in range(n)]
    assert run(n, all_gather_of_equal_size) == [expected] * n


def all_gather_ragged(group: Group, empty: bool) -> list[list[list[float]]]:
    count = 0 if empty else 2 * group.rank
    return [content(one) for one in group.all_gather_ragged(message(group.rank, count, count))]


@pytest.mark.parametrize("empty", [False, True], ids=["some", "all empty"])
@pytest.mark.parametrize("n", RANKS)
def test_ragged_all_gather_needs_no_layouts(run: Run, n: int, empty: bool) -> None:
    counts = [0 if empty else 2 * rank for rank in range(n)]
    expected = [content(message(rank, count, count)) for rank, count in enumerate(counts)]
    assert run(n, all_gather_ragged, empty) == [expected] * n


def all_to_all(group: Group) -> list[list[list[float]]]:
    received = group.all_to_all([message(10 * group.rank + peer, peer, 2 * peer) for peer in range(group.size)])
    return [content(one) for one in received]


@pytest.mark.parametrize("n", RANKS)
def test_all_to_all_delivers_parts_of_any_size(run: Run, n: int) -> None:
    for rank, received in enumerate(run(n, all_to_all)):
        assert received == [content(message(10 * sender + rank, rank, 2 * rank)) for sender in range(n)]


def broadcast(group: Group) -> list[list[float]]:
    received = []
    for root in range(group.size):
        x = torch.full((3,), float(group.rank))
        group.broadcast(x, src=root)
        received.append(x.tolist())
    return received


@pytest.mark.parametrize("n", RANKS)
def test_broadcast_spreads_the_values_of_any_root(run: Run, n: int) -> None:
    assert run(n, broadcast) == [[[float(root)] * 3 for root in range(n)]] * n


def barrier(group: Group) -> bool:
    group.barrier()
    return True


@pytest.mark.parametrize("n", RANKS)
def test_barrier_returns_on_all_ranks(run: Run, n: int) -> None:
    assert run(n, barrier) == [True] * n


def tell(group: Group) -> tuple[list[str], list[str], float]:
    first = group.tell(f"räng {group.rank}" * group.rank)
    return first, group.tell("again"), group.traffic.payload_bytes


@pytest.mark.parametrize("n", RANKS)
def test_what_ranks_tell_each_other_arrives_whole_and_is_not_counted(run: Run, n: int) -> None:
    assert run(n, tell) == [([f"räng {rank}" * rank for rank in range(n)], ["again"] * n, 0.0)] * n


def everything(group: Group) -> dict[str, Any]:
    traffic = group.traffic
    traffic.method, traffic.bucket = "m", "b"
    group.all_reduce(torch.zeros(7))
    group.all_gather(message(group.rank, 2, 3))
    group.all_gather_ragged(message(group.rank, group.rank, 0))
    group.all_to_all([message(0, peer, 0) for peer in range(group.size)])
    group.broadcast(torch.zeros(5), src=group.size - 1)
    return traffic.as_dict()


@pytest.mark.parametrize("n", RANKS)
def test_traffic_is_counted_by_the_schedule_of_each_collective(run: Run, n: int) -> None:
    for rank, counted in enumerate(run(n, everything)):

        def sent(operation: str, nbytes: int, root: int = 0, rank: int = rank) -> float:
            return sum(schedule(operation, nbytes, rank, n, root=root).values())

        lengths, own = 2 * 8, 4 * rank
        expected = {
            "all_reduce": sent("all_reduce", 28),
            "all_gather": sent("all_gather", 12) + sent("all_gather", lengths) + sent("all_gather", own),
            "all_to_all": float(sum(4 * peer for peer in range(n) if peer != rank)),
            "broadcast": sent("broadcast", 20, root=n - 1),
        }
        assert {row["operation"]: row["bytes"] for row in counted["by_operation"]} == pytest.approx(expected)
        assert {(row["method"], row["bucket"]) for row in counted["by_operation"]} == {("m", "b")}
        assert counted["payload_bytes"] == pytest.approx(sum(counted["by_peer"].values()))
        assert counted["payload_bytes"] == pytest.approx(sum(expected.values()))


def paced_seconds(group: Group) -> list[tuple[str, float, float]]:
    """(operation, seconds by the model, seconds taken)"""
    import time

    links = LinkModel.uniform(group.size, "8mbit", "2ms")
    paced = PacedGroup(group, links)
    ring = links.collective_seconds
    calls: dict[str, tuple[float, Callable[[], Any]]] = {
        "all_reduce": (ring("all_reduce", 8000), lambda: paced.all_reduce(torch.zeros(2000))),
        "all_gather": (ring("all_gather", 8000), lambda: paced.all_gather(message(0, 2000, 0))),
        "broadcast": (ring("broadcast", 8000), lambda: paced.broadcast(torch.zeros(2000))),
        "all_to_all": (
            links.seconds([{j: 8000.0 for j in range(group.size) if j != i} for i in range(group.size)]),
            lambda: paced.all_to_all([message(0, 2000, 0)] * group.size),
        ),
    }
    taken = []
    for name, (seconds, call) in calls.items():
        start = time.perf_counter()
        call()
        taken.append((name, seconds, time.perf_counter() - start))
    assert paced.traffic is group.traffic
    return taken


def test_a_paced_group_takes_at_least_the_seconds_of_its_model(run: Run) -> None:
    for name, modelled_s, taken_s in [row for rank in run(2, paced_seconds) for row in rank]:
        assert 0.009 < modelled_s <= taken_s, name


def reduce_paced(group: Group) -> tuple[torch.Tensor, list[Any]]:
    paced = PacedGroup(group, LinkModel.uniform(group.size, "1gbit"))
    x = values(group.rank, 10)
    paced.all_reduce(x)
    return x, [content(one) for one in paced.all_gather_ragged(message(group.rank, group.rank, 0))]


def test_a_paced_group_returns_what_the_group_inside_returns(run: Run) -> None:
    for x, gathered in run(3, reduce_paced):
        torch.testing.assert_close(x, values(0, 10) + values(1, 10) + values(2, 10))
        assert gathered == [content(message(rank, rank, 0)) for rank in range(3)]


def test_a_paced_group_refuses_a_model_of_another_size() -> None:
    with pytest.raises(ValueError, match="describes 3 ranks, the group has 1"):
        SimWorld[Any](1).run(lambda group: PacedGroup(group, LinkModel.uniform(3)))
