"""FedAdagrad, FedAdam and FedYogi against their paper in float64."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from commopt.errors import ConfigError
from commopt.optim.outer import FedAdagrad, FedAdam, FedYogi

F64 = NDArray[np.float64]
LR, B1, B2, TAU = 0.03, 0.8, 0.95, 1e-2
EACH = pytest.mark.parametrize("kind", [FedAdagrad, FedAdam, FedYogi])


def reference(kind: type, x: F64, m: F64, v: F64, replicas: F64) -> tuple[F64, F64, F64]:
    """Reddi et al. 2020, arXiv:2003.00295, Algorithm 2, lines 10 to 15, for parameters (K, ...) after the replicas' local steps."""
    delta = np.mean([x_i - x for x_i in replicas], axis=0)
    m = B1 * m + (1 - B1) * delta
    if kind is FedAdagrad:
        v = v + delta**2
    elif kind is FedYogi:
        v = v - (1 - B2) * delta**2 * np.sign(v - delta**2)
    else:
        v = B2 * v + (1 - B2) * delta**2
    return x + LR * m / (np.sqrt(v) + TAU), m, v


def make(kind: type, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    given: dict[str, Any] = {"lr": LR, "beta1": B1, "tau": TAU} | ({} if kind is FedAdagrad else {"beta2": B2})
    made = kind(params, **given)
    assert isinstance(made, torch.optim.Optimizer)
    return made


def f64(x: Tensor) -> F64:
    return np.asarray(x.detach().double()).copy()


@EACH
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_every_round_is_the_papers(kind: type, dtype: torch.dtype, tolerance: float) -> None:
    generator = np.random.default_rng(5)
    start = generator.standard_normal((6, 4))
    p = torch.nn.Parameter(torch.tensor(start, dtype=dtype))
    optimizer = make(kind, [p])
    x, m, v = f64(p), np.zeros((6, 4)), np.full((6, 4), TAU**2)
    grew = shrank = False
    for k in range(40):
        # deltas around tau, large and then small, so that Yogi's v goes both ways
        replicas = x + (0.02 if k < 20 else 0.002) * (0.5 + generator.standard_normal((3, 6, 4)))
        p.grad = torch.tensor(x - replicas.mean(axis=0), dtype=dtype)
        before = v
        x, m, v = reference(kind, x, m, v, replicas)
        grew, shrank = grew or bool((v > before).any()), shrank or bool((v < before).any())
        optimizer.step()
        state = optimizer.state[p]
        for own, value in ((p, x), (state["momentum"], m), (state["variance"], v)):
            np.testing.assert_allclose(f64(own), value, rtol=tolerance, atol=tolerance * 1e-2)
    assert grew
    assert shrank == (kind is not FedAdagrad)
    assert np.abs(x - start).max() > 0.1


@EACH
def test_parameters_move_towards_the_replicas(kind: type) -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([-1.0, 0.0, 1.0])  # replicas are at 1, 0 and -1 on average
    make(kind, [p]).step()
    assert p[0] > 0
    assert p[1] == 0
    assert p[2] < 0


@EACH
def test_a_resumed_optimizer_goes_on_as_if_uninterrupted(kind: type) -> None:
    straight, again = torch.nn.Parameter(torch.zeros(5)), torch.nn.Parameter(torch.zeros(5))
    first, second = make(kind, [straight]), make(kind, [again])

    def step(p: torch.nn.Parameter, optimizer: torch.optim.Optimizer, k: int) -> None:
        p.grad = 0.01 * torch.randn(5, generator=torch.Generator().manual_seed(k))
        optimizer.step()

    for k in range(3):
        step(straight, first, k)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # else both would share their state
    again.data.copy_(straight.data)
    for k in range(3, 8):
        step(straight, first, k)
        step(again, second, k)
    assert torch.equal(straight, again)


def test_fed_adagrad_has_no_momentum_unless_asked_for() -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = FedAdagrad([p], lr=1.0, tau=0.5)
    p.grad = torch.tensor([-2.0])
    optimizer.step()
    moved = float(p.detach())
    assert moved == pytest.approx(2 / (4.25**0.5 + 0.5))
    p.grad = torch.zeros(1)
    optimizer.step()
    assert float(p.detach()) == moved


@EACH
def test_what_has_no_gradient_stays(kind: type) -> None:
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = make(kind, [p])
    optimizer.step()
    assert p.tolist() == [1.0, 1.0]
    assert not optimizer.state[p]


@EACH
@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("lr", -1.0, "a number of at least 0"),
        ("beta1", 1.0, r"a number in \[0, 1\), as in 0.9"),
        ("beta1", (0.9, 0.99), r"a number in \[0, 1\), as in 0.9"),
        ("tau", 0.0, "a number above 0"),
    ],
)
def test_a_bad_option_is_named_with_its_range(kind: type, option: str, value: Any, wanted: str) -> None:
    with pytest.raises(ConfigError, match=rf"{option}: .* is out of range; write {wanted}"):
        kind([torch.nn.Parameter(torch.ones(2))], **{option: value})


@pytest.mark.parametrize("kind", [FedAdam, FedYogi])
def test_a_bad_beta2_is_named_with_its_range(kind: type) -> None:
    with pytest.raises(ConfigError, match=r"beta2: -0.1 is out of range; write a number in \[0, 1\)"):
        kind([torch.nn.Parameter(torch.ones(2))], beta2=-0.1)
