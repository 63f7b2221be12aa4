"""PowerSGD against its equations in float64, and where power iteration has no answer of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from pretend import DEVICES, working_on
from synthetic import F64, exchange
from torch import Tensor

from commopt import build
from commopt.groups import Group, SimWorld
from commopt.methods.powersgd import orthonormal
from commopt.wire.bucket import Bucket

SHAPES = {"wide": (30, 70), "bias": (30,), "conv": (40, 5, 3, 3), "tall": (90, 20), "small": (3, 4)}
RANK = 3
CPU = torch.device("cpu")
EVERYWHERE = pytest.mark.parametrize("device", [pytest.param(CPU, id="cpu"), *DEVICES])


class Reference:
    """Vogels et al. 2019, Algorithms 1 and 2, in float64: q (m, r) is shared, e (N, n, m) is local."""

    def __init__(self, q: F64, e: F64) -> None:
        self.q, self.e = q, e

    def mean(self, g: F64) -> F64:
        """g: (N, n, m) local gradients"""
        m = g + self.e
        p, _ = np.linalg.qr((m @ self.q).mean(0))
        q = np.swapaxes(m, 1, 2) @ p  # (N, m, r)
        self.e = m - p @ np.swapaxes(q, 1, 2)
        self.q = q.mean(0)
        return np.asarray(p @ self.q.T)


Gradients = Callable[[int, int], dict[str, Tensor]]


def random_gradients(rank: int, step: int) -> dict[str, Tensor]:
    """A mean of low rank that turns slowly, with noise of each rank's own."""
    made = {}
    for k, (name, shape) in enumerate(SHAPES.items()):
        own, common = (torch.Generator().manual_seed(seed) for seed in (1000 * rank + step, k))
        n, m = shape[0], math.prod(shape[1:])
        u, v, turn = (torch.randn(*size, generator=common) for size in ((n, 2), (2, m), (n, m)))
        made[name] = (u @ v + 0.1 * step * turn + torch.randn(n, m, generator=own)).view(shape)
    return made


def exchanged(
    ranks: int,
    steps: int,
    gradients: Gradients,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    device: torch.device = CPU,
    **options: Any,
) -> list[list[dict[str, Any]]]:
    """[rank][step] the mean, why it was void, the state before and after it, and the calls so far."""

    def work(group: Group) -> list[dict[str, Any]]:
        with working_on(device):
            return steps_of(group)

    def steps_of(group: Group) -> list[dict[str, Any]]:
        method: Any = build("powersgd", **options)
        method.bind([(name, torch.zeros(shape, device=device)) for name, shape in shapes.items()], group)
        done = []
        for step in range(steps):
            before = state_of(method)
            given = [(name, g.to(device)) for name, g in gradients(group.rank, step).items()]
            bucket = exchange(method, Bucket.of(given), group)
            one = {"mean": {name: x.cpu().clone() for name, x in bucket.views()}, "void": bucket.void}
            calls = sum(group.traffic.calls.values())
            done.append({**one, "before": before, "after": state_of(method), "calls": calls})
        return done

    return SimWorld[Any](ranks).run(work)


def state_of(method: Any) -> dict[str, dict[str, F64]]:
    """Q and the residual of each compressed matrix, in float64."""
    named: dict[str, dict[str, F64]] = {"q": {}, "e": {}}
    for name, (n, m) in method.shapes.items():
        named["q"][name] = method.part("q", name).view(-1, m).T.cpu().double().numpy().copy()
        named["e"][name] = method.part("residual", name).view(n, m).cpu().double().numpy().copy()
    return named


def rows(gradients: Gradients, name: str, step: int, ranks: int) -> F64:
    return np.stack([gradients(rank, step)[name].flatten(1).double().numpy() for rank in range(ranks)])


