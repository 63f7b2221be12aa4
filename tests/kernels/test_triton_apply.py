"""The fused steps of parameters are those of plain torch, bit for bit, in triton's interpreter where there is no GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rig import start
from synthetic import parameters
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: pip install triton")
if torch.cuda.is_available():
    pytest.skip("on the CPU kernels run in triton's interpreter, which is off", allow_module_level=True)

from commopt import kernels
from commopt.groups import Group, SimWorld
from commopt.kernels.cuda import apply, headers, signs, votes
from commopt.kernels.cuda.pieces import Messages
from commopt.kernels.reference import apply as plain
from commopt.kernels.reference.apply import Move, Root
from commopt.wire import noise
from commopt.wire.bucket import ParameterIndex
from commopt.wire.payload import in_a_row
from commopt.wire.residual import Blended

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, at NaN and inf
SHAPES = {"a": (3, 5), "b": (4100,), "c": (), "d": (0,), "e": (64, 64), "f": (8, 3, 2)}
INDEX = ParameterIndex(tuple(SHAPES), tuple(torch.Size(shape).numel() for shape in SHAPES.values()))
ROOT = Root(0.97, 1e-8, 0.4)


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)) and torch.equal(one.isnan(), other.isnan())


def values(seed: int) -> Tensor:
    """Of every parameter, among them NaN, inf, denormals and zeros."""
    x = torch.randn(INDEX.total, generator=torch.Generator().manual_seed(seed)) ** 3
    x[seed + 20 : seed + 27] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-41, -1e-41, 0.0, -0.0])
    return x


def squares(seed: int) -> Tensor:
    """Of numbers of 8 bits: torch's root on a CPU is exact there, and otherwise to the last bit but one."""
    return values(seed).bfloat16().float() ** 2


