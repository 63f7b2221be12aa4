"""Decentralized Adam against its published update in float64, on every topology, and with members that are gone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from outer_rig import after_round, bound, gradient, run_world, spread
from rig import flat, make_model, normal, train_step
from torch import Tensor

from commopt import attach, build
from commopt.errors import ConfigError
from commopt.gossip.topology import make_topology, mixing_matrix
from commopt.groups import SimGroup, SimWorld
from commopt.wire.payload import Payload

CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *(({"topology": name}, {}) for name in ("complete", "ring", "one_peer_exp")),
    ({"topology": "alternating_exp_ring", "slots": 2}, {}),
    ({"topology": "ring", "delay": 0}, {"is_mixed_first": True}),
    ({"topology": "complete", "adaptive_factor": 0.3}, {"a": 0.3}),
]
LR, BETAS, EPS = 0.01, (0.9, 0.999), 1e-4


def reference(
    ranks: int, topology: str, slots: int, steps: int, *, a: float = 1.0, is_mixed_first: bool = False
) -> Tensor:
    """(ranks, P) f64: x_i(t+1) = sum_j W_ij(t) x_j(t) - lr Adam(g_i(x_i(t))), W(t) of the round after step t; W(0) = 1.

    a: W is mixed with 1 - a of the identity. is_mixed_first: the gradient is taken at the mixed x instead.
    """
    rounds, (b1, b2) = make_topology(topology, ranks, slots), BETAS
    models = [make_model(torch.float64) for _ in range(ranks)]
    x = torch.stack([flat(model) for model in models])
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for t in range(steps):
        mixing = torch.eye(ranks, dtype=torch.float64)
        if t > 0:
            mixing = (1 - a) * mixing + a * torch.from_numpy(mixing_matrix(rounds[(t - 1) % len(rounds)], ranks))
        mixed = mixing @ x
        g = torch.stack([gradient(models[i], (mixed if is_mixed_first else x)[i], i, t) for i in range(ranks)])
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        step = m / (1 - b1 ** (t + 1)) / ((v / (1 - b2 ** (t + 1))).sqrt() + EPS)
        x = mixed - LR * step
    return x


def train(group: SimGroup, options: dict[str, Any], steps: int) -> Tensor:
    """The parameters right after the last step: its round has begun, and is not applied."""
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, betas=BETAS, eps=EPS)
    kept: list[Tensor] = []
    if options.get("delay") == 0:
        optimizer.register_step_post_hook(lambda *_: kept.append(flat(model)))  # before attach: before the round
    run: Any = attach(model, build("decentralized_adam", **options), optimizer, group=group)
    for step in run.range(steps):
        train_step(model, optimizer, group.rank, step)
    kept = kept or [flat(model)]
    run.finish()
    return kept[-1]


@pytest.mark.parametrize(("options", "how"), CASES, ids=str)
def test_update_is_the_published_one(options: dict[str, Any], how: dict[str, Any]) -> None:
    """Without delay the gradient is taken at the mixed parameters; an adaptive factor mixes with the identity."""
    steps = 12 if how else 20
    trained = SimWorld[Tensor](4).run(lambda group: train(group, options, steps))
    expected = reference(4, options["topology"], options.get("slots", 1), steps, **how)
    torch.testing.assert_close(torch.stack(trained).double(), expected, rtol=0, atol=2e-5)
    assert how or spread(trained) > 1e-3  # replicas differ: this is no all-reduce


def still(group: SimGroup, options: dict[str, Any], rounds: int) -> tuple[Tensor, Tensor]:
    """Replicas that differ and do not learn: (before, after) the rounds."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    run: Any = attach(model, build("decentralized_adam", **options), optimizer, group=group)
    run.join()
    generator = torch.Generator().manual_seed(group.rank)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator)
        p.grad = torch.zeros_like(p)
    before = flat(model)
    for _ in run.range(rounds):
        optimizer.step()
    run.finish()
    return before, flat(model)