@EVERYWHERE
def test_every_step_is_the_papers_from_the_state_before_it(device: torch.device) -> None:
    steps = 25 if device == CPU else 5
    runs = exchanged(4, steps, random_gradients, device=device, rank=RANK)
    assert sorted(runs[0][0]["before"]["q"]) == ["conv", "tall", "wide"]
    for step in range(steps):
        now = [run[step] for run in runs]
        for name in now[0]["before"]["q"]:
            g = rows(random_gradients, name, step, 4)
            e = np.stack([one["before"]["e"][name] for one in now])
            reference = Reference(now[0]["before"]["q"][name], e)
            expected = reference.mean(g)
            size = float(np.abs(expected).max())
            for rank, one in enumerate(now):
                mean = one["mean"][name].view(expected.shape)
                np.testing.assert_allclose(mean, expected, rtol=0, atol=2e-5 * size)
                np.testing.assert_allclose(one["after"]["e"][name], reference.e[rank], rtol=0, atol=5e-5 * size)
                q = one["after"]["q"][name]
                np.testing.assert_allclose(np.linalg.norm(q, axis=0), 1.0, rtol=1e-6)
                projected = q @ np.linalg.lstsq(q, reference.q, rcond=None)[0]  # the same span
                np.testing.assert_allclose(projected, reference.q, rtol=0, atol=1e-4 * size)
        for name in ("bias", "small"):
            exact = torch.stack([random_gradients(rank, step)[name] for rank in range(4)]).mean(0).flatten()
            torch.testing.assert_close(now[0]["mean"][name], exact)


def test_a_short_run_stays_with_the_reference() -> None:
    """Short, for power iteration with error feedback amplifies rounding about 1.3-fold in every step, whatever the CPU's rounding is."""
    steps = 8
    runs = exchanged(4, steps, random_gradients, rank=RANK)
    for name, q in runs[0][0]["before"]["q"].items():
        n, m = SHAPES[name][0], math.prod(SHAPES[name][1:])
        reference = Reference(q, np.zeros((4, n, m)))
        for step in range(steps):
            expected = reference.mean(rows(random_gradients, name, step, 4))
        got = runs[0][-1]["mean"][name].view(n, m)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * float(np.abs(expected).max()))


def test_replicas_are_equal_and_start_from_one_q_of_the_seed() -> None:
    runs = exchanged(3, 5, random_gradients, rank=RANK)
    for run in runs[1:]:
        for one, first in zip(run, runs[0], strict=True):
            assert all(torch.equal(one["mean"][name], first["mean"][name]) for name in SHAPES)
            assert all(np.array_equal(one["before"]["q"][name], q) for name, q in first["before"]["q"].items())
    other = exchanged(1, 1, random_gradients, rank=RANK, seed=1)[0][0]["before"]["q"]
    first = runs[0][0]["before"]["q"]
    assert not np.isclose(first["wide"], other["wide"]).all()
    assert not np.isclose(first["wide"][:20], first["tall"]).all()


def low_rank(rank: int, step: int) -> dict[str, Tensor]:
    """Matrices of rank 3, whose column space all ranks share."""
    made = {}
    for k, (name, shape) in enumerate(SHAPES.items()):
        common, own = (torch.Generator().manual_seed(seed) for seed in (100 * step + k, 1000 * rank + step))
        u = torch.randn(shape[0], RANK, generator=common)
        made[name] = (u @ torch.randn(RANK, math.prod(shape[1:]), generator=own)).view(shape)
    return made


@pytest.mark.parametrize("seed", range(4))
def test_a_gradient_of_that_rank_is_reproduced_exactly(seed: int) -> None:
    runs = exchanged(4, 3, lambda rank, _: low_rank(rank, seed), rank=RANK, seed=seed)
    for step, one in enumerate(runs[0]):
        for name, mean in one["mean"].items():
            exact = torch.stack([low_rank(rank, seed)[name] for rank in range(4)]).mean(0).flatten()
            # the first Q is at random angles to the matrix, which multiply the rounding; the residual brings it back in the second
            # step. One rank less would leave 30 %
            assert float((mean - exact).norm()) < (1e-6 if step > 1 else 1e-4) * float(exact.norm()), (name, step)


