"""1-bit Adam against its equations in float64, against Adam, and at the freeze."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from rig import start
from sign_reference import is_its_parent_on_one_rank, parameters, server_at_home, trained
from synthetic import F64, gradients
from torch import nn

from commopt.errors import AttachError
from commopt.groups import Group, LocalGroup, SimWorld

LR, B1, B2, EPS, DECAY, FREEZE = 0.01, 0.9, 0.99, 1e-6, 0.02, 10


@dataclass
class Reference:
    """Tang et al. 2021, Algorithm 1, in float64: flat tensors of all parameters, one row per rank for what is local."""

    numels: list[int]
    scale: str
    bias_correction: bool
    x: F64  # (n,) parameters
    m: F64  # (n,) momentum
    v: F64  # (n,) variance
    e: F64  # (N, n) worker residuals
    s: F64  # (n,) server residuals, each where its owner has it
    t: int = 0

    def sign(self, c: F64, spans: list[slice]) -> tuple[F64, F64]:
        """C(c) with one scale per span, and |c| in units of its scale"""
        q, distance = np.empty_like(c), np.empty_like(c)
        for span in spans:
            part = c[span]
            scale = np.abs(part).mean() if self.scale == "l1" else np.sqrt((part**2).mean())
            q[span] = np.where(part >= 0, scale, -scale)
            distance[span] = np.abs(part) / scale if scale else 0.0
        return q, distance

    def step(self, g: F64) -> F64:
        """g: (N, n) local gradients. Returns (n,) how far from a change of sign every compressed quantity was."""
        self.t += 1
        margin = np.full_like(self.x, np.inf)
        if self.t <= FREEZE:
            mean = g.mean(0)
            self.m = B1 * self.m + (1 - B1) * mean
            self.v = B2 * self.v + (1 - B2) * mean**2
        else:
            starts = np.cumsum([0, *self.numels])
            tensors = [slice(a, a + n) for a, n in zip(starts, self.numels, strict=False)]
            chunk = [2048 if self.scale == "l1" else math.ceil(n / (8 * len(g))) * 8 for n in self.numels]
            blocks = [
                slice(a, min(a + size, t.stop))
                for t, size in zip(tensors, chunk, strict=True)
                for a in range(t.start, t.stop, size)
            ]
            q = np.empty_like(g)
            for i, local in enumerate(g):
                c = B1 * self.m + (1 - B1) * local + self.e[i]
                q[i], distance = self.sign(c, blocks if self.scale == "l1" else tensors)
                self.e[i], margin = c - q[i], np.minimum(margin, distance)
            a = q.mean(0) + self.s
            self.m, distance = self.sign(a, blocks)
            self.s, margin = a - self.m, np.minimum(margin, distance)
            self.m[self.v == 0] = 0.0
        root = np.sqrt(self.v)
        m_hat = self.m
        if self.bias_correction:
            root, m_hat = root / np.sqrt(1 - B2 ** min(self.t, FREEZE)), self.m / (1 - B1**self.t)
        self.x = self.x * (1 - LR * DECAY) - LR * m_hat / (root + EPS)
        return margin


KEYS = ("momentum", "variance")
OF_STATE = {"x": "x", "m": "momentum", "v": "variance"}  # where the reference has them


def options(scale: str, bias_correction: bool) -> dict[str, Any]:
    own = {"freeze_step": FREEZE, "scale": scale, "bias_correction": bias_correction}
    return {"lr": LR, "betas": (B1, B2), "eps": EPS, "weight_decay": DECAY, **own}


def train(ranks: int, shapes: list[tuple[int, ...]], steps: int, **given: Any) -> list[list[dict[str, Any]]]:
    return trained(ranks, shapes, steps, "onebit_adam", KEYS, **given)


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("scale", ["l1", "l2"])
def test_every_step_is_the_papers_from_the_state_before_it(scale: str, bias_correction: bool) -> None:
    shapes: list[tuple[int, ...]] = [(50, 90), (7,), (1,), (2049,), (3, 5, 3)]
    numels, ranks = [math.prod(shape) for shape in shapes], 4
    runs = train(ranks, shapes, 50, **options(scale, bias_correction))
    compared = 0
    for step in range(50):
        before, after = [run[step] for run in runs], [run[step + 1] for run in runs]
        copies = {key: before[0][name].copy() for key, name in OF_STATE.items()}
        e = np.stack([state["e"] for state in before])
        reference = Reference(
            numels,
            scale,
            bias_correction,
            e=e,
            s=server_at_home([one["server"] for one in before], numels, scale),
            t=step,
            **copies,
        )
        margin = reference.step(gradients(shapes, ranks, step, mean=0.5, dead=2))
        clear = margin > 1e-5
        compared += int(clear.sum())
        for rank, state in enumerate(after):
            for key, name in OF_STATE.items():
                assert np.array_equal(state[name], after[0][name]), f"{name} differs between ranks in step {step}"
                np.testing.assert_allclose(state[name][clear], getattr(reference, key)[clear], rtol=2e-5, atol=2e-6)
            np.testing.assert_allclose(state["e"][clear], reference.e[rank][clear], rtol=0, atol=1e-5)
        s = server_at_home([one["server"] for one in after], numels, scale)
        np.testing.assert_allclose(s[clear], reference.s[clear], rtol=0, atol=1e-5)
    assert compared > 0.99 * 50 * sum(numels)


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("scale", ["l1", "l2"])
def test_a_short_run_stays_with_the_reference(scale: str, bias_correction: bool) -> None:
    shapes: list[tuple[int, ...]] = [(5,), (3,)]
    runs = train(4, shapes, 50, **options(scale, bias_correction))
    reference = Reference(
        [5, 3], scale, bias_correction, runs[0][0]["x"], np.zeros(8), np.zeros(8), np.zeros((4, 8)), np.zeros(8)
    )
    for step in range(50):
        reference.step(gradients(shapes, 4, step, mean=0.5, dead=2))
    np.testing.assert_allclose(runs[0][-1]["x"], reference.x, rtol=1e-4, atol=1e-5)
    assert float(np.abs(reference.x - runs[0][0]["x"]).max()) > 0.1


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_one_rank_that_never_freezes_is_torchs_adam(weight_decay: float) -> None:
    adam = {"name": "adamw" if weight_decay else "adam", "lr": 0.01, "weight_decay": weight_decay, "foreach": False}
    assert is_its_parent_on_one_rank("onebit_adam", adam, freeze_step=1000)


@pytest.mark.parametrize("scale", ["l1", "l2"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_coordinates_without_variance_at_the_freeze_never_move(ranks: int, scale: str) -> None:
    given = {**options(scale, True), "weight_decay": 0.0}
    runs = train(ranks, [(40,), (7,)], 25, **given)
    first, last = runs[0][0]["x"], runs[0][-1]["x"]
    assert np.array_equal(first[:2], last[:2])
    assert (first[2:] != last[2:]).all()


def test_a_users_mask_stops_the_momentum_after_the_freeze() -> None:
    mask = torch.ones(8, 5)
    mask[4:] = 0.0
    given = {**options("l1", True), "weight_decay": 0.0, "momentum_mask": {"all.0": mask}}
    states = train(2, [(8, 5), (7,)], 25, **given)[0]
    at_freeze, last = states[FREEZE]["x"], states[-1]["x"]
    assert np.array_equal(at_freeze[20:40], last[20:40])
    assert (states[0]["x"][20:40] != at_freeze[20:40]).all()
    assert (at_freeze[2:20] != last[2:20]).all()


def test_a_mask_may_broadcast_and_must_belong_to_a_parameter() -> None:
    model = parameters((8, 5))
    rows = torch.tensor([[1.0]] * 4 + [[0.0]] * 4)
    start(model, "onebit_adam", momentum_mask={"all.0": rows})
    with pytest.raises(AttachError, match=r"momentum_mask: the model has no trainable parameter 'all\.7'"):
        start(parameters((8, 5)), "onebit_adam", momentum_mask={"all.7": rows})
    with pytest.raises(AttachError, match=r"momentum_mask: 'all\.0' is of shape \(8, 5\), its mask of \(3,\)"):
        start(parameters((8, 5)), "onebit_adam", momentum_mask={"all.0": rows[:3, 0]})


def test_update_sizes_do_not_jump_at_the_freeze() -> None:
    """With a constant gradient m and v are biased alike, so that bias correction gives steps of lr before and after."""

    def work(group: Group) -> list[float]:
        model = parameters((64,))
        run = start(model, "onebit_adam", group, lr=0.01, betas=(0.9, 0.999), freeze_step=5)
        sizes = []
        for _ in range(40):
            before = model.all[0].detach().clone()
            model.all[0].grad = torch.full((64,), 0.3)
            run.optimizer.step()
            sizes.append(float((model.all[0].detach() - before).abs().mean()))
        return sizes

    for sizes in SimWorld[Any](2).run(work):
        assert sizes == pytest.approx([0.01] * 40, rel=1e-3)


def auto_freeze_steps(ranks: int, rates: list[float]) -> list[int]:
    """The number of steps that each rank had applied when it froze, under freeze_step="auto" and a window of 10 steps."""

    def work(group: Group) -> int:
        model = parameters((64,))
        run = start(model, "onebit_adam", group, betas=(0.9, 0.9), freeze_step="auto")
        method = run.method
        for step, rate in enumerate(rates):
            run.optimizer.param_groups[0]["lr"] = rate
            noise = torch.randn(64, generator=torch.Generator().manual_seed(1000 * group.rank + step))
            model.all[0].grad = 1.0 + 0.01 * noise
            run.optimizer.step()
            if method.is_frozen:
                assert method.is_steady
                return int(method.applied_steps)
        return -1

    return SimWorld[Any](ranks).run(work)


def test_auto_freezes_all_ranks_after_the_same_step_once_the_variance_has_settled() -> None:
    assert auto_freeze_steps(3, [0.01] * 40) == [11] * 3  # a full window of 10 after the first


def test_auto_does_not_freeze_while_the_learning_rate_rises() -> None:
    rising = [0.001 * step for step in range(1, 26)]
    assert auto_freeze_steps(2, rising) == [-1] * 2
    assert auto_freeze_steps(2, [*rising, 0.025, 0.025]) == [26] * 2


def test_auto_waits_while_the_variance_changes() -> None:
    def work(group: Group) -> bool:
        model = parameters((64,))
        run = start(model, "onebit_adam", group, betas=(0.9, 0.9), freeze_step="auto")
        method = run.method
        for step in range(40):
            model.all[0].grad = torch.full((64,), 1.05**step)
            run.optimizer.step()
        return bool(method.is_frozen)

    assert SimWorld[Any](2).run(work) == [False, False]


def test_each_parameter_group_has_its_own_rate_betas_and_decay() -> None:
    groups: list[dict[str, Any]] = [{"lr": 0.1, "weight_decay": 0.5}, {"lr": 0.001, "betas": (0.5, 0.9)}]
    ours, theirs = parameters((30,), (20,)), parameters((30,), (20,))

    def adam_of(model: nn.Module) -> torch.optim.Optimizer:
        split = [{"params": [p], **group} for p, group in zip(model.parameters(), groups, strict=True)]
        return torch.optim.AdamW(split, weight_decay=0.0, foreach=False)

    run = start(ours, "onebit_adam", LocalGroup(), optimizer=adam_of(ours), freeze_step=100)
    adam = adam_of(theirs)
    for step in range(10):
        ours.set_gradients(0, step)
        theirs.set_gradients(0, step)
        run.optimizer.step()
        adam.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.all, theirs.all, strict=True))
