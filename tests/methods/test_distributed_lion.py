"""Distributed Lion against its equations in float64, against Lion, and where bits hide what a rank has to say."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pool import Pool, twin_of
from rig import start
from synthetic import F64, Parameters, gradients, simulate
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from commopt.errors import CheckpointError
from commopt.groups import Group, LocalGroup, SimWorld, TorchGroup
from commopt.optim import Lion

LR, B1, B2, DECAY = 0.01, 0.8, 0.95, 0.1
SHAPES: list[tuple[int, ...]] = [(50, 90), (7,), (1,), (2049,), (3, 5, 3)]


def reference(x: F64, m: F64, g: F64, vote: str) -> tuple[F64, F64, Any]:
    """Liu et al. 2024, Algorithm 1, in float64. x: (n,), m, g: (N, n). Returns x, m, and (n,) where nothing hangs by a hair."""
    c = B1 * m + (1 - B1) * g
    total = np.sign(c).sum(0)
    direction = total / len(g) if vote == "average" else np.sign(total)
    clear = (np.abs(c) > 1e-6).all(0) & ((total != 0) | (vote == "average"))  # a majority's tie takes a coin
    return x - LR * (direction + DECAY * x), B2 * m + (1 - B2) * g, clear


def train(ranks: int, shapes: list[tuple[int, ...]], steps: int, **given: Any) -> list[list[tuple[F64, F64]]]:
    """[rank][step] parameters and this rank's momentum, before each step and after the last."""
    runs = simulate(ranks, shapes, steps, "distributed_lion", **given)
    return [[(one["x"], one["momentum"]) for one in run] for run in runs]


OPTIONS: dict[str, Any] = {"lr": LR, "betas": (B1, B2), "weight_decay": DECAY}


@pytest.mark.parametrize("vote", ["average", "majority"])
def test_every_step_is_the_papers_from_the_state_before_it(vote: str) -> None:
    runs = train(4, SHAPES, 25, vote=vote, **OPTIONS)
    compared = 0
    for step in range(25):
        m = np.stack([run[step][1] for run in runs])
        x, m, clear = reference(runs[0][step][0], m, gradients(SHAPES, 4, step), vote)
        compared += int(clear.sum())
        for rank, run in enumerate(runs):
            assert np.array_equal(run[step + 1][0], runs[0][step + 1][0])
            np.testing.assert_allclose(run[step + 1][0][clear], x[clear], rtol=0, atol=1e-6)
            np.testing.assert_allclose(run[step + 1][1], m[rank], rtol=1e-5, atol=1e-6)
        moved = runs[0][step + 1][0] - runs[0][step][0] * (1 - LR * DECAY)
        if vote == "majority":  # ties too
            np.testing.assert_allclose(np.abs(moved), LR, rtol=0, atol=1e-6)
    # a tie: 3/8 of all votes where signs are as good as random
    assert compared > (0.55 if vote == "majority" else 0.99) * 25 * runs[0][0][0].size


@pytest.mark.parametrize("ranks", [3, 4])
def test_a_short_run_stays_with_the_reference(ranks: int) -> None:
    vote = "majority" if ranks % 2 else "average"
    shapes: list[tuple[int, ...]] = [(5,), (3,)]
    runs = train(ranks, shapes, 40, vote=vote, **OPTIONS)
    x, m = runs[0][0][0], np.zeros((ranks, 8))
    for step in range(40):
        x, m, _ = reference(x, m, gradients(shapes, ranks, step), vote)
    np.testing.assert_allclose(runs[0][-1][0], x, rtol=0, atol=1e-5)
    assert float(np.abs(x - runs[0][0][0]).max()) > 0.05


def lion_beside(ranks: int, same: bool, **given: Any) -> bool:
    """Whether the parameters equal Lion's bit for bit, where all ranks have the same gradients; some are zero."""
    groups: list[dict[str, Any]] = [{"lr": 0.1, "weight_decay": 0.5}, {"lr": 0.001, "betas": (0.5, 0.9)}]

    def lion_of(model: Parameters) -> Lion:
        return Lion([{"params": [p], **group} for p, group in zip(model.parameters(), groups, strict=True)])

    def work(group: Group) -> bool:
        ours, theirs = Parameters((30, 70), (20,)), Parameters((30, 70), (20,))
        run = start(ours, "distributed_lion", group, optimizer=lion_of(ours), **given)
        lion = lion_of(theirs)
        for step in range(30):
            for model, optimizer in ((ours, run.optimizer), (theirs, lion)):
                model.set_gradients(0, step)
                if not same:
                    assert model.all[0].grad is not None
                    model.all[0].grad[3] = 0.0
                optimizer.step()
        return all(torch.equal(a, b) for a, b in zip(ours.all, theirs.all, strict=True))

    return all(SimWorld[bool](ranks).run(work)) if ranks > 1 else work(LocalGroup())


