"""DiceSGD against its equations in float64, and its privacy against two accountants and an attack."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import F64, check_steps, exchange, gradients, simulate, stacked
from torch import Tensor, nn
from torch.nn import functional as F

from commopt import attach
from commopt.errors import ConfigError, GradientsChanged
from commopt.groups import Group, LocalGroup, SimGroup, SimWorld
from commopt.methods.dice_sgd import DiceSGD, noise_multiplier_for
from commopt.wire.bucket import Bucket

SHAPES: list[tuple[int, ...]] = [(30, 21), (17,)]


def clip(x: F64, largest: float) -> F64:
    return np.asarray(x * min(1.0, largest / float(np.linalg.norm(x))) if x.any() else x)


def test_every_step_is_the_papers_from_the_state_before_it() -> None:
    c1, c2 = 2.0, 8.0

    def paper(step: int, before: list[dict[str, F64]]) -> Any:
        g, e = gradients(SHAPES, 4, step), stacked(before, "error")
        assert np.linalg.norm(g[0]) > c1  # clipping has something to do
        v = np.stack([clip(g[i], c1) + clip(e[i], c2 / 4) for i in range(4)])
        return {"x": before[0]["x"] - 0.05 * v.mean(0), "error": e + g - v}, np.ones(g.shape[1], dtype=bool)

    options = {"clip_norm": c1, "error_norm": c2, "noise_multiplier": 0.0}
    check_steps(simulate(4, SHAPES, 25, "dice_sgd", **options), paper, atol=1e-4)


class Digit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x)) * self.frozen)
        return y


def batch(n: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator) * 3, torch.randint(3, (n,), generator=generator)


def attached(group: Group | None = None, **options: Any) -> tuple[Digit, DiceSGD, torch.optim.Optimizer]:
    model = Digit()
    method = DiceSGD(**options)
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    attach(model, method, sgd, group=group or LocalGroup())
    return model, method, sgd


def flat(tensors: Any) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


@pytest.mark.parametrize("calls", [[8], [3, 5], [6]])
@pytest.mark.parametrize("chunk", [None, 2])
def test_gradients_per_sample_are_those_of_each_sample_alone(calls: list[int], chunk: int | None) -> None:
    """Also over several calls; a short batch is still divided by samples_per_rank."""
    model, method, _ = attached(samples_per_rank=8, clip_norm=0.7)
    x, y = batch(sum(calls))
    each = []
    for k in range(len(x)):
        loss = F.cross_entropy(model(x[k : k + 1]), y[k : k + 1])
        each.append(flat(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])))
    norms = torch.stack(each).norm(dim=1)
    assert norms.min() < 0.7 < norms.max()
    clipped = [g * min(1.0, 0.7 / float(g.norm())) for g in each]
    for start, n in zip([0, calls[0]], calls, strict=False):
        method.backward(model, F.cross_entropy, x[start : start + n], y[start : start + n], chunk=chunk)
    found = flat(p.grad for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(found, torch.stack(clipped).sum(0) / 8, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(method.cut, torch.stack(each).sum(0) / 8 - found, rtol=1e-4, atol=1e-5)
    assert model.frozen.grad is None


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_one_sample_moves_a_step_by_at_most_the_sensitivity_wherever_it_is_used(ranks: int) -> None:
    """A sample of any size moves from rank to rank; the largest change reaches the bound."""
    others = [torch.randn(40, generator=torch.Generator().manual_seed(k)) / 20 for k in range(3)]
    direction = F.normalize(torch.randn(40, generator=torch.Generator().manual_seed(9)), dim=0)

    def released(different: float) -> tuple[list[Tensor], float]:
        def work(group: SimGroup) -> tuple[list[Tensor], float]:
            method, out = DiceSGD(clip_norm=1.0, error_norm=2.0, noise_multiplier=0.0), []
            method.bind([("x", torch.zeros(40))], group)
            for step in range(8):
                has_it = step % ranks == group.rank
                x = different * direction if has_it else others[group.rank]
                out.append(exchange(method, Bucket.of([("x", x)]), group).flat)
            return out, method.sensitivity

        return SimWorld[tuple[list[Tensor], float]](ranks).run(work)[0]

    (one, bound), (other, _) = released(1000.0), released(-1000.0)
    moved = [float((a - b).norm()) for a, b in zip(one, other, strict=True)]
    assert bound == pytest.approx(2 * (1.0 + 2.0) / ranks)
    assert max(moved) <= bound * (1 + 1e-5)
    assert max(moved) > 0.99 * bound


def test_error_feedback_takes_the_bias_of_clipping_away() -> None:
    """Three samples pull w to 0, 0 and 9. Their clipped pulls rest at 1/2, what they ask for is 3."""
    targets = torch.tensor([[0.0], [0.0], [9.0]])

    def end(error_norm: float) -> float:
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        method = DiceSGD(clip_norm=1.0, error_norm=error_norm, noise_multiplier=0.0, samples_per_rank=3)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        attach(model, method, sgd, group=LocalGroup())
        for _ in range(200):
            method.backward(model, lambda out, y: 0.5 * (out - y).square().sum(), torch.ones(3, 1), targets)
            sgd.step()
        return model.weight.item()

    assert end(0.0) == pytest.approx(0.5, abs=1e-3)
    assert end(6.0) == pytest.approx(3.0, abs=1e-3)


def noise_of(ranks: int, steps: int, **options: Any) -> Tensor:
    """(ranks, steps, n) what every rank gets for gradients of zero."""

    def work(group: Group) -> Tensor:
        method = DiceSGD(**options)
        method.bind([("x", torch.zeros(20_001))], group)
        zeros = [("x", torch.zeros(20_001))]
        return torch.stack([exchange(method, Bucket.of(zeros), group).flat for _ in range(steps)])

    return torch.stack(SimWorld[Tensor](ranks).run(work))


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("noise_seed", [None, 7])
def test_noise_is_normal_with_the_deviation_that_the_accounting_takes(ranks: int, noise_seed: int | None) -> None:
    drawn = noise_of(ranks, 4, clip_norm=1.5, error_norm=0.5, noise_multiplier=2.0, noise_seed=noise_seed)
    assert all(torch.equal(one, drawn[0]) for one in drawn)
    sigma = 2.0 * 2 * (1.5 + 0.5) / ranks
    z = (drawn[0] / sigma).double()
    assert abs(float(z.mean())) < 5 / math.sqrt(z.numel())
    assert float(z.var()) == pytest.approx(1.0, abs=5 * math.sqrt(2 / z.numel()))
    assert float((z**4).mean()) == pytest.approx(3.0, abs=5 * math.sqrt(96 / z.numel()))
    correlation = torch.corrcoef(z)
    assert float((correlation - torch.eye(4)).abs().max()) < 6 / math.sqrt(20_001)  # each step's is new


def test_noise_cannot_be_drawn_again_unless_a_test_asks_for_it() -> None:
    assert not torch.equal(noise_of(2, 1), noise_of(2, 1))
    assert torch.equal(noise_of(2, 1, noise_seed=3), noise_of(2, 1, noise_seed=3))
    assert not torch.equal(noise_of(2, 1, noise_seed=3), noise_of(2, 1, noise_seed=4))


def spent(steps: int, noise_multiplier: float, delta: float) -> float:
    method = DiceSGD(noise_multiplier=noise_multiplier)
    method.bind([("x", torch.zeros(3))], LocalGroup())
    for _ in range(steps):
        exchange(method, Bucket.of([("x", torch.zeros(3))]), LocalGroup())
    return method.epsilon(delta)


@pytest.mark.parametrize(("steps", "noise_multiplier", "delta"), [(1, 1.0, 1e-5), (100, 20.0, 1e-5), (37, 3.0, 1e-6)])
def test_epsilon_is_that_of_accountants(steps: int, noise_multiplier: float, delta: float) -> None:
    from dp_accounting import dp_event
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    epsilon = spent(steps, noise_multiplier, delta)
    event = dp_event.SelfComposedDpEvent(dp_event.GaussianDpEvent(noise_multiplier), steps)
    assert epsilon == pytest.approx(PLDAccountant().compose(event).get_epsilon(delta), rel=5e-3)
    assert epsilon < RdpAccountant().compose(event).get_epsilon(delta)  # which is an upper bound
    # Balle and Wang 2018: delta = Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu)
    mu = math.sqrt(steps) / noise_multiplier
    phi = torch.special.ndtr
    a, b = (torch.tensor(s * mu / 2 - epsilon / mu, dtype=torch.float64) for s in (1, -1))
    assert float(phi(a) - math.exp(epsilon) * phi(b)) == pytest.approx(delta, rel=1e-4)


def test_the_noise_for_a_target_spends_the_target() -> None:
    noise_multiplier = noise_multiplier_for(4.0, 1e-5, 50)
    assert spent(50, noise_multiplier, 1e-5) == pytest.approx(4.0, rel=1e-6)
    assert spent(0, 1.0, 1e-5) == 0.0
    assert spent(3, 0.0, 1e-5) == math.inf


def test_a_void_step_is_counted_as_spent_and_leaves_the_error_alone() -> None:
    method = DiceSGD(noise_seed=1)
    method.bind([("a", torch.zeros(3)), ("b", torch.zeros(2))], LocalGroup())
    exchange(method, Bucket.of([("a", torch.full((3,), 9.0)), ("b", torch.ones(2))]), LocalGroup())
    before = method.state["error"].clone()
    bad = Bucket.of([("a", torch.ones(3)), ("b", torch.tensor([1.0, math.nan]))])
    assert exchange(method, bad, LocalGroup()).void == "b"
    assert torch.equal(method.state["error"], before)
    assert before.norm() > 1
    assert int(method.state["releases"]) == 2


def test_gradients_that_are_not_per_sample_or_that_something_was_added_to_are_refused() -> None:
    model, method, sgd = attached(samples_per_rank=8)
    x, y = batch(8)
    torch.autograd.backward(F.cross_entropy(model(x), y))
    with pytest.raises(GradientsChanged, match="samples_per_rank is 8"):
        sgd.step()
    with pytest.raises(GradientsChanged, match="9 samples"):
        method.backward(model, F.cross_entropy, *batch(9))
    model, method, sgd = attached(samples_per_rank=8)
    method.backward(model, F.cross_entropy, x, y)
    torch.autograd.backward(F.cross_entropy(model(x), y) * 100)
    with pytest.raises(GradientsChanged, match="after clipping"):
        sgd.step()


def test_without_dp_accounting_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)  # an import raises ImportError
    with pytest.raises(ConfigError, match="pip install 'dp-accounting<1'"):
        noise_multiplier_for(1.0, 1e-5, 10)
