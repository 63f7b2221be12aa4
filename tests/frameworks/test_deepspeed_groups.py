"""Parameter groups that stay out of 1-bit Adam's freeze."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rig import flat, loss_of, make_batch, make_model
from torch import Tensor

from commopt import attach
from commopt.errors import ConfigError
from commopt.frameworks.deepspeed_config import LEGACY, parameter_groups, read_legacy
from commopt.frameworks.deepspeed_groups import PartlyFrozenAdam
from commopt.groups import Group, SimWorld
from commopt.methods import OnebitAdam


def run(group: Group, live: int, nan_at: int = -1, method: Any = PartlyFrozenAdam) -> tuple[Tensor, list[Tensor]]:
    """Six steps with the first `live` parameters out of the freeze: all parameters, and each one's variance."""
    model = make_model()
    named = list(model.named_parameters())
    params = [p for _, p in named]
    groups: list[dict[str, Any]] = [{"params": params[:live], "non_freeze": True}, {"params": params[live:]}]
    adam = torch.optim.Adam([g for g in groups if g["params"]], lr=0.01)
    attached = attach(model, method(freeze_step=3 if method is PartlyFrozenAdam else 100), adam, group=group)
    for step in range(6):
        x, y = make_batch(group.rank, step)
        attached.optimizer.zero_grad()
        loss_of(model(x), y).backward()
        if step == nan_at and group.rank == 1:
            assert params[0].grad is not None
            params[0].grad[0] = torch.nan
        attached.optimizer.step()
    return flat(model), [attached.method.part("variance", name).clone() for name, _ in named]


def on_two_ranks(live: int, **options: Any) -> list[tuple[Tensor, list[Tensor]]]:
    return SimWorld[tuple[Tensor, list[Tensor]]](2).run(lambda group: run(group, live, **options))


def test_groups_out_of_the_freeze_go_on_as_adam() -> None:
    assert torch.equal(on_two_ranks(6)[0][0], on_two_ranks(0, method=OnebitAdam)[0][0])


def test_only_their_variance_adapts_after_the_freeze_and_replicas_stay_equal() -> None:
    short, other = on_two_ranks(2)
    (_, frozen), _ = on_two_ranks(0)
    assert torch.equal(short[0], other[0])
    same = [torch.equal(a, b) for a, b in zip(short[1], frozen, strict=True)]
    assert same == [False, False, True, True, True, True]


def test_a_nan_in_one_of_them_leaves_the_bucket_out_everywhere() -> None:
    first, second = on_two_ranks(2, nan_at=4)
    assert torch.equal(first[0], second[0])
    assert first[0].isfinite().all()


def test_other_methods_have_no_such_groups() -> None:
    model = make_model()
    groups = [{"params": list(model.parameters()), "non_freeze": True}]
    onebit, zero_one = (read_legacy(LEGACY[name], {}).method for name in ("onebitadam", "zerooneadam"))
    assert parameter_groups(model, groups, onebit)[0][0]["non_freeze"] is True
    with pytest.raises(ConfigError, match="only OneBitAdam has it"):
        parameter_groups(model, groups, zero_one)
