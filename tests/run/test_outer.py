"""An outer method in a training script: attach, join, rounds, finish, a job over torch.distributed, and going on from a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from outer_rig import Diary, run_world, train_diary
from pool import Pool
from rig import flat, loss_of, make_batch, make_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from commopt import attach, build
from commopt.errors import AttachError, CommoptError
from commopt.groups import LocalGroup, SimGroup, SimWorld, TorchGroup
from commopt.groups.tcp import TcpPeers
from commopt.plan.links import LinkModel
from commopt.run.checks import connect_peers
from commopt.run.outer import OuterRun


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, **options)


def attach_without_an_optimizer() -> None:
    attach(make_model(), "noloco")


def attach_twice() -> None:
    model = make_model()
    attach(model, build("noloco"), sgd(model))
    attach(model, build("noloco"), sgd(model))


def attach_one_method_to_two_models() -> None:
    method = build("noloco")
    for _ in range(2):
        model = make_model()
        attach(model, method, sgd(model))


def attach_to_part_of_a_model() -> None:
    model = make_model()
    attach(model, build("diloco"), sgd(model[0]))


def attach_a_frozen_model() -> None:
    model = make_model().requires_grad_(False)
    attach(model, build("noloco"), sgd(model))


def step_without_joining() -> None:
    model = make_model()
    optimizer = sgd(model)
    attach(model, build("local_sgd"), optimizer)
    step_once(model, optimizer, 0, 0)


def give_peers_to_a_gradient_method() -> None:
    model = make_model()
    peers = SimGroup(SimWorld(1), 0).peers
    attach(model, "dense", sgd(model), group=peers)


def give_a_scaler_to_an_outer_method() -> None:
    model = make_model()
    attach(model, "noloco", sgd(model), grad_scaler=torch.amp.GradScaler("cpu"))


def overlap_an_outer_method() -> None:
    model = make_model()
    attach(model, "noloco", sgd(model), overlap=True)


def average_state_that_is_not_there() -> None:
    def train(group: SimGroup) -> None:
        model = make_model()
        optimizer = sgd(model, momentum=0.9)
        method = build("local_sgd", every=1, average_state=["exp_avg"])
        for step in attach(model, method, optimizer, group=group).range(2):
            step_once(model, optimizer, group.rank, step)

    SimWorld[None](2).run(train)


REFUSED: list[tuple[Callable[[], None], str]] = [
    (attach_without_an_optimizer, r"noloco: pass the optimizer of your training \(it is missing\)"),
    (attach_twice, r"a method is attached to this model already; close\(\) what attach returned first"),
    (attach_to_part_of_a_model, r"does not hold the trainable parameter 2\.weight"),
    (attach_a_frozen_model, "the model has no trainable parameter"),
    (attach_one_method_to_two_models, "this noloco was attached to a model before; build another one"),
    (step_without_joining, r"local_sgd: call run.join\(\) before the first step, or loop over run.range"),
    (give_peers_to_a_gradient_method, "group: Peers with dense: it exchanges in every step, .*use an outer method"),
    (give_a_scaler_to_an_outer_method, "grad_scaler with noloco: it exchanges no gradients.*; leave grad_scaler out"),
    (overlap_an_outer_method, "overlap=True with a model that is not wrapped in DDP"),
    (average_state_that_is_not_there, "average_state: SGD has no 'exp_avg' for each parameter; it has momentum_buffer"),
]


@pytest.mark.parametrize(("attempt", "words"), REFUSED, ids=lambda one: getattr(one, "__name__", ""))
def test_misuse_is_refused_in_words_that_name_the_fix(attempt: Callable[[], None], words: str) -> None:
    with pytest.raises(CommoptError, match=words):
        attempt()


def step_once(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int) -> None:
    x, y = make_batch(rank, step)
    optimizer.zero_grad()
    loss_of(model(x), y).backward()
    optimizer.step()


def attach_ddp(process_group: dist.ProcessGroup) -> str:
    model = DistributedDataParallel(make_model(), process_group=process_group)
    with pytest.raises(AttachError) as caught:
        attach(model, "noloco", sgd(model), group=TorchGroup(process_group))
    return str(caught.value)


def test_a_model_that_averages_gradients_itself_is_refused(pool: Pool) -> None:
    for said in pool.run(2, attach_ddp):
        assert said.startswith("noloco on a DistributedDataParallel model: DDP averages gradients in every step")
        assert said.endswith("attach to the model itself")


def test_attach_returns_the_run_of_the_methods_kind() -> None:
    model, other = make_model(), make_model()
    assert isinstance(attach(model, "noloco", sgd(model)), OuterRun)
    assert not isinstance(attach(other, "dense", sgd(other)), OuterRun)


@pytest.mark.parametrize("group", [None, LocalGroup()], ids=["none", "local"])
@pytest.mark.parametrize("name", ["noloco", "diloco"])
def test_one_rank_alone_trains_as_without_a_method(name: str, group: Any) -> None:
    with_method, without = make_model(), make_model()
    optimizers = sgd(with_method), sgd(without)
    run: Any = attach(with_method, build(name, every=2), optimizers[0], group=group)
    for step in run.range(6):
        step_once(with_method, optimizers[0], 0, step)
        step_once(without, optimizers[1], 0, step)
    run.finish()
    assert torch.equal(flat(with_method), flat(without))
    assert run.reports == []
    assert run.traffic.payload_bytes == 0.0


def test_all_start_with_the_parameters_and_buffers_of_rank_0() -> None:
    def train(group: SimGroup) -> Tensor:
        model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
        for x in (*model.parameters(), *model.buffers()):
            x.data.fill_(group.rank + 1)
        run: Any = attach(model, build("noloco"), sgd(model), group=group)
        assert run.join() == 0
        return torch.cat([x.detach().float().reshape(-1) for x in (*model.parameters(), *model.buffers())])

    assert all(bool((x == 1).all()) for x in SimWorld[Tensor](3).run(train))


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
        assert torch.equal(diary.attached.flat() - diary.after[10], diary.attached.flat() - diary.before[10])
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
    for both in zip(
        *(diary.reports for diary in diaries), strict=True
    ):  # who comes second finds the message on its way
        assert max(report.exchange_s for report in both) >= 4 * elements / 1e6 + 0.01
    assert world.seconds == pytest.approx(2.0 + diaries[0].attached.waited_s, abs=0.1)


def test_a_delay_hides_the_exchange() -> None:
    links = LinkModel.uniform(2, "8mbit", "10ms")
    _, diaries = run_world(2, "noloco", {"every": 5, "delay": 2}, 20, links=links, step_s=0.1)
    for diary in diaries:
        assert all(report.blocked_s == 0.0 for report in diary.reports[:-1])
    for both in zip(*(diary.reports for diary in diaries), strict=True):
        assert max(report.exchange_s for report in both) > 0.01


def test_steps_with_communication_off_count_for_nothing() -> None:
    def train(group: SimGroup) -> tuple[int, float]:
        model = make_model()
        optimizer = sgd(model)
        run: Any = attach(model, build("noloco", every=2), optimizer, group=group)
        run.join()
        before = group.traffic.payload_bytes
        with run.communication_off():
            for step in range(4):
                step_once(model, optimizer, group.rank, step)
        return run.steps, group.traffic.payload_bytes - before

    assert SimWorld[Any](2).run(train) == [(0, 0.0)] * 2


def test_a_closed_model_trains_alone_and_can_be_attached_again() -> None:
    model = make_model()
    optimizer = sgd(model)
    run: Any = attach(model, build("noloco"), optimizer)
    run.join()
    run.close()
    step_once(model, optimizer, 0, 0)
    assert run.steps == 0
    attach(model, build("diloco"), optimizer)


def test_half_precision_parameters_are_averaged_in_single() -> None:
    def train(group: SimGroup) -> Tensor:
        model = make_model(torch.bfloat16)
        optimizer = sgd(model)
        run: Any = attach(model, build("local_sgd", every=2), optimizer, group=group)
        for step in run.range(4):
            x, y = make_batch(group.rank, step, torch.bfloat16)
            optimizer.zero_grad()
            loss_of(model(x), y).backward()
            optimizer.step()
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())
        return flat(model)

    first, second = SimWorld[Tensor](2).run(train)
    assert torch.equal(first, second)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("noloco", {"every": 3}),
    ("noloco", {"every": 3, "message": "int8"}),
    ("diloco", {"every": 4, "fragments": 2, "message": "4bit"}),
    ("local_sgd", {"every": 2}),
]


def train_on_gloo(process_group: dist.ProcessGroup, name: str, options: dict[str, Any]) -> tuple[Tensor, str, float]:
    diary, group = Diary(), TorchGroup(process_group)
    train_diary(group, diary, name, {"timeout_s": 60.0, **options}, 12)
    peers = diary.attached.peers
    diary.attached.quiet()
    dist.barrier(process_group)
    diary.attached.close()
    return diary.attached.flat(), type(peers).__name__, sum(report.missed for report in diary.reports)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_ranks_of_torch_distributed_train_as_simulated_ones_do(pool: Pool, name: str, options: dict[str, Any]) -> None:
    _, diaries = run_world(3, name, options, 12)
    for diary, (result, kind, missed) in zip(diaries, pool.run(3, train_on_gloo, name, options), strict=True):
        assert kind == TcpPeers.__name__
        assert missed == 0
        torch.testing.assert_close(result, diary.attached.flat(), rtol=1e-6, atol=1e-7)


def test_peers_that_are_given_are_used_as_they_are() -> None:
    group = SimGroup(SimWorld(1), 0)
    assert connect_peers(group.peers) is group.peers
    assert connect_peers(group) is group.peers
    assert connect_peers(None).size == 1


# -- going on from a checkpoint

RESUMED: list[tuple[str, dict[str, Any]]] = [
    ("noloco", {}),
    ("noloco", {"two_tensors": True}),
    ("noloco", {"gamma": 1.0}),
    ("noloco", {"group_size": 3}),
    ("noloco", {"message": "int8"}),
    ("noloco", {"message": {"compressor": "top_k", "density": 0.1}}),
    ("noloco", {"message": "sign", "delay": 2}),
    ("diloco", {}),
    ("diloco", {"outer": "adam"}),
    ("diloco", {"fragments": 2}),
    ("diloco", {"fragments": 2, "delay": 2, "message": "int8"}),
    ("diloco", {"message": "int8"}),
    ("diloco", {"message": "4bit", "fragments": 2}),
    ("diloco", {"message": {"compressor": "top_k", "density": 0.1}}),
    ("diloco", {"participation": 0.67}),
    ("local_sgd", {"average_state": ["momentum_buffer"]}),
]


def run_from(stored: list[Any] | None, name: str, options: dict[str, Any], steps: int) -> list[tuple[Tensor, Any]]:
    """Each rank's parameters after so many steps, and all that it needs to go on from there."""

    def train(group: SimGroup) -> tuple[Tensor, Any]:
        model = make_model()
        optimizer = sgd(model, momentum=0.9)
        run: Any = attach(model, build(name, every=4, **options), optimizer, group=group)
        if stored is not None:
            own = stored[group.rank]
            model.load_state_dict(own["model"])
            optimizer.load_state_dict(own["optimizer"])
            run.load_saved(own["method"])
            run.steps = own["steps"]
        for step in run.range(steps):
            step_once(model, optimizer, group.rank, step)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "method": run.saved()}
        return flat(model), copy.deepcopy({**state, "steps": run.steps})

    return SimWorld[Any](3).run(train)


@pytest.mark.parametrize("at", [8, 9, 14])
@pytest.mark.parametrize(("name", "options"), RESUMED, ids=str)
def test_training_goes_on_bit_for_bit_from_a_checkpoint(name: str, options: dict[str, Any], at: int) -> None:
    straight = [x for x, _ in run_from(None, name, options, 24)]
    stored = [state for _, state in run_from(None, name, options, at)]
    resumed = [x for x, _ in run_from(stored, name, options, 24)]
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_a_checkpoint_holds_the_residuals_of_compressed_messages() -> None:
    for _, state in run_from(None, "noloco", {"message": "int8"}, 9):
        local = state["method"]["rank"]
        assert {"slow", "velocity", "residual"} <= set(local)
        assert all(float(local[key].norm()) > 0 for key in ("slow", "velocity", "residual"))
