"""Methods between the replicas of an FSDP2 model, on four ranks as two replicas of two shards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsdp_rig import TwoReplicas, attached, cut, mesh_of, sgd, shards, train, train_alone
from pool import Pool

STEPS = 5
CASES: dict[str, dict[str, Any]] = {
    "ef_sign": {"name": "ef_sign", "block_size": 64},
    "two_way": {"name": "two_way(int8)"},
    "8-bit residuals": {"name": "two_way(4bit)", "residual_bits": 8},
    "dgc": {"name": "dgc", "density": 0.1, "warmup_steps": 2},
    "top_k": {"name": "top_k", "density": 0.1},
    "qsgd": {"name": "qsgd"},
    "powersgd": {"name": "powersgd", "rank": 2},
    "fp16": {"name": "fp16"},
}


def train_sharded(_: dist.ProcessGroup, method: dict[str, Any], momentum: float) -> Any:
    mesh = mesh_of()
    if dist.get_rank() > 3:
        return None
    with attached(mesh, method, lambda model: sgd(model, momentum)) as (model, optimizer, attachment):
        train(model, optimizer, dist.get_rank(), STEPS)
        assert attachment.replicas_are_equal()
        return shards(model)


@pytest.mark.parametrize("case", CASES)
def test_a_method_between_replicas_is_the_method_on_each_shard(pool: Pool, case: str) -> None:
    momentum = 0.0 if case == "dgc" else 0.9
    expected = train_alone(TwoReplicas(CASES[case]).mean, STEPS, momentum)
    for rank, found in enumerate(pool.run(5, train_sharded, CASES[case], momentum)[:4]):
        for name, p in expected.named_parameters():
            assert torch.equal(found[name], cut(p.detach(), 2, rank % 2)), f"{name} on rank {rank}"