@pytest.mark.parametrize(
    ("options", "rounds"),
    [
        ({"topology": "one_peer_exp"}, 3),
        ({"topology": "one_peer_exp", "delay": 0, "every": 2}, 6),
        ({"topology": "alternating_exp_ring", "slots": 2}, 4),
        ({"topology": "complete"}, 1),
    ],
    ids=str,
)
def test_eight_ranks_that_do_not_learn_reach_consensus_exactly(options: dict[str, Any], rounds: int) -> None:
    results = SimWorld[tuple[Tensor, Tensor]](8).run(lambda group: still(group, options, rounds))
    mean = torch.stack([before for before, _ in results]).double().mean(0)
    for _, after in results:
        torch.testing.assert_close(after.double(), mean, rtol=0, atol=1e-6)
        assert options["topology"] != "complete" or torch.equal(after, results[0][1])  # members of one edge
    assert spread([before for before, _ in results]) > 0.5


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("decentralized_adam", {"topology": topology}) for topology in ("complete", "ring")),
        *(("push_sum", {"delay": delay}) for delay in (0, 1)),
    ],
)
def test_others_train_on_when_a_member_dies(name: str, options: dict[str, Any]) -> None:
    faults = [{"at_step": 10, "kill": 2}]
    _, diaries = run_world(4, name, {"timeout_s": 2.0, **options}, 40, faults=faults, step_s=0.1)
    for rank in (0, 1, 3):
        assert diaries[rank].attached.steps == 40
        late = [report for report in diaries[rank].reports if report.step > 30]
        assert all(2 not in report.members for report in late)
        assert any(len(report.members) > 1 for report in late)
        assert sum(report.exchange_s for report in late) < 0.5  # who is known to be down is not waited for
    assert spread([diaries[rank].attached.flat() for rank in (0, 1, 3)]) < 0.1


def test_the_share_of_a_missing_member_stays_with_oneself() -> None:
    def one_round(group: SimGroup) -> tuple[Tensor, Tensor, bool] | None:
        if group.rank == 3:
            return None
        method = bound("decentralized_adam", group, 50, topology="complete", timeout_s=1.0)
        x = normal(50, group.rank)
        new, exchanged = after_round(method, x, 0)
        assert exchanged.members == (0, 1, 2)
        return x, new, exchanged.is_missed

    results: Any = SimWorld[Any](4).run(one_round)[:3]
    x = torch.stack([one for one, _, _ in results]).double()
    for rank, (own, new, is_missed) in enumerate(results):
        others = x.sum(0) - x[rank]
        torch.testing.assert_close(new.double(), own.double() / 2 + others / 4, rtol=1e-6, atol=1e-6)
        assert is_missed


def members_and_new(number: int, sent: int, x: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """Rank 0's members and new zeros in round `number`, for which rank 1 has sent this x under the number `sent`."""

    def one_round(group: SimGroup) -> Any:
        method = bound("decentralized_adam", group, 5, timeout_s=1.0)
        if group.rank == 1:
            return group.peers.send(0, method.name, sent, Payload.of(x))
        group.peers.sleep(0.5)
        new, exchanged = after_round(method, torch.zeros(5), number)
        return exchanged.members, new

    members, new = SimWorld[Any](2).run(one_round)[0]
    return members, new


@pytest.mark.parametrize(("sent", "is_used"), [(3, False), (4, True), (5, True)])
def test_a_message_of_a_later_round_is_used_and_of_an_earlier_one_is_not(sent: int, is_used: bool) -> None:
    assert members_and_new(4, sent, torch.ones(5))[0] == ((0, 1) if is_used else (0,))


@pytest.mark.parametrize("bad", [[float("nan")] * 5, [1.0] * 4])
def test_a_message_with_a_nan_or_of_another_size_is_left_out(bad: list[float]) -> None:
    members, new = members_and_new(0, 0, torch.tensor(bad))
    assert members == (0,)
    assert new.eq(0).all()


@pytest.mark.parametrize("message", ["int8", "sign", {"compressor": "top_k", "density": 0.1}])
def test_compressed_messages_pull_replicas_together_and_keep_their_mean(message: Any) -> None:
    options = {"topology": "one_peer_exp", "message": message, "delay": 0}
    replicas = SimWorld[tuple[Tensor, Tensor]](4).run(lambda group: still(group, options, 150))
    start, end = (torch.stack(x) for x in zip(*replicas, strict=True))
    assert spread(list(end - start.mean(0) + 1)) < 0.2 * spread(list(start - start.mean(0) + 1))
    torch.testing.assert_close(end.double().mean(0), start.double().mean(0), rtol=0, atol=1e-5)


def test_a_world_that_the_topology_cannot_serve_is_refused_at_attach() -> None:
    with pytest.raises(ConfigError, match="one_peer_exp works with 2, 4, 8"):
        run_world(6, "decentralized_adam", {}, 1)
