"""Outer methods on machines with several ranks: a machine is one replica, and its ranks decide everything together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from outer_rig import spoil, train_outer
from rig import make_model
from torch import Tensor

from commopt import attach
from commopt.errors import AttachError, CheckpointError
from commopt.gossip import messages
from commopt.groups import SimGroup, SimWorld
from commopt.run.outer import OuterRun

Case = tuple[str, dict[str, Any]]
EVERY = 4
CASES: list[Case] = [
    ("noloco", {}),
    ("noloco", {"delay": 2, "message": "int8", "slow_share": 1.0}),
    ("noloco", {"gamma": 0.9}),
    ("diloco", {}),
    ("diloco", {"delay": 2, "fragments": 2}),
    ("diloco", {"outer": "adam", "message": "sign"}),
    ("local_sgd", {"average_state": ["exp_avg_sq"]}),
    ("decentralized_adam", {"topology": "ring"}),
    ("choco", {"topology": "complete"}),
    ("push_sum", {}),
]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "PIECE", 50)  # so that parameters are cut


def trained(group: SimGroup, case: Case, per_machine: int, steps: int = 14, **options: Any) -> tuple[Tensor, OuterRun]:
    name, given = case
    every = {"every": EVERY} if name != "decentralized_adam" else {}
    method = {"name": name, "timeout_s": 1.0, **every, **given}
    return train_outer(group, method, steps, per_machine=per_machine, **options)


def on_machines(
    machines: int, ranks: int, case: Case, faults: Sequence[Mapping[str, Any]] = (), **options: Any
) -> list[tuple[Tensor, OuterRun]]:
    """What each rank ends with, machine after machine."""
    world: SimWorld[tuple[Tensor, OuterRun]] = SimWorld(machines * ranks, faults=faults)
    return world.run(lambda group: trained(group, case, ranks, **options))


def sent(run: OuterRun) -> float:
    """Bytes without the sketches, which are small for larger models."""
    return sum(n for (_, channel, _), n in run.traffic.nbytes.items() if channel != "sketch")


@pytest.mark.parametrize(("number", "case"), list(enumerate(CASES)), ids=str)
def test_a_machine_is_a_lone_replica_with_its_mean_gradient_bit_for_bit(number: int, case: Case) -> None:
    machines, ranks = [(3, 2), (2, 3)][number % 2]
    lone: SimWorld[tuple[Tensor, OuterRun]] = SimWorld(machines)
    expected = lone.run(lambda group: trained(group, case, 1, lone=ranks))
    found = on_machines(machines, ranks, case)
    for rank, (x, run) in enumerate(found):
        assert torch.equal(x, expected[rank // ranks][0])
        assert [one.members for one in run.reports] == [one.members for one in expected[rank // ranks][1].reports]
    assert sum(sent(run) for _, run in found[:ranks]) == pytest.approx(sent(expected[0][1]), rel=0.1)


def replicas(found: Sequence[tuple[Tensor, OuterRun]], ranks: int) -> list[Tensor]:
    """What each machine ends with, once its ranks are equal."""
    for rank, (x, _) in enumerate(found):
        assert torch.equal(x, found[rank - rank % ranks][0])
    return [x for x, _ in found[::ranks]]


@pytest.mark.parametrize("name", ["noloco", "diloco", "choco", "push_sum"])
def test_a_round_that_one_rank_missed_counts_for_none_of_its_machine(name: str) -> None:
    options = {"topology": "complete"} if name == "choco" else {}
    cut = {"at_step": 6, "cut": [0, 2], "for_s": 1.5}  # between one rank of each machine: the round after 8 steps
    found = on_machines(2, 2, (name, options), [cut], steps=24, step_s=0.1)
    replicas(found, 2)
    for (_, first), (_, second) in (found[:2], found[2:]):
        if name != "push_sum":  # whose shares have weights of their own, and may count apart
            assert [one.members for one in first.reports] == [one.members for one in second.reports]
            assert [len(one.members) for one in first.reports][:2] == [2, 1]
            assert [one.missed for one in first.reports][:2] == [False, True]
            assert len(first.reports[-1].members) == 2
    assert found[0][1].method.name == name


@pytest.mark.parametrize("name", ["noloco", "diloco"])
def test_a_machine_is_killed_and_comes_back_with_all_of_its_ranks(name: str) -> None:
    faults = [{"at_step": 6, "kill": [2, 3]}, {"at_step": 25, "restart": [2, 3]}]
    found = on_machines(3, 2, (name, {}), faults, steps=40, step_s=0.1)
    replicas(found, 2)
    for rank in (2, 3):
        run = found[rank][1]
        (caught_up,) = [fields for kind, fields in run.events if kind == "caught up"]
        assert run.steps == 40
        assert caught_up["step"] >= 25
        assert any(len(one.members) > 1 for one in run.reports)
    lost = [[fields for kind, fields in run.events if kind == "peer lost"] for _, run in (*found[:2], *found[4:])]
    assert [fields["rank"] for (fields,) in lost] == [1] * 4
    helped = [fields["nbytes"] for _, run in found for kind, fields in run.events if kind == "helped to catch up"]
    assert len(helped) == 2
    assert sum(helped) < 1.3 * 12 * 1604 + 20_000  # each sends its part


def test_a_nan_on_one_rank_is_replaced_by_another_machines_replica() -> None:
    found = on_machines(2, 2, ("diloco", {}), steps=20, step_s=0.1, poison=spoil(3, 5))
    for x in replicas(found, 2):
        assert bool(x.isfinite().all())
    for rank in (2, 3):
        assert [kind for kind, _ in found[rank][1].events if kind == "caught up"] == ["caught up"]


def test_the_final_average_makes_machines_equal() -> None:
    first, second = replicas(on_machines(2, 3, ("noloco", {"final_average": True})), 3)
    assert torch.equal(first, second)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_machines_go_on_from_a_checkpoint_with_as_many_ranks_or_others(case: Case, tmp_path: Path) -> None:
    whole = replicas(on_machines(2, 2, case, saves={8: tmp_path}, is_alike=True), 2)
    name, options = case
    for ranks in (2, 1):
        is_under_way = "delay" in options or name == "decentralized_adam"
        if ranks == 1 and is_under_way:
            with pytest.raises(CheckpointError, match="only on machines of 2 ranks; save right after"):
                on_machines(2, ranks, case, load_from=tmp_path, is_alike=True)
            continue
        again = replicas(on_machines(2, ranks, case, load_from=tmp_path, is_alike=True), ranks)
        for x, y in zip(whole, again, strict=True):
            if ranks == 2 or not (name == "choco" or "message" in options):
                assert torch.equal(x, y)
            else:  # copies begin anew with full messages, and diloco's residuals at zero
                assert torch.allclose(x, y, atol=0.05)


def test_one_rank_of_another_configuration_stops_its_whole_machine_at_join() -> None:
    def joined(group: SimGroup) -> str:
        model = make_model()
        run: Any = attach(model, "diloco", torch.optim.SGD(model.parameters(), lr=0.1), group=group.by_machine(2))
        if group.rank == 3:
            run.configuration |= {"max_norm": "1.0"}
        with pytest.raises(AttachError) as raised:
            run.join(wait_s=1.0)
        return str(raised.value)

    first, second, third, fourth = SimWorld[str](4).run(joined)
    assert "max_norm is None on rank 1 and 1.0 on rank 3" in second == fourth
    assert "rank 0: another rank of this machine has a configuration that differs" in first
    assert "rank 2: another rank of this machine" in third
