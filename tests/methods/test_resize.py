"""What each rank holds of its own: not shown in the optimizer's state, and its mean where a world of another size goes on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from rig import start
from synthetic import Parameters, simulate

from commopt.groups import Group, SimWorld

SHAPES: list[tuple[int, ...]] = [(40, 40), (7,)]


@pytest.mark.parametrize(
    ("name", "key", "options"),
    [
        ("signum", "momentum", {}),
        ("distributed_lion", "momentum", {}),
        ("demo", "momentum", {}),
        ("powersgd", "residual", {}),
        ("ef21", "average", {}),
        ("ef21", "known", {"eta": 0.5}),  # so that h stays the mean of all h_i
        ("ef21", "known", {"eta": 0.5, "server": "sign"}),
        ("dice_sgd", "error", {}),
    ],
)
def test_another_number_of_ranks_takes_the_mean_of_what_each_had(name: str, key: str, options: dict[str, Any]) -> None:
    def left(run: Any) -> Any:
        assert all(key not in entry for entry in run.optimizer.state_dict()["state"].values())
        return copy.deepcopy(run.method.saved())

    def join(group: Group) -> Any:
        method = start(Parameters(*SHAPES), name, group, **options).method
        method.resize(states)
        return method.saved()

    states = [run[-1] for run in simulate(3, SHAPES, 2, name, observe=left, **options)]
    each = torch.stack([state["rank"][key] for state in states])
    assert not torch.equal(each[0], each[1])
    for state in SimWorld[Any](2).run(join):
        torch.testing.assert_close(state["rank"][key], each.mean(0))
        assert all(torch.equal(x, states[0]["shared"][shared]) for shared, x in state["shared"].items())
