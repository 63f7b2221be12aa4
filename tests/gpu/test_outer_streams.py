"""Rounds of outer methods on pretended streams: what is copied, when the host waits, and that nothing is out of order."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pretend import DEVICE, working_on
from rig import loss_of, make_batch, make_model, sgd_of
from streams import Streams, pretended
from torch import Tensor

from commopt import attach, build
from commopt.frameworks import lane
from commopt.gossip import messages
from commopt.groups import SimGroup, SimWorld
from commopt.methods import METHODS

STEPS, DELAY = 16, 2
EVERY: dict[str, Any] = {"every": 6, "delay": DELAY}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, EVERY) for name, method in METHODS.items() if method.kind == "outer"},
    "fragments": ("diloco", {**EVERY, "every": 12, "fragments": 3}),
    "compressed": ("noloco", {**EVERY, "message": "int8"}),
    "copies": ("decentralized_adam", {**EVERY, "message": "int8"}),
    "averaged state": ("local_sgd", {**EVERY, "average_state": ["momentum_buffer"]}),
}


@dataclass
class Trained:
    run: Any
    x: Tensor  # the parameters at the end
    noted: list[Counter[str]]  # of each optimizer step


def train(
    group: SimGroup, case: str, device: torch.device, streams: Streams | None, per_machine: int = 1, **more: Any
) -> Trained:
    """Some steps; jobs in the background run when they are waited for, as late as they can."""
    name, options = CASES[case]
    world: Any = group if per_machine == 1 else group.by_machine(per_machine)
    noted = list[Counter[str]]()
    with working_on(device):
        model = make_model().to(device)
        optimizer = sgd_of(model, momentum=0.9)
        run: Any = attach(model, build(name, **{**options, **more}), optimizer, group=world, max_norm=1.0)
        run.peers.start = functools.cache
        for step in run.range(STEPS):
            x, y = (t.to(device) for t in make_batch(run.rank, step))
            optimizer.zero_grad()
            loss_of(model(x), y).backward()
            before = Counter() if streams is None else Counter(streams.noted)
            optimizer.step()
            noted.append(Counter() if streams is None else Counter(streams.noted) - before)
        run.finish()
        return Trained(run, run.flat(), noted)


def train_all(case: str, ranks: int = 2, **more: Any) -> tuple[list[Trained], list[str]]:
    """What all ranks have trained, and what the sanitizer has found."""
    with pretended(lane) as streams:
        trained = SimWorld[Trained](ranks, timeout_s=60).run(lambda group: train(group, case, DEVICE, streams, **more))
    return trained, streams.errors


def train_on_cpu(case: str, ranks: int = 2, **more: Any) -> list[Trained]:
    cpu = torch.device("cpu")
    return SimWorld[Trained](ranks, timeout_s=60).run(lambda group: train(group, case, cpu, None, **more))


@pytest.mark.parametrize("case", CASES)
def test_a_round_takes_one_copy_each_way_and_no_other_step_waits_for_the_device(case: str) -> None:
    ranks, errors = train_all(case)
    assert errors == []
    for one, other in zip(ranks, train_on_cpu(case), strict=True):
        assert torch.equal(one.x, other.x)
        assert [report.members for report in one.run.reports] == [report.members for report in other.run.reports]
        for step, noted in enumerate(one.noted, start=1):
            begins, ends = (at > 0 and one.run.method.round_after(at) is not None for at in (step, step - DELAY))
            assert noted["copies"] == begins + ends
            # for the parameters of its own round, in the background; for a buffer that was written two rounds ago
            assert noted["waits"] <= 2 * ends


@pytest.mark.parametrize("case", ["noloco", "fragments", "averaged state"])
def test_machines_of_several_ranks_train_as_on_the_cpu(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "PIECE", 50)  # so that parameters are cut
    ranks, errors = train_all(case, 4, per_machine=2)
    assert errors == []
    for one, other in zip(ranks, train_on_cpu(case, 4, per_machine=2), strict=True):
        assert torch.equal(one.x, other.x)
        # the gradients of the machine go to the host and back
        assert max(noted["copies"] for noted in one.noted) <= 4


def test_without_delay_a_round_waits_for_its_parameters() -> None:
    ranks, errors = train_all("noloco", delay=0)
    assert errors == []
    for step, noted in enumerate(ranks[0].noted, start=1):
        begins = step % 6 == 0
        assert noted["copies"] == 2 * begins
        assert begins <= noted["waits"] <= 2 * begins


def test_replicas_with_delay_know_how_far_they_are_apart() -> None:
    ranks, _ = train_all("noloco")
    for one in ranks:
        assert all(0 < report.spread < 1 for report in one.run.reports[1:])


@pytest.mark.parametrize(
    ("wait", "mutant"),
    {
        "the copy does not wait for training": (
            "wait_event",
            lambda self, stream, event: stream or self.wait(stream, event),
        ),
        "training does not wait for the result": (
            "wait_event",
            lambda self, stream, event: stream and self.wait(stream, event),
        ),
        "the exchange does not wait for the copy": ("synchronize", lambda *_: None),
        "memory is given away too early": ("record_stream", lambda *_: None),
    }.items(),
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_the_sanitizer_finds_a_wait_that_is_left_out(
    wait: str, mutant: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Streams, *mutant)
    assert train_all("fragments")[1], wait


def test_parameters_that_are_not_finite_stay_here_and_another_replica_is_taken_over() -> None:
    def rank_of(group: SimGroup) -> Any:
        with working_on(DEVICE):
            model = make_model().to(DEVICE)
            optimizer = sgd_of(model)
            run: Any = attach(model, build("diloco", every=4, delay=2, timeout_s=1.0), optimizer, group=group)
            for step in run.range(STEPS):
                if (group.rank, step) == (1, 7):
                    torch.nn.init.constant_(next(model.parameters()), float("nan"))
                x, y = (t.to(DEVICE) for t in make_batch(group.rank, step))
                optimizer.zero_grad()
                loss_of(model(x), y).backward()
                optimizer.step()
            assert bool(run.flat().isfinite().all())
            return run

    with pretended(lane) as streams:
        healthy, poisoned = SimWorld[Any](2, timeout_s=60).run(rank_of)
    assert streams.errors == []
    assert ("parameters not finite", {"step": 10}) in poisoned.events  # they had been so in the round after step 8
    assert [kind for kind, _ in poisoned.events].count("caught up") == 1
    assert [report.members for report in healthy.reports][1] == [0]
    assert healthy.reports[-1].members == poisoned.reports[-1].members == [0, 1]
