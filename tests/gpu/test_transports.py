"""Groups and integrations with tensors on a GPU: NCCL with one rank, for two cannot share a GPU, and Gloo with two."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from exchanges import every_operation, expected
from pool import Pool
from pretend import DEVICE, PLACES, working_on
from rig import flat, loss_of, make_batch, make_method, make_model
from torch.nn.parallel import DistributedDataParallel

from commopt import attach
from commopt.frameworks.lane import Lane
from commopt.groups import TorchGroup

pytestmark = pytest.mark.parametrize("place", PLACES)


@pytest.fixture
def alone(place: torch.device) -> Iterator[torch.device]:
    """One rank in a process group of NCCL, or of Gloo where there is no GPU."""
    is_gpu = place.type == "cuda"
    device = torch.device("cuda", 0) if is_gpu else place
    options: dict[str, Any] = {"device_id": device} if is_gpu else {}
    backend, store = "nccl" if is_gpu else "gloo", dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timedelta(seconds=60), **options)
    yield device
    dist.destroy_process_group()


def test_one_rank_over_nccl_exchanges_with_itself(alone: torch.device, place: torch.device) -> None:
    assert every_operation(TorchGroup.like(), alone) == expected(0, 1)


def on_gloo(process_group: dist.ProcessGroup, device: str) -> dict[str, Any]:
    with working_on(torch.device(device)):
        return every_operation(TorchGroup(process_group), torch.device(device))


def test_two_ranks_over_gloo_exchange_what_is_on_the_device(pool: Pool, place: torch.device) -> None:
    for device in (place, DEVICE):
        assert pool.run(2, on_gloo, device.type) == [expected(rank, 2) for rank in range(2)]


@pytest.mark.parametrize("overlap", [True, False], ids=["beside backward", "after backward"])
@pytest.mark.parametrize("case", ["ef_sign l1", "onebit_adam l1", "dgc"])
def test_a_ddp_model_trains_as_on_the_cpu(alone: torch.device, place: torch.device, case: str, overlap: bool) -> None:
    results = []
    for device in (alone, torch.device("cpu")):
        process_group = dist.new_group(backend="gloo" if device.type == "cpu" else None)
        inner = make_model().to(device)
        model = DistributedDataParallel(inner, process_group=process_group, bucket_cap_mb=0.002)
        method, given = make_method(case, inner)
        run = attach(model, method, given, overlap=overlap)
        optimizer = run.optimizer
        for step in range(8):
            x, y = (t.to(device) for t in make_batch(0, step))
            loss = loss_of(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert run.replicas_are_equal()
        run.close()
        results.append(flat(inner).cpu())
    assert float(((results[0] - results[1]).abs() > 1e-4).float().mean()) < 0.02


def test_a_lane_waits_for_what_the_stream_before_it_computes_and_is_waited_for(place: torch.device) -> None:
    lane = Lane(torch.device("cuda", 0) if place.type == "cuda" else place)
    x = torch.zeros(1 << 20, device=lane.device)
    for k in range(5):
        if place.type == "cuda":
            torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]  # cycles: x is filled long after this line
        x.fill_(float(k))
        doubled = lane.submit(lambda: x * 2).wait()
        x.zero_()  # ordered after the lane's read, which `wait` has put into this stream
        assert float(doubled.sum()) == 2.0 * k * len(x)
    lane.close()