def drawn(dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters; two are not contiguous, and one begins at an odd place."""
    found = {name: INDEX.view(values(1), name).view(shape).to(dtype) for name, shape in SHAPES.items()}
    found["e"], found["a"] = (found[name].t().contiguous().t() for name in ("e", "a"))
    found["b"] = torch.zeros(4101, dtype=dtype)[1:].copy_(found["b"])
    return found


MOVES = {
    "plain": (Move(Root(1.0, 1e-8), 0.01), False, False),
    "bounded and decayed": (Move(ROOT, 0.01, 0.99), False, False),
    "decay is rounded": (Move(ROOT, 0.01, 0.987, rounds=True), False, False),
    "from elsewhere": (Move(ROOT, 0.01, 0.99), True, False),
    "with a mean": (Move(ROOT, 0.01, 0.99, 0.3), False, True),
    "with a mean of little": (Move(ROOT, 0.01, 1.0, 0.9), False, True),
    "with a first mean": (Move(ROOT, 0.01, 0.99, 1.0), False, True),
}

# the interpreter truncates to bfloat16; a GPU decays float64 in float32
NEAR = {torch.bfloat16: 2**-6, torch.float64: 1e-5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", MOVES)
def test_parameters_move_as_in_plain_torch(case: str, dtype: torch.dtype) -> None:
    how, has_start, has_mean = MOVES[case]
    results = []
    for kernel in (plain, apply):
        ps, m, v, begin, mean = drawn(dtype), values(2), squares(3), values(4), values(5)
        kernel.move_(ps, INDEX, m, v, how, begin if has_start else None, mean if has_mean else None)
        results.append((torch.cat([p.reshape(-1) for p in ps.values()]), mean, m, v, begin))
    (moved, mean, *others), (found, found_mean, *found_others) = results
    if dtype in NEAR:
        torch.testing.assert_close(moved, found, rtol=NEAR[dtype], atol=0.1 * NEAR[dtype], equal_nan=True)
    else:
        assert same(moved, found)
    assert all(map(same, others, found_others))
    torch.testing.assert_close(mean, found_mean, rtol=1e-6, atol=1e-5, equal_nan=True)
    assert same(mean, values(5)) != has_mean
    assert not same(moved, torch.cat([p.reshape(-1) for p in drawn(dtype).values()]))


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_state_is_blended_into_a_bucket(weight: float) -> None:
    """In another order than the state has, and with something between its parameters."""
    numels = dict(zip(INDEX.names, INDEX.numels, strict=True))
    names, starts, end = ("e", "b", "a"), [], 3
    for name in names:
        starts.append(end)
        end += numels[name] + 5
    places = INDEX.places(names, tuple(starts))
    x, y = values(6), values(7)[:end]
    found, expected = y.clone(), y.clone()
    plain.blend_(x, y, expected, places, weight)
    apply.blend_(x, found, found, places, weight)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5, equal_nan=True)
    assert same(found[:3], y[:3])
    b, at = INDEX.view(x, "b"), slice(starts[1], starts[1] + numels["b"])
    exact = b.double() + weight * (y[at].double() - b)
    torch.testing.assert_close(found[at][exact.isfinite()].double(), exact[exact.isfinite()], rtol=1e-4, atol=1e-5)


def lamb(group: Group, steps: int, decay: float, is_fused: bool) -> dict[str, Tensor]:
    """Parameters and numbers after some steps of 1-bit LAMB, of which the first three are its warm-up."""
    model = parameters((70, 60), (7,), (0,), (5, 3, 2), (9,))
    with torch.no_grad():
        model.all[4].zero_()  # its ratio is 1 in the first step
    mask = {"all.0": (torch.arange(60) % 3 > 0).float(), "all.1": torch.zeros(7)}
    options: dict[str, Any] = {
        "lr": 0.02,
        "betas": (0.9, 0.95),
        "weight_decay": decay,
        "freeze_step": 3,
        "bias_correction": True,
    }
    run = start(model, "onebit_lamb", group, momentum_mask=mask, factor_threshold=0.9, max_ratio=0.5, **options)
    if is_fused:
        run.method.update = run.method._update_alike
    for step in range(steps):
        model.set_gradients(group.rank, step)
        run.optimizer.step()
    numbers = {key: run.method.state[key] for key in ("coeff", "coeffs", "factor")}
    return {f"all.{k}": p.detach().clone() for k, p in enumerate(model.all)} | numbers


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("steps", [1, 3, 4, 6])
def test_lamb_is_that_of_plain_torch(steps: int, decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = SimWorld[Any](2).run(lambda group: lamb(group, steps, decay, False))[0]
    of = kernels.of
    both = SimpleNamespace(**{**vars(plain), **vars(apply)})
    monkeypatch.setattr(kernels, "of", lambda name, device: both if name == "apply" else of(name, device))
    found = SimWorld[Any](2).run(lambda group: lamb(group, steps, decay, True))[0]
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)
    assert bool((found["factor"] != 1).any()) == (steps > 3)
    assert found["coeffs"].tolist()[:3] == [min(steps, 3), min(steps, 3), 0]


def test_a_vote_is_on_what_is_blended_while_it_is_packed_and_its_result_is_written_twice() -> None:
    names, starts = ("e", "b", "a"), (0, 4096, 8200)
    places = INDEX.places(names, starts).having(words=noise.words(0, "test", 0, np.zeros(1, np.int64)))
    momentum, x = values(8), values(9)[:8215]
    momentum[60:90] = x[4096 + 45 : 4096 + 75] = 0.0  # of "b": coins decide
    blended = torch.zeros_like(x)
    ballots = in_a_row([((torch.int32, 1), (torch.uint8, places.sign_bytes))] * 2, x.device)
    apply.blend_(momentum, x, blended, places, 0.1)
    firsts = [headers.noted_in([ballot]) for ballot in ballots]
    votes.pack_all_(blended, ballots[:1], [places], np.zeros(1, np.int64), firsts[0])
    votes.pack_all_(x, ballots[1:], [places], np.zeros(1, np.int64), firsts[1], (momentum, 0.1))
    assert torch.equal(ballots[0].tensors[1], ballots[1].tensors[1])
    assert len(set(ballots[0].tensors[1].tolist())) > 100
    assert torch.equal(*firsts)
    answers = in_a_row([((torch.uint8, places.sign_bytes),)], x.device)
    answers[0].tensors[0].copy_(ballots[0].tensors[1])
    out, also = torch.zeros_like(x), torch.zeros_like(x)
    votes.unpack_all_(answers, [places], 1, torch.tensor([-1.0, 1.0]), out, also)
    assert torch.equal(out, also)
    is_clear = (blended != 0) & blended.isfinite()
    assert torch.equal(out[is_clear], blended[is_clear].sign())


@pytest.mark.parametrize("squared", [False, True], ids=["mean", "root mean square"])
@pytest.mark.parametrize("weights", [(0.1,), (0.1, 0.7)], ids=["one state", "two states"])
def test_signs_are_of_what_is_blended_while_they_are_packed_and_their_values_are_written_twice(
    weights: tuple[float, ...], squared: bool
) -> None:
    places = INDEX.places(("e", "b", "a"), (0, 4096, 8200))  # longer than a piece, so that scales are sums of several
    states = [(values(8 + k), weight) for k, weight in enumerate(weights)]
    x, residual = values(1)[:8215], values(30).nan_to_num(1.0, 1.0, 1.0)
    blended, left, found = x.clone(), residual.clone(), []
    for state, weight in states:
        plain.blend_(state, blended, blended, places, weight)
    kept = Blended(residual, states=tuple(states))
    for y, e in ((blended, left), (x, kept)):
        first, message = (
            torch.zeros(1, dtype=torch.int32),
            Messages([places], torch.zeros(3), torch.zeros(places.sign_bytes, dtype=torch.uint8)),
        )
        signs.compress_all_(y, e, message, first, squared=squared)
        found.append((message.codes, message.scales, first))
    assert all(map(same, *found))
    assert same(left, residual)
    assert found[0][1].isfinite().tolist() == [False, False, True]
    out, also = torch.full((8215,), 3.0), torch.full((INDEX.total,), 3.0)
    signs.decompress_all_(message, out, alpha=1.0, add=False, also=also)
    for name, at in (("e", 0), ("b", 4096), ("a", 8200)):
        assert same(INDEX.view(also, name), out[at : at + INDEX.size(name)])
    assert set(INDEX.view(also, "f").tolist()) == {3.0}
