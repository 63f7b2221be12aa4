"""Every method over Gloo, in small buckets: replicas stay equal, bit for bit."""

from __future__ import annotations

import hashlib

import pytest
import torch.distributed as dist
from pool import Pool, twin_of
from presets import PRESETS, Preset
from rig import flat, make_model, train_step
from torch.nn.parallel import DistributedDataParallel

from commopt import attach
from commopt.groups import TorchGroup
from commopt.method import EveryStep

STEPS, EVERY, BATCHES = 16, 8, 4


def train(process_group: dist.ProcessGroup, preset: Preset) -> tuple[list[str | None], float, float]:
    """Parameters' hashes every 8 steps (None where local steps have let ranks drift apart), and the first and last losses."""
    model = DistributedDataParallel(make_model(), process_group=process_group, bucket_cap_mb=0.003)
    group = TorchGroup(twin_of(process_group))
    run = attach(model, preset.method(), preset.optimizer(model.module), group=group)
    method = run.method
    assert isinstance(method, EveryStep)
    hashes: list[str | None] = []
    losses = []
    for step in range(STEPS):
        losses.append(train_step(model, run.optimizer, group.rank, step % 8))
        if (step + 1) % EVERY == 0:
            digest = hashlib.sha256(flat(model).numpy().tobytes()).hexdigest()
            hashes.append(digest if method.is_synchronised else None)
    run.close()
    assert not run.voided
    return hashes, sum(losses[:BATCHES]), sum(losses[-BATCHES:])


@pytest.mark.parametrize("preset", PRESETS, ids=str)
def test_replicas_stay_equal_over_16_steps(pool: Pool, preset: Preset) -> None:
    ranks = pool.run(3, train, preset)
    first, *others = [hashes for hashes, _, _ in ranks]
    assert all(hashes == first for hashes in others)
    seen = [one for one in first if one is not None]
    assert len(seen) == len(set(seen)) >= 1  # and they moved on
    assert sum(end for _, _, end in ranks) < sum(start for _, start, _ in ranks)
