"""Methods that freeze the variance: when they freeze it, and what signs must not move afterwards."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from allocations import Allocations
from rig import start
from synthetic import flat, parameters, simulate
from torch import Tensor

from commopt.errors import AttachError
from commopt.groups import Group, SimWorld
from commopt.optim import frozen

LR, STEPS = 0.01, 12
BOUNDS = ("max_coeff", "min_coeff", "factor_max", "factor_min")
METHODS: dict[str, dict[str, Any]] = {
    "onebit_adam": {"freeze_step": 4},
    "onebit_lamb": {"freeze_step": 4, "bias_correction": True, **dict.fromkeys(BOUNDS, 1.0)},
    "zero_one_adam": {"var_freeze_step": 4, "var_update_scaler": 1},
}


def moves(name: str, ranks: int = 3, huge: float = 1.0, **options: Any) -> Tensor:
    """(steps, 64) how far each coordinate moved per step after the freeze; gradients are 1e-9 for the first, else about 1.

    huge: by how much the second one's second gradient is larger.
    """

    def work(group: Group) -> Tensor:
        model = torch.nn.Linear(64, 1, bias=False)
        torch.nn.init.ones_(model.weight)
        run = start(model, name, group, lr=LR, eps=1e-12, **METHODS[name], **options)
        noise = torch.Generator().manual_seed(group.rank)
        places = [model.weight.detach().clone()]
        for step in range(STEPS):
            model.weight.grad = 0.5 + torch.randn(1, 64, generator=noise)
            model.weight.grad[0, 0] *= 1e-9
            model.weight.grad[0, 1] *= huge if step == 1 else 1.0
            run.optimizer.step()
            places.append(model.weight.detach().clone())
        return torch.stack(places).diff(dim=0)[4:, 0].abs()

    return SimWorld[Tensor](ranks).run(work)[0]


@pytest.mark.parametrize("name", METHODS)
def test_a_coordinate_whose_variance_has_died_moves_no_farther_than_the_bound(name: str) -> None:
    largest = 1.0 / (1 - 0.9**5)  # of the rate, by the bias correction of the first step after the freeze
    bounded, free = moves(name), moves(name, max_ratio=None)
    assert float(bounded[:, 0].max()) <= 3 * LR * largest * 1.001
    assert float(bounded[:, 0].max()) > LR  # it does move
    assert float(moves(name, max_ratio=0.5).max()) <= 0.5 * LR * largest * 1.001
    assert float(free[:, 0].max()) > 1e5 * LR  # what signs would do without it
    torch.testing.assert_close(bounded[:2, 1:], free[:2, 1:])  # ordinary coordinates are left alone


@pytest.mark.parametrize("name", METHODS)
def test_a_gradient_whose_square_overflows_before_the_freeze_stops_its_own_coordinate_only(name: str) -> None:
    moved = moves(name, huge=1e25)
    assert not moved[:, 1].any()
    torch.testing.assert_close(moved[0, 2:], moves(name)[0, 2:], rtol=0.5, atol=LR)
    assert bool(moved[:, 2:].isfinite().all())
    assert 0 < float(moved[:, 2:].max()) < 4 * LR


FREEZE = 10
INTERVALS = {"var_update_scaler": 3, "local_step_scaler": 5, "local_step_clipper": 4}
FROZEN: list[tuple[str, dict[str, Any]]] = [
    *(("onebit_adam", {"freeze_step": FREEZE, "scale": scale}) for scale in ("rms", "l2")),
    *(("onebit_lamb", {"freeze_step": FREEZE, "scale": scale}) for scale in ("rms", "l2")),
    ("onebit_lamb", {"freeze_step": FREEZE, "scale": "model", "prescale": True}),
    *(("zero_one_adam", {**INTERVALS, "var_freeze_step": at}) for at in (FREEZE, None)),
]


@pytest.mark.parametrize(("name", "options"), FROZEN)
@pytest.mark.parametrize("ranks", [1, 3])
def test_coordinates_without_variance_never_move(ranks: int, name: str, options: dict[str, Any]) -> None:
    runs = simulate(ranks, [(40,), (7,)], 25, name, parameters, weight_decay=0.0, **options)
    first, last = runs[0][0]["x"], runs[0][-1]["x"]
    assert np.array_equal(first[:2], last[:2])
    assert (first[2:] != last[2:]).all()


@pytest.mark.parametrize(("name", "options"), [FROZEN[0], FROZEN[2], FROZEN[5]])
def test_a_users_mask_stops_the_momentum_after_the_freeze(name: str, options: dict[str, Any]) -> None:
    mask = torch.ones(8, 5)
    mask[4:] = 0.0
    masked = {"weight_decay": 0.0, "momentum_mask": {"all.0": mask}}
    states = simulate(2, [(8, 5), (7,)], 25, name, parameters, **masked, **options)[0]
    at_freeze, last = states[FREEZE]["x"], states[-1]["x"]
    assert np.array_equal(at_freeze[20:40], last[20:40])
    assert (states[0]["x"][20:40] != at_freeze[20:40]).all()
    assert (at_freeze[2:20] != last[2:20]).all()
    assert (at_freeze[40:] != last[40:]).all()


def test_finding_the_mask_takes_little_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "_PIECE", 64)
    method: Any = start(parameters((100, 10), (7,)), "onebit_adam").method
    method.state["variance"].uniform_(0.5, 1.0)
    method.state["variance"][[3, 70, 1006]] = torch.tensor([0.0, math.inf, math.nan])
    with Allocations() as made:
        method.freeze()
    assert (~method.mask).nonzero().flatten().tolist() == [3, 70, 1006]
    assert [nbytes for nbytes in made.nbytes if nbytes >= 1007] == [1007]  # the mask: one byte for each element


def test_a_mask_may_broadcast_and_must_belong_to_a_parameter() -> None:
    model = parameters((8, 5))
    rows = torch.tensor([[1.0]] * 4 + [[0.0]] * 4)
    start(model, "onebit_adam", momentum_mask={"all.0": rows})
    with pytest.raises(AttachError, match=r"momentum_mask: the model has no trainable parameter 'all\.7'"):
        start(parameters((8, 5)), "onebit_adam", momentum_mask={"all.7": rows})
    with pytest.raises(AttachError, match=r"momentum_mask: 'all\.0' is of shape \(8, 5\), its mask of \(3,\)"):
        start(parameters((8, 5)), "onebit_adam", momentum_mask={"all.0": rows[:3, 0]})


def frozen_after(
    ranks: int, name: str, options: dict[str, Any], rates: list[float], growth: float = 1.0, noise: float = 0.01
) -> list[int]:
    """The steps that each rank had applied when it froze; -1 if it has not. Gradients grow by a factor each step."""

    def work(group: Group) -> int:
        model = parameters((64,))
        run = start(model, name, group, betas=(0.9, 0.9), **options)
        for step, rate in enumerate(rates):
            run.optimizer.param_groups[0]["lr"] = rate
            own = torch.randn(64, generator=torch.Generator().manual_seed(1000 * group.rank + step))
            model.all[0].grad = growth**step + noise * own
            run.optimizer.step()
            if run.method.is_frozen:
                assert run.method.is_steady
                return int(run.method.applied_steps)
        return -1

    return SimWorld[Any](ranks).run(work)


AUTO = pytest.mark.parametrize(
    ("name", "options"), [("onebit_adam", {"freeze_step": "auto"}), ("zero_one_adam", {"var_freeze_step": "auto"})]
)
RISING = [0.001 * step for step in range(1, 26)]


@AUTO
def test_auto_freezes_all_ranks_in_the_same_step_once_v_has_settled(name: str, options: dict[str, Any]) -> None:
    assert frozen_after(3, name, options, [0.01] * 40) == [11] * 3  # a full window of 10 after the first
    assert frozen_after(2, name, options, [0.01] * 40, growth=1.05, noise=0.0) == [-1] * 2


@AUTO
def test_auto_does_not_freeze_while_the_learning_rate_rises(name: str, options: dict[str, Any]) -> None:
    assert frozen_after(2, name, options, RISING) == [-1] * 2
    assert frozen_after(2, name, options, [*RISING, 0.025, 0.025]) == [26] * 2


@AUTO
def test_auto_freezes_after_a_quarter_of_a_known_run_and_says_so(
    name: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    def work(group: Group, is_known: bool) -> None:
        model = parameters((8,))
        with start(model, name, group, **options) as run:  # with betas whose window has 1000 steps
            for step in run.range(20) if is_known else range(20):
                model.set_gradients(group.rank, step)
                run.optimizer.step()
                assert run.method.is_frozen == (is_known and step >= 4)

    caplog.set_level("INFO", "commopt")
    SimWorld[None](2).run(lambda group: work(group, True))
    SimWorld[None](2).run(lambda group: work(group, False))
    begins, never = (record.getMessage() for record in caplog.records)
    assert begins == f"{name}: compression begins after step 5"
    assert never.startswith(f"{name}: its warm-up had not ended after 20 steps; write a lower")


def test_a_warm_up_that_is_as_long_as_the_run_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    for steps in (5, 6):
        start(parameters((8,)), "dgc", density=0.1, warmup_steps=5).range(steps)
    assert [record.getMessage().partition("; ")[0] for record in caplog.records] == [
        "dgc: the warm-up of 5 steps does not end before the last of 5"
    ]


@pytest.mark.parametrize("is_rising", [True, False])
@pytest.mark.parametrize(("name", "option"), [("onebit_lamb", "freeze_step"), ("zero_one_adam", "var_freeze_step")])
def test_a_freeze_while_the_learning_rate_rises_is_warned_of(
    name: str, option: str, is_rising: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rates = RISING[:7] if is_rising else [0.01] * 7
    assert frozen_after(2, name, {option: 5}, rates) == [5, 5]
    warned = [record.getMessage() for record in caplog.records]
    expected = [f"{name}: {option}: 5"] if is_rising else []
    assert [message.partition(" is too early")[0] for message in warned] == expected


AROUND = [
    *((*FROZEN[k], at) for k in (3, 4) for at in (7, FREEZE)),
    *((*FROZEN[5], at) for at in (FREEZE, 26)),
    ("zero_one_adam", {**FROZEN[5][1], "residual_bits": 8}, 26),
]


@pytest.mark.parametrize(("name", "options", "at"), AROUND)
def test_a_checkpoint_is_bitwise_before_and_after_the_freeze(
    name: str, options: dict[str, Any], at: int, tmp_path: Path
) -> None:
    """It stores model and optimizer once, though between exchanges of 0/1 Adam (at 26) ranks differ."""

    def trained_from(group: Group, begin: int, end: int, *, loads: bool = False) -> Any:
        model = parameters((40, 30), (7,), (0,), (9,))
        run = start(model, name, group, **options)
        if loads:
            run.load(tmp_path)
        for step in range(begin, end):
            run.optimizer.param_groups[0]["lr"] = 0.01 * (1 + 0.5 * math.sin(step))
            model.set_gradients(group.rank, step)
            run.optimizer.step()
        return run

    def work(group: Group) -> None:
        run = trained_from(group, 0, at)
        is_apart = name == "zero_one_adam" and at > FREEZE
        assert run.method.is_synchronised == run.replicas_are_equal() == (not is_apart)
        run.save(tmp_path)
        whole, resumed = trained_from(group, 0, 30), trained_from(group, at, 30, loads=True)
        assert np.array_equal(flat(whole.parameters.values()), flat(resumed.parameters.values()))
        for held, tensors in whole.method.saved().items():
            assert all(torch.equal(x, resumed.method.saved()[held][key]) for key, x in tensors.items())

    SimWorld[None](3).run(work)
