"""Lion, the uncompressed parent of Distributed Lion, against its paper in float64."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from commopt.errors import ConfigError
from commopt.optim import Lion

F64 = NDArray[np.float64]


def lion(x: F64, m: F64, g: F64, lr: float, b1: float, b2: float, decay: float) -> tuple[F64, F64, F64]:
    """Chen et al. 2023, arXiv:2302.06675, Algorithm 2: x, m and what the sign is taken of."""
    c = b1 * m + (1 - b1) * g
    return x - lr * (np.sign(c) + decay * x), b2 * m + (1 - b2) * g, c


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.95, 0.98), (0.0, 0.0)])
def test_lion_is_the_papers_over_a_run(betas: tuple[float, float], decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(30, 20, generator=generator))
    optimizer = Lion([p], lr=0.01, betas=betas, weight_decay=decay)
    x, m = p.detach().double().numpy().copy(), np.zeros((30, 20))
    for _ in range(30):
        p.grad = 0.3 + torch.randn(30, 20, generator=generator)
        x, m, c = lion(x, m, p.grad.double().numpy(), 0.01, *betas, decay)
        assert np.abs(c).min() > 1e-6  # no sign hangs by a hair
        optimizer.step()
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=0, atol=1e-5)
        np.testing.assert_allclose(optimizer.state[p]["momentum"].numpy(), m, rtol=0, atol=1e-6)


def test_lion_leaves_what_has_no_gradient_where_it_is() -> None:
    used, unused = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(3))
    optimizer = Lion([used, unused], lr=0.5)
    used.grad = torch.tensor([2.0, 0.0, -0.0, -1e-30])
    optimizer.step()
    assert used.tolist() == [0.5, 1.0, 1.0, 1.5]
    assert unused.tolist() == [1.0, 1.0, 1.0]
    assert not optimizer.state[unused]


def test_each_parameter_group_of_lion_has_its_own_rate_and_resumes() -> None:
    def make() -> tuple[list[torch.nn.Parameter], Lion]:
        both = [torch.nn.Parameter(torch.zeros(5)), torch.nn.Parameter(torch.zeros(5))]
        return both, Lion([{"params": both[:1], "lr": 0.1}, {"params": both[1:], "lr": 0.2}])

    def step(both: list[torch.nn.Parameter], optimizer: Lion, k: int) -> None:
        for p in both:
            p.grad = torch.randn(5, generator=torch.Generator().manual_seed(k))
        optimizer.step()

    both, optimizer = make()
    step(both, optimizer, 0)
    torch.testing.assert_close(both[1].detach(), 2 * both[0].detach())
    again, other = make()
    with torch.no_grad():
        for p, q in zip(again, both, strict=True):
            p.copy_(q)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # else both would share their momentum
    for k in range(1, 6):
        step(both, optimizer, k)
        step(again, other, k)
    assert all(torch.equal(p, q) for p, q in zip(both, again, strict=True))


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


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"lr": -1.0}, "lr: -1.0 is out of range; write a number of at least 0"),
        ({"betas": (0.9,)}, "betas: (0.9,) is out of range; write two numbers in [0, 1), as in [0.9, 0.99]"),
        ({"betas": (0.9, 1.0)}, "betas: (0.9, 1.0) is out of range; write two numbers in [0, 1), as in [0.9, 0.99]"),
        ({"weight_decay": -0.1}, "weight_decay: -0.1 is out of range; write a number of at least 0"),
    ],
)
def test_bad_options_of_lion_are_refused(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Lion([torch.nn.Parameter(torch.zeros(2))], **given)
    assert str(caught.value) == complaint
