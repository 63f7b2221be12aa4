"""attach validates collectively: one rank's failure raises on all of them, and differences between ranks are named."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
import time
from collections import OrderedDict
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from rig import make_model, on_gloo, train
from rig import sgd_of as sgd
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from commopt import attach, build
from commopt.errors import AttachError, CommoptError, GroupError
from commopt.groups import Group, LocalGroup, SimGroup, SimWorld, TorchGroup
from commopt.groups import torch as torch_groups
from commopt.groups.torch import group_of
from commopt.run.agree import configuration_of, difference


def attempt(what: str, group: Group) -> Any:
    """Attach; the last rank has something of its own."""
    is_odd = group.rank == 2
    model: Any = make_model()
    method: Any = "two_way(sign)"
    optimizer: Any = None
    options: dict[str, Any] = {}
    if what == "method":
        method = "ef_sign" if is_odd else "dgc"
    elif what == "deep option":
        method = {"name": "ef_sign", "block_size": 1024 if is_odd else 2048}
    elif what == "lr of a group":
        optimizer = torch.optim.SGD([{"params": list(model.parameters()), "lr": 0.2 if is_odd else 0.1}], lr=0.1)
    elif what == "optimizer":
        optimizer = torch.optim.Adam(model.parameters()) if is_odd else None
    elif what == "shape":
        model = nn.Sequential(nn.Linear(3, 4 if is_odd else 5))
    elif what == "partly frozen":
        next(model.parameters()).requires_grad_(not is_odd)
    elif what == "twice" and is_odd:
        attach(model, "dense", sgd(model), group=LocalGroup())
    elif what == "max_norm":
        options = {"max_norm": 1.0 if is_odd else 2.0}
    elif what == "unknown":
        method = "two_weigh" if is_odd else method
    elif what == "order":
        model = nn.Sequential(OrderedDict((name, nn.Linear(3, 3)) for name in ("ba" if is_odd else "ab")))
        optimizer = torch.optim.SGD([*model.a.parameters(), *model.b.parameters()], lr=0.1)
    elif what == "frozen shape":
        model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 6 if is_odd else 5).requires_grad_(False))
    elif what == "buffer":
        model = nn.Sequential(nn.Linear(3, 5), *([nn.BatchNorm1d(5, affine=False)] if is_odd else []))
    elif what == "state":
        optimizer = sgd(model, momentum=0.9)
        if is_odd:  # as after a checkpoint that one rank has loaded
            train(model, optimizer, group.rank, 1)
    elif what == "nothing":
        optimizer = sgd(model)
        model = None if is_odd else model
    return attach(model, method, optimizer or sgd(model), group=group, **options)


CASES = {
    "method": r"method\.name is dgc on ranks 0, 1 and ef_sign on rank 2",
    "deep option": r"block_size is 2048 on ranks 0, 1 and 1024 on rank 2",
    "lr of a group": r"optimizer\.groups\.0\.lr is 0\.1 on ranks 0, 1 and 0\.2 on rank 2",
    "optimizer": r"optimizer\.name is SGD on ranks 0, 1 and Adam on rank 2",
    "shape": r"parameters\.0\.bias is \[5\] float32 on cpu, number 1 on ranks 0, 1 and \[4\]",
    "partly frozen": r"parameters\.0\.weight is .* on ranks 0, 1 and missing on rank 2",
    "twice": "rank 2 could not attach: AttachError: a second method for a model: a method is attached",
    "max_norm": r"max_norm is 2\.0 on ranks 0, 1 and 1\.0 on rank 2",
    "unknown": "rank 2 could not attach: ConfigError: unknown method 'two_weigh'; did you mean 'two_way'",
    "order": r"parameters\.a\.weight is .* number 0 on ranks 0, 1 and .* number 2 on rank 2",
    "frozen shape": r"others\.1\.weight is \[5, 5\] float32 on cpu on ranks 0, 1 and \[6, 5\]",
    "buffer": r"others\.1\.running_mean is missing on ranks 0, 1 and \[5\] float32 on cpu on rank 2",
    "state": r"state is empty on ranks 0, 1 and .*missing on rank 2|state.* is missing on ranks 0, 1 and .* on rank 2",
    "nothing": "rank 2 could not attach: AttachError: model: got NoneType, expected a module",
}


def said(group: Group, cases: Sequence[str]) -> dict[str, str]:
    """What each attempt raises, one after another on the same ranks, after which the group still works."""
    answers = {}
    for what in cases:
        with pytest.raises(CommoptError) as caught:
            attempt(what, group)
        answers[what] = str(caught.value)
    model = make_model()
    run = attach(model, "dense", sgd(model), group=group)
    model(torch.ones(2, next(model.parameters()).shape[1]) * group.rank).sum().backward()
    run.optimizer.step()
    assert run.replicas_are_equal()
    run.close()
    return answers


def check(answers: list[dict[str, str]]) -> None:
    for rank, every in enumerate(answers):
        for what, answer in every.items():
            pattern = CASES[what]
            if rank == 2:  # its own error, without the prefix that names the rank
                pattern = pattern.split("Error: ")[-1]
            assert re.search(pattern, answer), (rank, what, answer)


def test_simulated_ranks_agree_or_none_attaches() -> None:
    check(SimWorld[dict[str, str]](3).run(lambda group: said(group, list(CASES))))


def test_ranks_of_a_job_agree_over_its_store_or_none_attaches(pool: Pool) -> None:
    check(pool.run(3, on_gloo, said, ["method", "unknown", "order", "nothing"]))


def started_again(group: Group) -> str:
    group.tell("")
    counts = torch_groups._told.copy()
    torch_groups._told.clear()  # as in a new process
    with pytest.raises(GroupError) as caught:
        group.tell("")
    torch_groups._told.update({place: count + 1 for place, count in counts.items()})
    return str(caught.value)


def test_a_rank_that_was_started_alone_again_is_refused_at_once(pool: Pool) -> None:
    assert all(
        "torch.distributed cannot take one rank back" in answer for answer in pool.run(2, on_gloo, started_again)
    )


def in_ddp(process_group: dist.ProcessGroup) -> list[str]:
    rank, answers = dist.get_rank(process_group), []
    wrapped = DistributedDataParallel(make_model(), process_group=process_group)
    group = TorchGroup(process_group)
    alone = TorchGroup(group_of([dist.get_rank()]))

    def try_to(model: Any, optimizer: Any, group: Any = None, method: str = "ef_sign", **options: Any) -> None:
        with pytest.raises(CommoptError) as caught:
            attach(model, method, optimizer, group=group, **options)
        answers.append(str(caught.value))

    try_to(wrapped, sgd(wrapped), overlap=rank == 0)
    try_to(wrapped, sgd(wrapped.module) if rank == 0 else None)
    around = torch.nn.Sequential(wrapped)
    try_to(around, sgd(around), group)
    compiled: Any = nn.Module()
    compiled._orig_mod = wrapped  # as torch.compile wraps a model
    try_to(compiled, sgd(wrapped), group)
    try_to(wrapped, sgd(wrapped), LocalGroup())
    try_to(wrapped, sgd(wrapped), alone)
    try_to(wrapped, sgd(make_model()), group)
    try_to(wrapped, sgd(wrapped), group, "noloco")
    try_to(wrapped, sgd(wrapped), overlap=True, max_norm=1.0)
    skips = DistributedDataParallel(make_model(), process_group=process_group, skip_all_reduce_unused_params=True)
    try_to(skips, sgd(skips))
    run = attach(wrapped, "ef_sign", sgd(wrapped))
    try_to(wrapped, sgd(wrapped.module))
    run.close()
    return answers


def test_ddp_is_attached_on_all_ranks_or_none(pool: Pool) -> None:
    first, second = pool.run(2, in_ddp)
    expected = [
        "overlap is True on rank 0 and False on rank 1",
        "rank 1 could not attach: AttachError: ef_sign: pass the optimizer of your training",
        "Sequential has a DistributedDataParallel inside (0)",
        "attach to the DDP model first, then compile",
        *["Group of 1 ranks: it has other ranks than DDP's own process group"] * 2,
        "an optimizer with parameters that are not this model's",
        "noloco on a DistributedDataParallel model: DDP averages gradients among all ranks in every step",
        "overlap=True with max_norm: it needs the gradients of all buckets at once; leave overlap out",
        "skip_all_reduce_unused_params=True): a step's exchange ends with the last bucket, which then may never come",
        "a DDP model with a communication hook: DDP takes only one",
    ]
    assert "pass the optimizer" in second.pop(1)
    assert all(words in answer for words, answer in zip(expected, first, strict=True)), first
    expected.pop(1)
    assert all(words in answer for words, answer in zip(expected, second, strict=True)), second


def wrapped_afterwards(process_group: dist.ProcessGroup) -> str:
    model = make_model()
    run = attach(model, "dense", sgd(model), group=TorchGroup(process_group))
    copied = copy.deepcopy(model)
    held = nn.Sequential(*model)  # whose forward calls the layers, and not the model
    x = torch.ones(2, next(model.parameters()).shape[1])
    DistributedDataParallel(copied, process_group=process_group)(x)  # a copy has nothing attached
    refused = []
    for around in (model, held):
        with pytest.raises(AttachError) as caught:
            DistributedDataParallel(around, process_group=process_group)(x)
        refused.append(str(caught.value))
    run.close()
    DistributedDataParallel(model, process_group=process_group)(x)
    return " ".join(refused)


def test_a_model_that_is_wrapped_after_attach_is_refused_in_the_first_forward(pool: Pool) -> None:
    for answer in pool.run(2, wrapped_afterwards):
        assert answer.count("wrapped in DDP after dense had been attached") == 2


def comes_late(group: Group) -> str:
    before = torch_groups.SOON
    torch_groups.SOON = timedelta(seconds=0.05)
    time.sleep(0.3 * group.rank)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert group.tell(str(group.rank)) == ["0", "1"]
    torch_groups.SOON = before
    return said.getvalue()


def test_a_rank_says_for_whom_it_waits(pool: Pool) -> None:
    said, nothing = pool.run(2, on_gloo, comes_late)
    assert said.startswith("rank 0 has waited 0.05 s for rank 1: all ranks must call attach, save and load")
    assert nothing == ""


def test_a_rank_that_never_comes_is_named() -> None:
    def work(group: SimGroup) -> None:
        model = make_model()
        if group.rank == 0:
            attach(model, "dense", sgd(model), group=group)

    with pytest.raises(GroupError, match="did not join within 0"):
        SimWorld[None](2, timeout_s=0.2).run(work)


def test_members_that_come_and_go_compare_when_they_join() -> None:
    def work(group: SimGroup) -> None:
        model = make_model()
        run = attach(model, build("noloco", every=5 if group.rank else 6), sgd(model), group=group)
        run.join(wait_s=5.0)

    with pytest.raises(AttachError, match=r"every is 6 on rank 0 and 5 on ranks 1, 2"):
        SimWorld[None](3).run(work)


def test_the_traffic_of_training_does_not_count_the_comparison_at_attach() -> None:
    def sent(group: SimGroup) -> tuple[float, float]:
        model = make_model()
        before = group.seconds
        run = attach(model, "dense", sgd(model), group=group)
        return run.group.traffic.payload_bytes, group.seconds - before

    broadcast = SimWorld[tuple[float, float]](2).run(sent)
    nbytes = sum(p.nbytes for p in make_model().parameters())
    assert [n for n, _ in broadcast] == [nbytes, 0.0]


def test_the_difference_names_three_keys_and_counts_the_rest() -> None:
    one = configuration_of("plain", build("top_k", density=0.01), {}, sgd(make_model()), nn.Module())
    other = {**one, "framework": "ddp", "commopt": "2", "max_norm": "7.0", "parameters.a": "[1] float32 on cpu"}
    text = difference({0: one, 1: other})
    assert text.count(" on rank 0 and ") == 3
    assert "and 1 more differences" in text


# -- one of several processes that would train alone


@pytest.mark.parametrize("key", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
@pytest.mark.parametrize("name", ["dense", "noloco"])
def test_one_of_several_processes_does_not_train_alone_silently(
    name: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    optimizer = sgd(model)
    monkeypatch.setenv(key, "2")
    with pytest.raises(
        AttachError, match=r"one of 2: .*init_process_group\(\) before attach, or pass group=.*MPIGroup\(\)"
    ):
        attach(model, name, optimizer)
    attach(model, name, optimizer, group=LocalGroup() if name == "dense" else SimGroup(SimWorld(1), 0))


def closed(process_group: dist.ProcessGroup, overlap: bool) -> list[str]:
    model = make_model()
    wrapped = DistributedDataParallel(model, process_group=process_group)
    adam = torch.optim.Adam(model.parameters())
    run = attach(wrapped, "onebit_adam", adam, group=TorchGroup.like(process_group), overlap=overlap)
    run.close()
    answers = []
    with pytest.raises(Exception, match="whose run was closed") as in_backward:
        wrapped(torch.ones(2, next(model.parameters()).shape[1])).sum().backward()
    answers.append(str(in_backward.value))
    for attempt_again in (run.optimizer.step, lambda: attach(wrapped, "dense", sgd(wrapped))):
        with pytest.raises(AttachError) as caught:
            attempt_again()
        answers.append(str(caught.value))
    return answers


def open_now(process_group: dist.ProcessGroup) -> list[list[int]]:
    """The file descriptors and threads of this process after each of three runs."""
    counts = []
    for is_plain in (False, False, True):
        model = make_model() if is_plain else DistributedDataParallel(make_model())
        run = attach(model, "ef_sign", sgd(model))
        train(model, run.optimizer, run.rank, 1)
        run.close()
        counts.append([len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task")])
    return counts


def test_close_gives_back_file_descriptors_and_threads(pool: Pool) -> None:
    for first, *others in pool.run(5, open_now):
        assert others == [first] * 2


@pytest.mark.parametrize("overlap", [True, False])
def test_after_close_nothing_goes_on_in_silence(pool: Pool, overlap: bool) -> None:
    for in_backward, in_step, again in pool.run(2, closed, overlap):
        assert "make a new DistributedDataParallel(model.module)" in in_backward
        assert "step() after close()" in in_step
        assert "make a new DistributedDataParallel(model.module)" in again


def test_another_optimizer_that_steps_instead_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()
    attach(model, "dense", sgd(model))
    other = sgd(model)
    for _ in range(4):
        model(torch.ones(2, next(model.parameters()).shape[1])).sum().backward()
        other.step()
    assert caplog.text.count("parameters change, but not by the SGD that dense is attached to") == 1


@pytest.mark.parametrize(("name", "is_named"), [("dense", True), ("noloco", False)])
def test_members_of_an_outer_method_may_have_different_devices(name: str, is_named: bool) -> None:
    model = make_model()
    told = configuration_of("plain", build(name), dict(model.named_parameters()), sgd(model), model)
    assert all(("cpu" in kind) is is_named for key, kind in told.items() if key.startswith("parameters."))