@pytest.mark.parametrize("vote", ["average", "majority"])
def test_one_rank_is_lion_with_its_zeros(vote: str) -> None:
    assert lion_beside(1, same=False, vote=vote)


@pytest.mark.parametrize("vote", ["average", "majority"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_with_the_same_data_are_lion(ranks: int, vote: str) -> None:
    assert lion_beside(ranks, same=True, vote=vote)


@pytest.mark.parametrize("vote", ["average", "majority"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_an_unused_embedding_row_does_not_drift(ranks: int, vote: str) -> None:
    lr, steps = 0.01, 41

    def work(group: Group) -> Tensor:
        model = nn.Embedding(12, 300)
        with torch.no_grad():
            model.weight.copy_(torch.randn(12, 300, generator=torch.Generator().manual_seed(0)))
        before = model.weight.detach().clone()
        run = start(model, "distributed_lion", group, lr=lr, vote=vote)
        for step in range(steps):
            tokens = torch.randint(0, 6, (16,), generator=torch.Generator().manual_seed(100 * step + group.rank))
            run.optimizer.zero_grad()
            (model(tokens) - 5.0).square().mean().backward()
            run.optimizer.step()
        return model.weight.detach() - before

    for moved in SimWorld[Any](ranks).run(work):
        assert float(moved[6:].abs().max()) <= lr + 1e-5
        assert float(moved[6:].mean().abs()) < 4 * lr / math.sqrt(6 * 300)
        assert float(moved[:6].mean()) > 0.8 * lr * steps


def test_a_nan_on_one_rank_leaves_every_momentum_as_it_was() -> None:
    def work(group: Group) -> tuple[bool, list[Any]]:
        model = Parameters((40, 60), (7,))
        run = start(model, "distributed_lion", group, lr=0.01)
        method = run.method
        for step in range(3):
            model.set_gradients(group.rank, step)
            run.optimizer.step()
        before = [x.clone() for x in (method.state["momentum"], *model.all, method.exchanges)]
        model.set_gradients(group.rank, 3)
        if group.rank == 2:
            assert model.all[1].grad is not None
            model.all[1].grad[3] = math.inf
        run.optimizer.step()
        after = (method.state["momentum"], *model.all, method.exchanges)
        return all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), run.voided

    assert SimWorld[Any](4).run(work) == [(True, [(3, "all.1")])] * 4


def test_max_norm_clips_gradients_by_one_norm_for_all_ranks() -> None:
    def work(group: Group) -> tuple[float, float]:
        model = Parameters((40,), (7,))
        run = start(model, "distributed_lion", group, max_norm=0.5)
        method = run.method
        model.set_gradients(group.rank, 0)
        raw = torch.cat([p.grad.view(-1) for p in model.all if p.grad is not None])
        run.optimizer.step()
        return float(raw.norm()), float(method.state["momentum"].norm())

    both = SimWorld[Any](3).run(work)
    joint = math.sqrt(sum(raw**2 for raw, _ in both) / 3)
    assert joint > 0.5
    for raw, momentum in both:
        assert momentum == pytest.approx(0.01 * raw * 0.5 / joint, rel=1e-4)


@pytest.mark.parametrize("vote", ["average", "majority"])
@pytest.mark.parametrize("ranks", [2, 4, 5])
def test_it_sends_what_it_says(ranks: int, vote: str) -> None:
    def work(group: Group) -> tuple[float, float]:
        model = Parameters((512, 512))
        run = start(model, "distributed_lion", group, vote=vote)
        method = run.method
        at_attach = group.traffic.payload_bytes
        for step in range(2):
            model.set_gradients(group.rank, step)
            run.optimizer.step()
        return (group.traffic.payload_bytes - at_attach) / 2 / 512**2, method.bytes_per_parameter(ranks)

    both = SimWorld[Any](ranks).run(work)
    down = 1 if vote == "majority" else math.ceil(math.log2(ranks + 1))
    assert both[0][1] == (ranks - 1) / ranks * (1 + down) / 8
    assert sum(sent for sent, _ in both) / ranks == pytest.approx(both[0][1], rel=0.02)


# --- checkpoints


def test_momentum_is_each_ranks_own_and_not_in_the_optimizers_state() -> None:
    def work(group: Group) -> tuple[Tensor, bool]:
        model = Parameters((40, 60))
        run = start(model, "distributed_lion", group)
        method = run.method
        model.set_gradients(group.rank, 0)
        run.optimizer.step()
        state = copy.deepcopy(method.saved())
        other = copy.deepcopy(run.optimizer.state_dict())
        own = method.state["momentum"].clone()
        method.state["momentum"].zero_()
        method.load(state)
        run.optimizer.load_state_dict(other)  # last, and the same on all ranks
        assert not any(isinstance(x, Tensor) for entry in other["state"].values() for x in entry.values())
        return own, torch.equal(method.state["momentum"], own)

    results = SimWorld[Any](3).run(work)
    assert all(is_kept for _, is_kept in results)
    assert not torch.equal(results[0][0], results[1][0])


class EarlyBias(nn.Module):
    """A layer, and a parameter that no rank uses after a while."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.layers = (
            nn.Parameter(torch.ones(5)),
            nn.Sequential(nn.Linear(21, 40), nn.Tanh(), nn.Linear(40, 3)),
        )
        self.is_early = True
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y + self.early.sum() if self.is_early else y


def attached(pg: Any, wrapper: str, vote: str) -> tuple[EarlyBias, nn.Module, Any]:
    model = EarlyBias()
    wrapped: nn.Module = model
    group = pg
    if wrapper == "ddp":
        wrapped, group = DistributedDataParallel(model, process_group=pg, find_unused_parameters=True), twin_of(pg)
    return model, wrapped, start(wrapped, "distributed_lion", TorchGroup(group), lr=0.003, vote=vote)


def train_on(made: tuple[EarlyBias, nn.Module, Any], first: int, last: int) -> None:
    model, wrapped, run = made
    for step in range(first, last):
        model.is_early = step < 2
        x = torch.randn(8, 21, generator=torch.Generator().manual_seed(100 * step + run.group.rank))
        run.optimizer.zero_grad()
        (wrapped(x) - x[:, :3]).square().mean().backward()
        run.optimizer.step()


def of_early(method: Any) -> list[Tensor]:
    k = method.index.position["early"]
    views = method.parameters["early"].detach(), method.part("momentum", "early"), method.exchanges[k]
    return [x.clone() for x in views]


def resumed(pg: Any, folder: str, wrapper: str, vote: str) -> tuple[bool, Tensor]:
    made = attached(pg, wrapper, vote)
    method = made[2].method
    train_on(made, 0, 2)
    early = of_early(method)
    train_on(made, 2, 5)
    made[2].save(folder)
    saved = method.state["momentum"].clone()
    train_on(made, 5, 10)
    again = attached(pg, wrapper, vote)
    other = again[2].method
    again[2].load(folder)
    assert torch.equal(other.state["momentum"], saved)
    train_on(again, 5, 10)
    pairs = [
        *zip(made[0].parameters(), again[0].parameters(), strict=True),
        (method.state["momentum"], other.state["momentum"]),
    ]
    pairs += [(method.exchanges, other.exchanges), *zip(early, of_early(method), strict=True)]
    made[2].close()
    again[2].close()
    return all(torch.equal(a, b) for a, b in pairs), saved


@pytest.mark.parametrize(("wrapper", "ranks", "vote"), [("plain", 5, "majority"), ("ddp", 3, "average")])
def test_every_rank_resumes_bit_for_bit_with_its_own_momentum(
    pool: Pool, tmp_path: Path, wrapper: str, ranks: int, vote: str
) -> None:
    """So do parameters that no rank uses any longer, as they were; with five ranks, one then serves no block."""
    results = pool.run(ranks, resumed, str(tmp_path / "c"), wrapper, vote)
    assert all(is_same for is_same, _ in results)
    assert not torch.equal(results[0][1], results[1][1])


def loaded(pg: Any, folder: str) -> Tensor:
    _, _, run = attached(pg, "plain", "average")
    run.load(folder)
    momentum: Tensor = run.method.state["momentum"].clone()
    run.close()
    return momentum


def test_at_another_number_of_ranks_every_rank_takes_the_mean_momentum(pool: Pool, tmp_path: Path) -> None:
    saved = [momentum for _, momentum in pool.run(3, resumed, str(tmp_path / "c"), "plain", "average")]
    for momentum in pool.run(2, loaded, str(tmp_path / "c")):
        torch.testing.assert_close(momentum, torch.stack(saved).mean(0), rtol=1e-6, atol=1e-9)


def test_a_state_without_momentum_is_refused() -> None:
    model = Parameters((4,))
    run = start(model, "distributed_lion", LocalGroup())
    method = run.method
    state = copy.deepcopy(method.saved())
    del state["rank"]["momentum"]
    with pytest.raises(CheckpointError, match="momentum: expected a tensor of shape"):
        method.load(state)


# --- options
