"""Signs move no coordinate far whose variance has died before the freeze: the second moment of a ReLU's dead unit, say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rig import start
from torch import Tensor

from commopt.groups import Group, SimWorld

LR, STEPS = 0.01, 12
METHODS: dict[str, dict[str, Any]] = {
    "onebit_adam": {"freeze_step": 4},
    "onebit_lamb": {
        "freeze_step": 4,
        "bias_correction": True,
        "max_coeff": 1.0,
        "min_coeff": 1.0,
        "factor_max": 1.0,
        "factor_min": 1.0,
    },
    "zero_one_adam": {"var_freeze_step": 4, "var_update_scaler": 1},
}


def moves(name: str, ranks: int = 3, **options: Any) -> Tensor:
    """(steps, 64) how far each coordinate moved in each step after the freeze. The first one's gradients are 1e-9, the others' about 1."""

    def work(group: Group) -> Tensor:
        model = torch.nn.Linear(64, 1, bias=False)
        torch.nn.init.ones_(model.weight)
        run = start(model, name, group, lr=LR, eps=1e-12, **METHODS[name], **options)
        noise = torch.Generator().manual_seed(group.rank)
        places = [model.weight.detach().clone()]
        for _ in range(STEPS):
            model.weight.grad = 0.5 + torch.randn(1, 64, generator=noise)
            model.weight.grad[0, 0] *= 1e-9
            run.optimizer.step()
            places.append(model.weight.detach().clone())
        return torch.stack(places).diff(dim=0)[4:, 0].abs()

    return SimWorld[Tensor](ranks).run(work)[0]


@pytest.mark.parametrize("name", METHODS)
def test_a_coordinate_whose_variance_has_died_moves_no_farther_than_the_bound(name: str) -> None:
    largest = 1.0 / (1 - 0.9**5)  # of the rate, by the bias correction of the first step after the freeze
    bounded = moves(name)
    assert float(bounded[:, 0].max()) <= 3 * LR * largest * 1.001
    assert float(bounded[:, 0].max()) > LR  # it does move
    assert float(moves(name, max_ratio=0.5).max()) <= 0.5 * LR * largest * 1.001
    assert float(moves(name, max_ratio=None)[:, 0].max()) > 1e5 * LR  # what signs would do without it


@pytest.mark.parametrize("name", METHODS)
def test_the_bound_leaves_ordinary_coordinates_alone(name: str) -> None:
    torch.testing.assert_close(moves(name)[:2, 1:], moves(name, max_ratio=None)[:2, 1:])
