"""DeMo against its equations in float64, sizes that nothing divides, ties, and what is each rank's own."""

from __future__ import annotations

import copy
import itertools
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from pretend import DEVICES, working_on
from rig import start
from synthetic import (
    F64,
    Parameters,
    Shapes,
    check_free_run,
    check_steps,
    exchange,
    gradients,
    simulate,
    spans,
    stacked,
)
from torch import Tensor

from commopt import build
from commopt.compress.indices import decode_all
from commopt.groups import Group, LocalGroup, SimWorld
from commopt.methods.demo import grids
from commopt.wire.bucket import Bucket

LR, BETA, DECAY, CHUNK, K = 0.01, 0.9, 0.1, 16, 6
SHAPES: list[tuple[int, ...]] = [(50, 33), (32, 48), (7,), (1,), (129,), (6, 5, 3, 3), (1, 40)]


def pieces(n: int) -> list[list[slice]]:
    """As few runs of at most CHUNK as n takes, of lengths that differ by one: those of the longer, and of the shorter length."""
    runs = [slice(int(part[0]), int(part[-1]) + 1) for part in np.array_split(np.arange(n), math.ceil(n / CHUNK))]
    return [list(same) for _, same in itertools.groupby(runs, lambda run: run.stop - run.start)]


def chunks(shape: tuple[int, ...]) -> list[tuple[slice, slice]]:
    """Rows and columns of each chunk of a matrix, or of a vector as one row, in the order of the coefficients."""
    whole = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, *shape)
    halves = itertools.product(*(pieces(n) for n in whole))
    return [chunk for rows, columns in halves for chunk in itertools.product(rows, columns)]


def dct(n: int) -> F64:
    i = np.arange(n)
    rows = np.cos(np.pi * (2 * i[None] + 1) * i[:, None] / (2 * n)) * math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    return rows


def transformed(x: F64, shapes: Shapes, *, inverse: bool = False) -> F64:
    """(n,) the coefficients of flat parameters, chunk after chunk, or the parameters of coefficients."""
    out = np.zeros_like(x)
    for shape, span in zip(shapes, spans(shapes), strict=True):
        there, begin = (out if inverse else x)[span].reshape(shape[0] if len(shape) > 1 else 1, -1), span.start
        for rows, columns in chunks(shape):
            part = there[rows, columns]
            left, right = (dct(n) for n in part.shape)
            ours = slice(begin, begin := begin + part.size)
            if inverse:
                part[:] = left.T @ x[ours].reshape(part.shape) @ right
            else:
                out[ours] = (left @ part @ right.T).ravel()
    return out


def largest_of(d: F64, shapes: Shapes) -> tuple[F64, F64]:
    """The K largest coefficients of each chunk, and how far the choice was from being another."""
    q, margin, begin = d.copy(), np.full_like(d, np.inf), 0
    for rows, columns in itertools.chain.from_iterable(map(chunks, shapes)):
        ours = slice(begin, begin := begin + (rows.stop - rows.start) * (columns.stop - columns.start))
        order = np.sort(np.abs(d[ours]))[::-1]
        if len(order) > K:
            q[ours][np.abs(d[ours]) < order[K - 1]] = 0.0
            margin[ours] = (order[K - 1] - order[K]) / order[K - 1]
    return q, margin


def reference(shapes: Shapes, step: int, before: list[dict[str, F64]]) -> Any:
    """Peng et al. 2024, Algorithm 1, with a sign, in float64, and (n,) where neither choice nor sign is in doubt."""
    x, g = before[0]["x"], gradients(shapes, len(before), step)
    d = BETA * stacked(before, "momentum") + np.stack([transformed(one, shapes) for one in g])
    q, margin = (np.stack(rows) for rows in zip(*(largest_of(one, shapes) for one in d), strict=True))
    mean, clear = transformed(q.mean(0), shapes, inverse=True), np.empty(x.size, dtype=bool)
    for span in spans(shapes):
        clear[span] = (np.abs(mean[span]) > 1e-5 * np.abs(mean[span]).max()) & (margin[:, span].min() > 1e-5)
    return {"x": x - LR * (np.sign(mean) + DECAY * x), "momentum": d - q}, clear


def train(ranks: int, shapes: Shapes, steps: int, **options: Any) -> list[list[dict[str, F64]]]:
    own = {"lr": LR, "momentum_decay": BETA, "weight_decay": DECAY, "chunk": CHUNK, "top_k": K, "value_bits": 32}
    return simulate(ranks, shapes, steps, "demo", **{**own, **options})


def test_every_step_is_the_papers_from_the_state_before_it() -> None:
    check_steps(train(4, SHAPES, 12), partial(reference, SHAPES))


