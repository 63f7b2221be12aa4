"""An outer method in a training script: attach, join, rounds, finish, and a job over torch.distributed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from outer_rig import Diary, run_world, train_diary
from pool import Pool
from rig import flat, make_model, on_gloo, train
from rig import sgd_of as sgd
from torch import Tensor

from commopt import attach, build
from commopt.errors import AttachError
from commopt.groups import Group, LocalGroup, SimGroup, SimWorld
from commopt.groups.tcp import TcpPeers
from commopt.plan.links import LinkModel


def test_a_step_before_join_is_refused() -> None:
    model = make_model()
    optimizer = sgd(model)
    attach(model, build("local_sgd"), optimizer)
    said = r"local_sgd: call run.join\(\) before the first step, or loop over run.range"
    with pytest.raises(AttachError, match=said):
        train(model, optimizer, 0, 1)


def test_state_that_is_not_there_is_not_averaged() -> None:
    said = "average_state: SGD has no 'exp_avg' for each parameter; it has momentum_buffer"
    with pytest.raises(AttachError, match=said):
        run_world(2, "local_sgd", {"every": 1, "average_state": ["exp_avg"]}, 2)


@pytest.mark.parametrize("group", [None, LocalGroup()], ids=["none", "local"])
@pytest.mark.parametrize("name", ["noloco", "diloco", "push_sum"])
def test_one_rank_alone_trains_as_without_a_method(name: str, group: Any) -> None:
    with_method, without = make_model(), make_model()
    optimizers = sgd(with_method), sgd(without)
    run: Any = attach(with_method, build(name, every=2), optimizers[0], group=group)
    for step in run.range(6):
        train(with_method, optimizers[0], 0, 1, step)
        train(without, optimizers[1], 0, 1, step)
    run.finish()
    assert torch.equal(flat(with_method), flat(without))
    assert run.reports == []
    assert run.traffic.payload_bytes == 0.0


@pytest.mark.parametrize("name", ["noloco", "diloco"])
def test_a_final_average_makes_all_replicas_equal(name: str) -> None:
    _, apart = run_world(3, name, {"every": 3}, 10)
    _, together = run_world(3, name, {"every": 3, "final_average": True}, 10)
    finals = [diary.attached.flat() for diary in together]
    assert all(torch.equal(finals[0], one) for one in finals)
    assert not torch.equal(apart[0].attached.flat(), apart[1].attached.flat())
    mean = torch.stack([diary.attached.flat() for diary in apart]).mean(0)
    torch.testing.assert_close(finals[0], mean, rtol=1e-5, atol=1e-6)
    assert together[2].events("final average") == [{"ranks": [0, 1, 2], "step": 10}]


def test_finish_ends_the_round_under_way() -> None:
    _, diaries = run_world(2, "diloco", {"every": 5, "delay": 4}, 10)
    for diary in diaries:
        assert [report.round for report in diary.reports] == [0, 1]
        assert torch.equal(diary.after[10], diary.before[10])  # the second round has not ended with the last step
        assert not torch.equal(diary.attached.flat(), diary.after[10])  # but with `finish`
    assert torch.equal(diaries[0].attached.flat(), diaries[1].attached.flat())


def test_each_round_is_reported_with_what_it_cost() -> None:
    links = LinkModel.uniform(2, "8mbit", "10ms")
    world, diaries = run_world(2, "noloco", {"every": 5}, 20, links=links, step_s=0.1)
    elements = diaries[0].attached.method.index.total
    for diary in diaries:
        assert [(report.step, report.round) for report in diary.reports] == [(5, 0), (10, 1), (15, 2), (20, 3)]
        for report in diary.reports:
            assert report.members == [0, 1]
            assert 4 * elements <= report.nbytes <= 4 * elements + 2048
            assert report.exchange_s <= report.blocked_s + 1e-9
        assert diary.attached.waited_s == pytest.approx(sum(report.blocked_s for report in diary.reports))
    for both in zip(*(diary.reports for diary in diaries), strict=True):  # the later rank waits for less
        assert max(report.exchange_s for report in both) >= 4 * elements / 1e6 + 0.01
    assert world.seconds == pytest.approx(2.0 + diaries[0].attached.waited_s, abs=0.1)


def test_a_delay_hides_the_exchange() -> None:
    links = LinkModel.uniform(2, "8mbit", "10ms")
    _, diaries = run_world(2, "noloco", {"every": 5, "delay": 2}, 20, links=links, step_s=0.1)
    for diary in diaries:
        assert all(report.blocked_s == 0.0 for report in diary.reports[:-1])
    for both in zip(*(diary.reports for diary in diaries), strict=True):
        assert max(report.exchange_s for report in both) > 0.01


def test_half_precision_parameters_are_averaged_in_single() -> None:
    def work(group: SimGroup) -> Tensor:
        model = make_model(torch.bfloat16)
        optimizer = sgd(model)
        run: Any = attach(model, build("local_sgd", every=2), optimizer, group=group)
        for step in run.range(4):
            train(model, optimizer, group.rank, 1, step)
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())
        return flat(model)

    first, second = SimWorld[Tensor](2).run(work)
    assert torch.equal(first, second)


OVER_TCP: list[tuple[str, dict[str, Any]]] = [
    ("noloco", {"every": 3, "message": "int8"}),
    ("diloco", {"every": 4, "fragments": 2, "message": "4bit"}),
    ("decentralized_adam", {"topology": "ring"}),
    ("decentralized_adam", {"topology": "complete", "message": "int8"}),
    ("choco", {}),
    ("choco", {"delay": 1, "message": {"compressor": "top_k", "density": 0.1}}),
    ("push_sum", {}),
    ("push_sum", {"delay": 1}),
]


def trained(group: Group, name: str, options: dict[str, Any]) -> tuple[Tensor, str, float]:
    diary = train_diary(group, Diary(), name, options, 12)
    diary.attached.quiet()
    group.barrier()
    diary.attached.close()
    return diary.attached.flat(), type(diary.attached.peers).__name__, sum(report.missed for report in diary.reports)


@pytest.mark.parametrize(("name", "options"), OVER_TCP, ids=str)
def test_ranks_of_torch_distributed_train_as_simulated_ones_do(pool: Pool, name: str, options: dict[str, Any]) -> None:
    """Over real sockets, which may show what a simulated mailbox hides."""
    options = {**options, "timeout_s": 60.0}
    _, diaries = run_world(3, name, options, 12)
    for diary, (result, kind, missed) in zip(diaries, pool.run(3, on_gloo, trained, name, options), strict=True):
        assert kind == TcpPeers.__name__
        assert missed == 0
        torch.testing.assert_close(result, diary.attached.flat(), rtol=1e-6, atol=1e-7)


def waited(group: Group) -> list[bool]:
    model = make_model()
    optimizer, steps = sgd(model), list[bool]()
    run: Any = attach(model, build("local_sgd", every=4, delay=2, timeout_s=60.0), optimizer, group=group)
    for step in run.range(8):
        before_s = run.waited_s
        train(model, optimizer, group.rank, 1, step)
        steps.append(run.waited_s > before_s)
    run.quiet()
    group.barrier()
    run.close()
    return steps


def test_what_a_round_costs_counts_in_the_steps_that_begin_and_end_it(pool: Pool) -> None:
    for steps in pool.run(2, on_gloo, waited):
        assert steps == [False, False, False, True, False, True, False, True]


def test_peers_belong_to_one_run_at_a_time() -> None:
    group = SimGroup(SimWorld(1), 0)
    first, second = make_model(), make_model()
    run = attach(first, "local_sgd", sgd(first), group=group.peers)
    for again in (group.peers, group):
        with pytest.raises(AttachError, match=r"group: Peers of another outer run: .* give each run Peers of its own"):
            attach(second, "noloco", sgd(second), group=again)
    run.close()
    attach(second, "noloco", sgd(second), group=group.peers)


def test_a_range_in_which_nothing_steps_ends_with_an_error() -> None:
    model = make_model()
    run = attach(model, "local_sgd", sgd(model), group=SimGroup(SimWorld(1), 0))
    with pytest.raises(AttachError, match=r"it counts steps, and not batches"):
        list(run.range(8))  # as if a body stepped `if (step + 1) % 4 == 0`
