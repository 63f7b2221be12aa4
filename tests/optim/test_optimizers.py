"""What all optimizers here have in common."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import Parameters

from commopt.errors import ConfigError
from commopt.optim import LAMB, OPTIMIZERS, SAVIC, AccumAdam, Lion, make_optimizer
from commopt.optim.outer import FedAdagrad, FedAdam, FedYogi

KINDS: list[Any] = [Lion, LAMB, AccumAdam, SAVIC, FedAdagrad, FedAdam, FedYogi]
EACH = pytest.mark.parametrize("kind", KINDS)


def test_lion_returns_the_closures_loss() -> None:
    p = torch.nn.Parameter(torch.full((2,), 3.0))
    optimizer = Lion([p], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    assert optimizer.step(closure) == 18.0
    torch.testing.assert_close(p.detach(), torch.full((2,), 2.9))


@EACH
def test_what_has_no_gradient_stays_and_has_no_state(kind: Any) -> None:
    used, unused = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(3))
    optimizer = kind([used, unused], lr=0.5)
    used.grad = torch.ones(4)
    optimizer.step()
    assert (used != 1).all()
    assert unused.tolist() == [1.0, 1.0, 1.0]
    assert not optimizer.state[unused]


def test_lions_sign_of_zero_is_zero() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.tensor([2.0, 0.0, -0.0, -1e-30])
    Lion([p], lr=0.5).step()
    assert p.tolist() == [0.5, 1.0, 1.0, 1.5]


@EACH
def test_each_parameter_group_has_its_own_rate(kind: Any) -> None:
    both = [torch.nn.Parameter(torch.zeros(5)) for _ in range(2)]
    optimizer = kind([{"params": both[:1], "lr": 0.1}, {"params": both[1:], "lr": 0.2}], lr=1.0)
    for p in both:
        p.grad = torch.ones(5)
    optimizer.step()
    torch.testing.assert_close(both[1].detach(), 2 * both[0].detach())


@EACH
def test_a_resumed_optimizer_goes_on_as_if_uninterrupted(kind: Any) -> None:
    """AccumAdam is inside a window of four steps; SAVIC has taken the scale of an average."""
    straight, again = Parameters((6, 5), (7,)), Parameters((6, 5), (7,))
    first, second = kind(straight.parameters(), lr=0.02), kind(again.parameters(), lr=0.5)
    for step in range(6):
        straight.set_gradients(0, step)
        first.step()
    if kind is SAVIC:
        first.take_scale()
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # else both would share their state
    again.load_state_dict(straight.state_dict())
    for step in range(6, 15):
        for model, optimizer in ((straight, first), (again, second)):
            model.set_gradients(0, step)
            optimizer.step()
    assert np.array_equal(straight.flat(), again.flat())


@pytest.mark.parametrize(("name", "kind"), [("accum_adam", AccumAdam), ("savic", SAVIC)])
def test_configurations_know_it(name: str, kind: Any) -> None:
    optimizer = make_optimizer({"name": name, "lr": 0.1}, Parameters((2, 2)).parameters())
    assert isinstance(optimizer, kind)
    assert optimizer.defaults["lr"] == 0.1


ADAMS: list[Any] = [LAMB, AccumAdam]
FEDS: list[Any] = [FedAdagrad, FedAdam, FedYogi]
TWO_NUMBERS = "two numbers in [0, 1), as in [0.9, 0.99]"
BAD: list[tuple[list[Any], str, Any, str]] = [
    (KINDS, "lr", -1.0, "a number of at least 0"),
    ([*ADAMS, Lion, SAVIC], "betas", (0.9, 1.0), TWO_NUMBERS),
    ([*ADAMS, Lion, SAVIC], "betas", (0.9,), TWO_NUMBERS),
    ([*ADAMS, Lion, SAVIC], "weight_decay", -0.1, "a number of at least 0"),
    (ADAMS, "eps", 0.0, "a number above 0"),
    ([SAVIC], "alpha", 0.0, "a number above 0"),
    ([LAMB], "min_coeff", 11.0, "a number from 0 to max_coeff, 10.0"),
    *(([AccumAdam], "accum_iter", value, "a whole number from 1") for value in (0, 2.0, True)),
    ([AccumAdam], "decay_1d", 1, "true or false"),
    (FEDS, "beta1", 1.0, "a number in [0, 1), as in 0.9"),
    (FEDS, "beta1", (0.9, 0.99), "a number in [0, 1), as in 0.9"),
    (FEDS[1:], "beta2", -0.1, "a number in [0, 1), as in 0.9"),
    (FEDS, "tau", 0.0, "a number above 0"),
]


@pytest.mark.parametrize(("kinds", "option", "value", "wanted"), BAD, ids=str)
def test_a_bad_option_is_named_with_its_range(kinds: list[Any], option: str, value: Any, wanted: str) -> None:
    for kind in kinds:
        with pytest.raises(ConfigError) as caught:
            kind([torch.nn.Parameter(torch.ones(2))], **{option: value})
        assert str(caught.value) == f"{option}: {value!r} is out of range; write {wanted}"


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rate", [math.inf, math.nan])
def test_a_rate_that_is_not_finite_is_refused(name: str, rate: float) -> None:
    with pytest.raises(ConfigError, match=f"optimizer: lr: {rate} is out of range; write a finite number"):
        make_optimizer({"name": name, "lr": rate}, [torch.nn.Parameter(torch.ones(1))])
