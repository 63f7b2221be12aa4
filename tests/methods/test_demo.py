"""DeMo against its equations in float64, sizes that nothing divides, ties, and what is each rank's own."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from rig import start
from synthetic import F64, Parameters
from torch import Tensor

from commopt.groups import Group, LocalGroup, SimWorld
from commopt.methods.demo import grids, largest

LR, BETA, DECAY, CHUNK, K = 0.01, 0.9, 0.1, 16, 6
SHAPES: list[tuple[int, ...]] = [(50, 33), (32, 48), (7,), (1,), (129,), (6, 5, 3, 3), (1, 40)]


def pieces(n: int) -> list[slice]:
    """As few runs of at most CHUNK as n takes, of lengths that differ by one, the longer ones first."""
    return [slice(int(part[0]), int(part[-1]) + 1) for part in np.array_split(np.arange(n), math.ceil(n / CHUNK))]


def dct(n: int) -> F64:
    i = np.arange(n)
    rows = np.cos(np.pi * (2 * i[None] + 1) * i[:, None] / (2 * n)) * math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    return rows


def extract(d: F64) -> tuple[F64, float]:
    """The fast components of a matrix, in its own space, and how far the choice was from being another."""
    q, margin = np.zeros_like(d), math.inf
    for rows in pieces(d.shape[0]):
        for columns in pieces(d.shape[1]):
            left, right = dct(rows.stop - rows.start), dct(columns.stop - columns.start)
            c = left @ d[rows, columns] @ right.T
            order = np.sort(np.abs(c).ravel())[::-1]
            if c.size > K:
                margin = min(margin, (order[K - 1] - order[K]) / order[K - 1])
                c = np.where(np.abs(c) >= order[K - 1], c, 0.0)
            q[rows, columns] = left.T @ c @ right
    return q, margin


def reference(x: F64, d: F64, g: F64) -> tuple[F64, F64, float, F64]:
    """Peng et al. 2024, Algorithm 1, with a sign, in float64. x: (n, m), d, g: (N, n, m). Also how clear selection and signs were."""
    d = BETA * d + g
    extracted = [extract(one) for one in d]
    q = np.stack([one for one, _ in extracted])
    mean = q.mean(0)
    clear = np.abs(mean) / np.abs(mean).max()
    return x - LR * (np.sign(mean) + DECAY * x), d - q, min(margin for _, margin in extracted), clear


def matrix(x: Tensor) -> F64:
    x = x.detach().double()
    return np.asarray(x.reshape(len(x), -1) if x.dim() > 1 else x.reshape(1, -1))


def in_space(method: Any, model: Parameters) -> list[F64]:
    """The momentum of each parameter, transformed back."""
    named = method.saved()["rank"]["momentum"]
    views = [method.index.view(named, name) for name in method.index.names]
    return [matrix(method._inverse(f"all.{k}", c).view(p.shape)) for k, (p, c) in enumerate(zip(model.all, views))]  # noqa: B905


def train(ranks: int, shapes: list[tuple[int, ...]], steps: int, **options: Any) -> list[list[dict[str, Any]]]:
    """[rank][step] the state before each step, and after the last."""
    options = {"lr": LR, "momentum_decay": BETA, "weight_decay": DECAY, "chunk": CHUNK, "top_k": K, **options}

    def work(group: Group) -> list[dict[str, Any]]:
        model = Parameters(*shapes)
        run = start(model, "demo", group, **options)
        method = run.method
        states = []
        for step in range(steps + 1):
            sent = group.traffic.payload_bytes
            states.append({"x": [matrix(p) for p in model.all], "d": in_space(method, model), "bytes": sent})
            model.set_gradients(group.rank, step)
            run.optimizer.step()
        return states

    return SimWorld[Any](ranks).run(work)


def matrices(step: int, ranks: int, shapes: list[tuple[int, ...]]) -> list[F64]:
    models = [Parameters(*shapes) for _ in range(ranks)]
    for rank, model in enumerate(models):
        model.set_gradients(rank, step)
    return [np.stack([matrix(p.grad) for p in ps]) for ps in zip(*(model.all for model in models), strict=True)]


def test_every_step_is_the_papers_from_the_state_before_it() -> None:
    runs = train(4, SHAPES, 25, value_bits=32)
    compared, total = 0, 0
    for step in range(25):
        before, after = [run[step] for run in runs], [run[step + 1] for run in runs]
        for k, g in enumerate(matrices(step, 4, SHAPES)):
            total += g[0].size
            x, d, margin, clear = reference(before[0]["x"][k], np.stack([one["d"][k] for one in before]), g)
            for rank, one in enumerate(after):
                assert np.array_equal(one["x"][k], after[0]["x"][k]), f"ranks differ in step {step}"
                if margin > 1e-5:
                    np.testing.assert_allclose(one["d"][k], d[rank], rtol=0, atol=2e-6 * float(np.abs(g).max()))
                    np.testing.assert_allclose(one["x"][k][clear > 1e-5], x[clear > 1e-5], rtol=1e-6, atol=1e-6)
                    compared += int((clear > 1e-5).sum()) if rank == 0 else 0
    assert compared > 0.9 * total


def test_a_short_run_stays_with_the_reference() -> None:
    runs = train(4, [(20, 30)], 25, value_bits=32)
    x, d = runs[0][0]["x"][0], np.zeros((4, 20, 30))
    for step in range(25):
        x, d, margin, _ = reference(x, d, matrices(step, 4, [(20, 30)])[0])
        assert margin > 1e-6
    assert float((np.abs(runs[0][-1]["x"][0] - x) < 1e-5).mean()) > 0.99
    np.testing.assert_allclose(runs[2][-1]["d"][0], d[2], rtol=0, atol=1e-4)


def test_what_16_bits_leave_out_stays_in_the_momentum() -> None:
    exact, rounded = (train(3, [(40, 40)], 1, value_bits=bits)[1][-1]["d"][0] for bits in (32, 16))
    g = matrices(0, 3, [(40, 40)])[0][1]
    left = rounded - exact  # q in float32 - q in bfloat16
    assert 0 < float(np.abs(left).max()) < 2.0**-7 * float(np.abs(g - exact).max())
    assert float(np.linalg.norm(left)) < 2.0**-8 * float(np.linalg.norm(g - exact))


@pytest.mark.parametrize("shape", [(1, 1), (1, 173), (65, 64), (63, 200), (129, 1), (0, 5)])
def test_chunks_cover_every_element_once_and_are_at_most_so_large(shape: tuple[int, int]) -> None:
    seen = torch.zeros(shape)
    for grid in grids(shape, 64):
        assert max(grid.height, grid.width) <= 64
        grid._part(seen).add_(1)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        back = torch.zeros(shape)
        grid.inverse_(grid.forward(x), back)
        torch.testing.assert_close(grid._part(back), grid._part(x))
    assert bool((seen == 1).all())
    sizes = {(grid.height, grid.width) for grid in grids(shape, 64)}
    assert all(max(axis) - min(axis) <= 1 for axis in zip(*sizes, strict=True))


def test_of_equal_coefficients_the_first_are_sent() -> None:
    x = torch.tensor(
        [[1.0, -2.0, 2.0, 0.0, -2.0, 2.0], [0.0, -0.0, 0.0, 0.0, 0.0, 0.0], [3.0, 1.0, 2.0, 6.0, 5.0, 4.0]]
    )
    assert largest(x, 3).tolist() == [[1, 2, 4], [0, 1, 2], [3, 4, 5]]
    assert largest(x, 9).tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    assert largest(torch.tensor([[1.0, math.nan, math.inf, 3e38]]), 2).tolist() == [[1, 2]]
    wide = torch.randn(50, 4096, generator=torch.Generator().manual_seed(0))
    expected = wide.abs().topk(32).indices.sort(dim=1).values
    assert torch.equal(largest(wide, 32), expected)


def test_a_parameter_without_any_gradient_yet_does_not_move() -> None:
    def work(group: Group) -> bool:
        model = Parameters((40, 40), (30,))
        before = copy.deepcopy(model.state_dict())
        run = start(model, "demo", group, lr=0.1)
        for p in model.all:
            p.grad = torch.zeros_like(p)
        run.optimizer.step()
        return all(torch.equal(x, before[name]) for name, x in model.state_dict().items())

    assert SimWorld[bool](3).run(work) == [True] * 3


def test_one_rank_selects_as_well_and_sends_nothing() -> None:
    run = train(1, [(40, 40)], 3, value_bits=32)[0]
    _, d, _, _ = reference(run[2]["x"][0], np.stack(run[2]["d"]), matrices(2, 1, [(40, 40)])[0])
    np.testing.assert_allclose(run[3]["d"][0], d[0], rtol=0, atol=1e-5)
    assert float(np.abs(d).max()) > 0.1
    assert run[3]["bytes"] == 0.0


def test_everything_sent_leaves_sign_sgd() -> None:
    model = Parameters((40, 40))
    before = model.all[0].detach().clone()
    run = start(model, "demo", LocalGroup(), lr=0.1, chunk=8, top_k=64, value_bits=32)
    method = run.method
    model.set_gradients(0, 0)
    assert model.all[0].grad is not None
    expected = before - 0.1 * model.all[0].grad.sign()
    run.optimizer.step()
    torch.testing.assert_close(model.all[0].detach(), expected)
    assert not method.state["momentum"].any()


def test_the_rate_does_not_change_what_the_momentum_holds() -> None:
    slow, fast = (train(2, [(40, 40)], 5, lr=lr, weight_decay=0.0)[0][-1] for lr in (0.001, 1.0))
    assert np.array_equal(slow["d"][0], fast["d"][0])


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 3.4e38])
def test_a_bad_value_voids_the_step_on_all_ranks_and_harms_nothing(bad: float) -> None:
    def work(group: Group) -> None:
        model = Parameters(*SHAPES)
        run = start(model, "demo", group, chunk=CHUNK)
        method = run.method
        for step in range(3):
            model.set_gradients(group.rank, step)
            if step == 1 and group.rank == 1:
                for k in (2, 4):
                    p = model.all[k]
                    assert p.grad is not None
                    p.grad.view(-1)[-1 if k == 4 else slice(None)] = bad
            before = [method.state["momentum"].clone(), *(p.detach().clone() for p in model.all)]
            run.optimizer.step()
            after = [method.state["momentum"], *model.all]
            assert all(bool(x.isfinite().all()) for x in after)
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) == (step == 1)
        assert run.voided == [(1, "all.2")]

    SimWorld[None](3).run(work)