def test_a_short_run_stays_with_the_reference() -> None:
    check_free_run(train(4, [(20, 30)], 25), partial(reference, [(20, 30)]), 25, share=0.99)


def test_what_16_bits_leave_out_stays_in_the_momentum() -> None:
    exact, rounded = (train(3, [(40, 40)], 1, value_bits=bits)[1][-1]["momentum"] for bits in (32, 16))
    sent = transformed(gradients([(40, 40)], 3, 0)[1], [(40, 40)]) - exact
    left = rounded - exact  # q in float32 - q in bfloat16
    assert 0 < float(np.abs(left).max()) < 2.0**-7 * float(np.abs(sent).max())
    assert float(np.linalg.norm(left)) < 2.0**-8 * float(np.linalg.norm(sent))


@pytest.mark.parametrize("shape", [(1, 1), (1, 173), (65, 64), (63, 200), (129, 1), (0, 5)])
def test_chunks_cover_every_element_once_and_are_at_most_so_large(shape: tuple[int, int]) -> None:
    seen = torch.zeros(shape)
    for grid in grids(shape, 64):
        assert max(grid.height, grid.width) <= 64
        grid._part(seen).add_(1)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        back = torch.zeros(shape)
        grid.put_(grid.inverse(grid.forward(x)), back)
        torch.testing.assert_close(grid._part(back), grid._part(x))
    assert bool((seen == 1).all())
    sizes = {(grid.height, grid.width) for grid in grids(shape, 64)}
    assert all(max(axis) - min(axis) <= 1 for axis in zip(*sizes, strict=True))


@pytest.mark.parametrize(("top_k", "places"), [(3, [1, 2, 4, 0, 1, 2, 3, 4, 5]), (9, [*range(6)] * 3)])
def test_of_equal_coefficients_the_first_are_sent(top_k: int, places: list[int]) -> None:
    rows = [[1.0, -2.0, 2.0, 0.0, -2.0, 2.0], [0.0, -0.0, 0.0, 0.0, 0.0, 0.0], [3.0, 1.0, 2.0, 6.0, 5.0, 4.0]]
    named = [(f"p{k}", torch.tensor(row)) for k, row in enumerate(rows)]
    method: Any = build("demo", chunk=6, top_k=top_k)
    method.bind(named, LocalGroup())
    blocks, counts = method._chunks_of(Bucket.of(named))
    header, values, codes = method._largest(Bucket.of(named), blocks, counts).tensors
    indices = decode_all(codes, blocks.lengths, counts)
    assert header.tolist() == [-1]
    assert indices.tolist() == places
    assert values.tolist() == [rows[k // min(top_k, 6)][place] for k, place in enumerate(places)]


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


def test_one_rank_selects_as_well() -> None:
    check_steps(train(1, [(40, 40)], 3), partial(reference, [(40, 40)]))


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
    assert np.array_equal(slow["momentum"], fast["momentum"])


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{"chunk": 16, "top_k": 6}, {"chunk": 70, "top_k": 60}], ids=["small", "large"])
def test_kernels_do_what_the_cpu_does(options: dict[str, int], device: torch.device) -> None:
    """Chunks as large as the second ones are transformed by torch."""
    shapes = {"a": (17, 18), "b": (7,), "c": (70, 5)}

    def work(group: Group, place: torch.device) -> list[tuple[Tensor, Tensor, str | None]]:
        found = []
        with working_on(place):
            method: Any = build("demo", value_bits=32, **options)
            method.bind([(name, torch.zeros(shape, device=place)) for name, shape in shapes.items()], group)
            for step in range(3):
                generator = torch.Generator().manual_seed(10 * group.rank + step)
                grads = [(name, torch.randn(shape, generator=generator)) for name, shape in shapes.items()]
                if (step, group.rank) == (1, 1):
                    grads[1][1][3] = math.nan
                bucket = exchange(method, Bucket.of([(name, g.to(place)) for name, g in grads[::-1]]), group)
                found.append((bucket.flat.cpu().clone(), method.state["momentum"].cpu().clone(), bucket.void))
        return found

    ranks = SimWorld[Any](2).run(partial(work, place=device))
    expected = SimWorld[Any](2).run(partial(work, place=torch.device("cpu")))
    for rank, own in enumerate(ranks):
        assert [void for *_, void in own] == [None, "b", None]
        for (signs, momentum, void), (cpu_signs, cpu_momentum, _) in zip(own, expected[rank], strict=True):
            torch.testing.assert_close(momentum, cpu_momentum, rtol=1e-4, atol=1e-4)
            assert void is not None or float((signs != cpu_signs).float().mean()) < 0.005
        assert all(torch.equal(one[0], first[0]) for one, first in zip(own, ranks[0], strict=True) if one[2] is None)
