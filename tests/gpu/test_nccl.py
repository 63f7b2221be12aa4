"""What NCCL needs, pretended where there is none."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from pretend import DEVICE, working_on
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from commopt import attach
from commopt.errors import AttachError
from commopt.frameworks import ddp
from commopt.groups.staging import Staging
from commopt.groups.torch import device_of

BACKENDS = {  # torch's BackendConfig of a process group: where TorchGroup then has its tensors
    "cuda:nccl": "cuda",  # "nccl", and none on a machine with GPUs
    "cpu:gloo,cuda:nccl": "cuda",
    "cuda:nccl,cpu:gloo": "cuda",
    "cpu:gloo,cuda:gloo": "cpu",
    "cpu:gloo": "cpu",
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_nccl_is_recognised_in_every_form_of_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda _: backend)
    process_group: dist.ProcessGroup = object()  # type: ignore[assignment]
    assert device_of(process_group).type == BACKENDS[backend]


def test_a_buffer_on_the_host_is_used_again() -> None:
    staging = Staging()
    with working_on(DEVICE):
        first = staging.to_host(torch.arange(6.0, device=DEVICE).view(2, 3), "sent")
        assert first.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
        second = staging.to_host(torch.ones(2, dtype=torch.int64, device=DEVICE), "sent")
        assert (second.tolist(), second.data_ptr()) == ([1, 1], first.data_ptr())
        assert staging.empty("received", second).data_ptr() != second.data_ptr()
        assert staging.to_device_(torch.zeros(2, dtype=torch.int64, device=DEVICE), "sent", second).tolist() == [1, 1]


def overlaps(process_group: dist.ProcessGroup, unused: bool, overlap: bool | None) -> str:
    """When a DDP model's exchanges run, or why not, if its process group were NCCL's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddp, "device_of", lambda _: torch.device("cuda"))
        model = DistributedDataParallel(nn.Linear(4, 4), process_group=process_group, find_unused_parameters=unused)
        try:
            run = attach(model, "ef_sign", torch.optim.SGD(model.parameters()), overlap=overlap)
        except AttachError as error:
            return str(error)
        assert isinstance(run, ddp.DDPRun)
        with run:
            return "beside backward" if run._lane else "after backward"


def test_over_nccl_no_two_threads_start_collectives_on_one_gpu(pool: Pool) -> None:
    assert pool.run(2, overlaps, False, None) == ["beside backward"] * 2
    assert pool.run(2, overlaps, True, None) == ["after backward"] * 2
    for said in pool.run(2, overlaps, True, True):
        assert said.startswith("overlap=True with find_unused_parameters=True over NCCL")


def test_batch_norm_over_all_ranks_communicates_in_backward_too() -> None:
    model: Any = types.SimpleNamespace(find_unused_parameters=False, module=nn.Sequential(nn.SyncBatchNorm(4)))
    assert list(ddp._others_in_backward(model)) == ["SyncBatchNorm"]
