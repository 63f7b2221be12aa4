"""Machines with several ranks under DDP, as torchrun numbers them; on the four ranks of the FSDP tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from level_rig import Net, gradient, machine, start, train
from presets import Preset, sgd
from rig import flat
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import commopt
from commopt.groups import SimWorld


@pytest.mark.ranks("fsdp", 4)
@pytest.mark.parametrize("case", [("ef_sign", {}), ("dgc", {"density": 0.1}), ("powersgd", {"rank": 2})])
def test_levels_are_found_as_the_launcher_numbers_machines(case: tuple[str, dict[str, Any]]) -> None:
    preset, net, rank = Preset(*case, sgd(0.05)), Net(), dist.get_rank()
    model = DistributedDataParallel(net, bucket_cap_mb=0.01)
    with machine(rank // 2):
        run = commopt.attach(model, preset.method(), preset.optimizer(net))
    assert (run.group.per_machine, run.rank, run.ranks) == (2, rank, 4)
    for step in range(4):
        run.optimizer.zero_grad()
        model(*(gradient(rank, step, k, p.shape) for k, p in enumerate(net.parameters()))).backward()
        run.optimizer.step()
    assert run.replicas_are_equal()
    run.close()
    alone = SimWorld[Tensor](2).run(
        lambda group: train(start(preset, group), range(4), [2 * group.rank, 2 * group.rank + 1])[0]
    )
    torch.testing.assert_close(flat(net), alone[0], rtol=0, atol=1e-6)


@pytest.mark.ranks("fsdp", 4)
def test_machines_of_different_sizes_and_one_alone_exchange_between_single_ranks() -> None:
    for number in (min(dist.get_rank() // 3, 1), 0):
        net = Net()
        with machine(number):
            run = commopt.attach(net, "dense", torch.optim.SGD(net.parameters(), lr=0.1))
        assert run.group.per_machine == 1
        run.close()