def test_nothing_is_lost() -> None:
    steps = 15
    runs = exchanged(4, steps, random_gradients, rank=1)
    for name in runs[0][0]["before"]["q"]:
        given = sum(rows(random_gradients, name, step, 4).mean(0) for step in range(steps))
        got = sum(one["mean"][name].double().numpy() for one in runs[0])
        left = np.mean([run[-1]["after"]["e"][name] for run in runs], axis=0)
        np.testing.assert_allclose(got + left.ravel(), np.ravel(given), rtol=0, atol=1e-4)
        assert float(np.abs(left).max()) > 1.0


def test_residuals_stay_bounded_where_ranks_disagree_for_ever() -> None:
    shape = {"x": (40, 40)}
    directions = [torch.randn(40, 40, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]

    def gradients(rank: int, step: int) -> dict[str, Tensor]:
        return {"x": directions[0] @ directions[1] / 40 + (100.0 if rank else -100.0) * torch.outer(*directions[2][:2])}

    runs = exchanged(2, 60, gradients, shape, rank=4)
    largest = [float(np.abs(run[-1]["after"]["e"]["x"]).max()) for run in runs]
    difference = float((gradients(0, 0)["x"] - gradients(1, 0)["x"]).abs().max())
    assert max(largest) < 10 * difference  # what the mean leaves out of each would be 30 times the difference by now


@EVERYWHERE
@pytest.mark.parametrize("scale", [2.0**-80, 2.0**80])
def test_gradients_too_small_or_too_large_to_square_are_like_others(scale: float, device: torch.device) -> None:
    def gradients(rank: int, step: int) -> dict[str, Tensor]:
        return {name: g * scale for name, g in random_gradients(rank, step).items()}

    usual, scaled = (exchanged(2, 4, make, device=device, rank=RANK)[0] for make in (random_gradients, gradients))
    for one, other in zip(usual, scaled, strict=True):
        assert other["void"] is None
        for name, mean in one["mean"].items():
            torch.testing.assert_close(other["mean"][name] / scale, mean, rtol=1e-4, atol=1e-4)


def one_element(row: int, column: int) -> dict[str, Tensor]:
    x = torch.zeros(40, 40)
    x[row, column] = 1.0
    return {"x": x}


@EVERYWHERE
def test_a_column_that_has_become_zero_is_drawn_anew(device: torch.device) -> None:
    """The first gradients say nothing about where the later ones are, and neither do the first rows and columns."""
    places = [(30, 31), (30, 31), (38, 39), (38, 39), (20, 21), (20, 21)]

    def gradients(rank: int, step: int) -> dict[str, Tensor]:
        return {"x": torch.zeros(40, 40)} if step < 3 else one_element(*places[step - 3])

    runs = exchanged(2, 9, gradients, {"x": (40, 40)}, device, rank=4)[0]
    for step, one in enumerate(runs):
        assert np.isfinite(one["after"]["q"]["x"]).all()
        assert (np.linalg.norm(one["after"]["q"]["x"], axis=0) > 0.1).all()
        if step < 3:
            assert not one["mean"]["x"].any()
    given = sum(gradients(0, step)["x"] for step in range(9))
    got = sum(one["mean"]["x"] for one in runs).view(40, 40)
    torch.testing.assert_close(got, given, rtol=0, atol=1e-5)


@EVERYWHERE
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_an_inf_that_meets_a_zero_of_q_voids_the_bucket_and_harms_nothing(bad: float, device: torch.device) -> None:
    def gradients(rank: int, step: int) -> dict[str, Tensor]:
        g = random_gradients(rank, step)
        g["wide"][:, 50:] = 0.0  # then Q is zero there
        if step == 3 and rank == 1:
            g["wide"][7, 60] = bad
        return g

    runs = exchanged(3, 5, gradients, device=device, rank=RANK)
    for run in runs:
        assert not run[3]["before"]["q"]["wide"][50:].any()
        assert [one["void"] for one in run] == [None, None, None, "wide", None]
        for key in ("q", "e"):
            assert all(np.array_equal(run[3]["after"][key][name], x) for name, x in run[3]["before"][key].items())
        assert all(bool(x.isfinite().all()) for x in run[4]["mean"].values())


@EVERYWHERE
def test_an_overflow_of_the_second_factor_voids_too(device: torch.device) -> None:
    def gradients(rank: int, step: int) -> dict[str, Tensor]:
        g = torch.zeros(40, 40)
        g[:, 3] = 3e38  # P is M Q, and |Q| is below 1; P^T M is 3e38 sqrt(40)
        return {"x": g if step == 1 else one_element(1, 3)["x"]}

    for run in exchanged(2, 3, gradients, {"x": (40, 40)}, device, rank=1):
        assert [one["void"] for one in run] == [None, "x", None]
        assert np.array_equal(run[1]["after"]["e"]["x"], run[1]["before"]["e"]["x"])


@EVERYWHERE
def test_gradients_are_averaged_exactly_before_start_step(device: torch.device) -> None:
    runs = exchanged(2, 5, random_gradients, device=device, rank=1, start_step=3)
    for step, one in enumerate(runs[0]):
        exact = torch.stack([random_gradients(rank, step)["wide"] for rank in range(2)]).mean(0).flatten()
        assert torch.allclose(one["mean"]["wide"], exact) == (step < 3)


def test_two_all_reduces_for_a_bucket() -> None:
    assert build("powersgd").bytes_per_parameter(5) == pytest.approx(8 * 4 / 5 * 4 * 2048 / 2**20)
    assert [run[0]["calls"] for run in exchanged(2, 1, random_gradients, rank=1)] == [2, 2]


def thin(n: int, seed: int, condition: float = 10.0) -> Tensor:
    """(5, n) rows of lengths and angles that differ by so much."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(size, 5, generator=generator, dtype=torch.float64)).Q for size in (5, n))
    rows: Tensor = (u * torch.logspace(0, -math.log10(condition), 5, dtype=torch.float64)) @ v.T
    return rows.float()


def check_orthonormal(given: Tensor, found: Tensor, rank: int, rtol: float = 1e-6) -> None:
    """Some rows are orthonormal, the others zeros, and together they span the given ones."""
    q, p = found.double(), given.double()
    is_row = q.any(1)
    assert int(is_row.sum()) == rank
    torch.testing.assert_close(q @ q.T, torch.diag(is_row.double()), rtol=0, atol=1e-6)
    p = p / p.abs().max()
    torch.testing.assert_close(p @ q.T @ q, p, rtol=0, atol=rtol)


@pytest.mark.parametrize("scale", [1.0, 2.0**-120, 2.0**100])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_rows_of_all_matrices_become_orthonormal_at_once(scale: float, condition: float) -> None:
    ps = [thin(n, n, condition) * scale for n in (5, 40, 129)]
    for p, q in zip(ps, orthonormal(ps), strict=True):
        assert q.shape == p.shape
        check_orthonormal(p, q, 5)


def test_dependent_rows_become_zeros_and_leave_the_others_in_peace() -> None:
    p, alone = thin(40, 1), torch.zeros(5, 40)
    alone[:, 7] = torch.tensor([0.0, 3e-40, 1.0, -7.0, 1e30])  # multiples of one row, from denormal to large
    zero, twice, combined = p.clone(), p.clone(), p.clone()
    zero[[0, 3]] = 0.0
    twice[2] = -4 * twice[0]
    combined[1] = combined[0] + 2.0**-60 * combined[3]
    ps = [p, zero, twice, combined, alone, torch.zeros(5, 33)]
    for given, found, rank in zip(ps, orthonormal(ps), (5, 3, 4, 4, 1, 0), strict=True):
        check_orthonormal(given, found, rank) if rank else torch.testing.assert_close(found, given)


def test_a_row_that_others_span_but_for_rounding_is_a_direction_or_nothing() -> None:
    for seed in range(20):
        p = thin(200, seed)
        p[4] = p[0] / 3 + p[1] / 7 - p[2]
        (q,) = orthonormal([p])
        check_orthonormal(p, q, 5 if bool(q[4].any()) else 4)


def test_matrices_with_a_nan_or_an_inf_do_not_harm_others() -> None:
    good = thin(40, 1)
    for bad in (math.nan, math.inf):
        spoiled = good.clone()
        spoiled[2, 3] = bad
        check_orthonormal(good, orthonormal([spoiled, good, spoiled])[1], 5)
