"""What fails at attach on one rank fails on all, and ranks that are configured differently are told in what."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from rig import make_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commopt
from commopt import build
from commopt.errors import AttachError, CommoptError, GroupError
from commopt.groups import SimGroup, SimWorld, TorchGroup
from commopt.integrations import ddp, plain
from commopt.integrations.agreement import configuration_of, difference


def sgd(model: nn.Module, lr: float = 0.1, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def attempt(rank: int, what: str, group: Any) -> Any:
    """Attach; the last rank has something of its own."""
    is_odd = rank == 2
    model, method = make_model(), "two_way(sign)"
    optimizer: Any = sgd(model)
    options: dict[str, Any] = {}
    if what == "method":
        method = "ef_sign" if is_odd else "dgc"
    elif what == "option":
        return plain.attach(model, build("top_k", density=0.02 if is_odd else 0.01), optimizer, group)
    elif what == "deep option":
        return plain.attach(model, build("ef_sign", block_size=1024 if is_odd else 2048), optimizer, group)
    elif what == "lr":
        optimizer = sgd(model, 0.2 if is_odd else 0.1)
    elif what == "lr of a group":
        optimizer = torch.optim.SGD([{"params": list(model.parameters()), "lr": 0.2 if is_odd else 0.1}], lr=0.1)
    elif what == "optimizer":
        optimizer = torch.optim.Adam(model.parameters()) if is_odd else sgd(model)
    elif what == "shape":
        model = nn.Sequential(nn.Linear(3, 4 if is_odd else 5))
        optimizer = sgd(model)
    elif what == "frozen":
        model.requires_grad_(not is_odd)
    elif what == "partly frozen":
        next(model.parameters()).requires_grad_(not is_odd)
    elif what == "twice":
        if is_odd:
            plain.attach(model, "dense", optimizer, commopt.groups.LocalGroup())
    elif what == "bucket":
        options = {"bucket_bytes": 100 if is_odd else 200}
    elif what == "unknown":
        method = "two_weigh" if is_odd else method
    elif what == "dtype":
        model = model.double() if is_odd else model
        optimizer = sgd(model)
        method = "dense"
    elif what == "no optimizer":
        optimizer = None if is_odd else optimizer
    return plain.attach(model, method, optimizer, group, **options)


CASES = {
    "method": r"method\.name is dgc on ranks 0, 1 and ef_sign on rank 2",
    "option": r"0\.01 on ranks 0, 1 and .*0\.02 on rank 2",
    "deep option": r"block_size is 2048 on ranks 0, 1 and 1024 on rank 2",
    "lr": r"lr is 0\.1 on ranks 0, 1 and 0\.2 on rank 2",
    "lr of a group": r"optimizer\.groups\.0\.lr is 0\.1 on ranks 0, 1 and 0\.2 on rank 2",
    "optimizer": r"optimizer\.name is SGD on ranks 0, 1 and Adam on rank 2",
    "shape": r"parameters\.0\.bias is \[5\] float32 on cpu on ranks 0, 1 and \[4\]",
    "frozen": "rank 2 could not attach: AttachError: the model has no trainable parameter",
    "partly frozen": r"parameters\.0\.weight is .* on ranks 0, 1 and missing on rank 2",
    "twice": "rank 2 could not attach: AttachError: a method is attached to this model already",
    "bucket": r"bucket_bytes is 200 on ranks 0, 1 and 100 on rank 2",
    "unknown": "rank 2 could not attach: ConfigError: unknown method 'two_weigh'; did you mean 'two_way'",
    "dtype": r"float64 on cpu on rank 2",
    "no optimizer": "rank 2 could not attach: AttachError: two_way replaces gradients",
}


def said(rank: int, group: Any, cases: list[str]) -> list[str]:
    """What each attempt came to, one after the other on the same ranks; the group works after each."""
    answers = []
    for what in cases:
        try:
            attempt(rank, what, group)
            answers.append("attached")
        except CommoptError as error:
            answers.append(str(error))
    model = make_model()
    attachment: Any = plain.attach(model, "dense", sgd(model), group)
    model(torch.ones(2, next(model.parameters()).shape[1]) * rank).sum().backward()
    attachment.optimizer.step()
    answers.append(str(attachment.replicas_are_equal()))
    attachment.detach()
    return answers


def check(answers: list[list[str]], cases: list[str]) -> None:
    import re

    for rank, every in enumerate(answers):
        for what, answer in zip([*cases, "after"], every, strict=True):
            if what == "after":
                assert answer == "True"
                continue
            pattern = CASES[what]
            if rank == 2:  # which is told what is wrong here, where it is wrong here
                pattern = pattern.split("Error: ")[-1]
            assert re.search(pattern, answer), (rank, what, answer)


def test_simulated_ranks_agree_or_none_attaches() -> None:
    cases = list(CASES)
    check(SimWorld[list[str]](3).run(lambda group: said(group.rank, group, cases)), cases)


def on_gloo(process_group: dist.ProcessGroup, cases: list[str]) -> list[str]:
    return said(dist.get_rank(process_group), TorchGroup(process_group), cases)


def test_ranks_of_a_job_agree_over_its_store_or_none_attaches(pool: Pool) -> None:
    cases = list(CASES)
    check(pool.run(3, on_gloo, cases), cases)


def in_ddp(process_group: dist.ProcessGroup) -> list[str]:
    rank, answers = dist.get_rank(process_group), []
    wrapped = DistributedDataParallel(make_model(), process_group=process_group)

    def try_to(overlap: bool, optimizer: Any, model: Any = wrapped) -> None:
        try:
            ddp.attach(model, "ef_sign", optimizer, overlap=overlap).detach()
            answers.append("attached")
        except CommoptError as error:
            answers.append(str(error))

    try_to(rank == 0, sgd(wrapped))
    try_to(True, sgd(wrapped.module) if rank == 0 else None)
    plain_one = torch.nn.Sequential(wrapped)
    try:
        plain.attach(plain_one, "dense", sgd(plain_one), TorchGroup(process_group))
    except AttachError as error:
        answers.append(str(error))
    compiled: Any = nn.Module()
    compiled._orig_mod = wrapped  # as what torch.compile puts around a model has it
    try:
        ddp.attach(compiled, "dense", sgd(wrapped), TorchGroup(process_group))
    except AttachError as error:
        answers.append(str(error))
    try_to(True, sgd(wrapped))
    return answers


def test_ddp_is_attached_on_all_ranks_or_none(pool: Pool) -> None:
    overlap, optimizer, inside, compiled, good = zip(*pool.run(2, in_ddp), strict=True)
    assert all("overlap is True on rank 0 and False on rank 1" in one for one in overlap)
    assert "rank 1 could not attach: AttachError: ef_sign replaces gradients" in optimizer[0]
    assert "pass the optimizer" in optimizer[1]
    assert all("has a DistributedDataParallel inside (0)" in one for one in inside)
    assert all("attach to the DDP model first, then compile" in one for one in compiled)
    assert good == ("attached", "attached")


def wrapped_afterwards(process_group: dist.ProcessGroup) -> str:
    model = make_model()
    attachment = plain.attach(model, "dense", sgd(model), TorchGroup(process_group))
    copied = copy.deepcopy(model)
    x = torch.ones(2, next(model.parameters()).shape[1])
    DistributedDataParallel(copied, process_group=process_group)(x)  # a copy has nothing attached
    try:
        DistributedDataParallel(model, process_group=process_group)(x)
    except AttachError as error:
        attachment.detach()
        DistributedDataParallel(model, process_group=process_group)(x)
        return str(error)
    return "trained"


def test_a_model_that_is_wrapped_after_attach_is_refused_in_the_first_forward(pool: Pool) -> None:
    for answer in pool.run(2, wrapped_afterwards):
        assert "wrapped in DDP after dense had been attached" in answer


def test_a_rank_that_never_comes_is_named() -> None:
    def work(group: SimGroup) -> None:
        model = make_model()
        if group.rank == 0:
            plain.attach(model, "dense", sgd(model), group)

    with pytest.raises(GroupError, match="did not join within 0"):
        SimWorld[None](2, timeout_s=0.2).run(work)


def joined(group: SimGroup, name: str) -> None:
    model = make_model()
    options: dict[str, Any] = {"every": 5 if group.rank else 6}
    attachment: Any = plain.attach(model, build(name, **options), sgd(model), group)
    attachment.join(wait_s=5.0)


@pytest.mark.parametrize("name", ["noloco", "diloco"])
def test_members_that_come_and_go_compare_when_they_join(name: str) -> None:
    with pytest.raises(AttachError, match=r"every is 6 on rank 0 and 5 on ranks 1, 2"):
        SimWorld[None](3).run(lambda group: joined(group, name))


def test_the_traffic_of_training_does_not_count_what_is_told_at_attach() -> None:
    def sent(group: SimGroup) -> tuple[float, float]:
        model = make_model()
        before = group.seconds
        attachment = plain.attach(model, "dense", sgd(model), group, find_unused_parameters=False)
        return attachment.group.traffic.payload_bytes, group.seconds - before

    broadcast = SimWorld[tuple[float, float]](2).run(sent)
    nbytes = sum(p.nbytes for p in make_model().parameters())
    assert [n for n, _ in broadcast] == [nbytes, 0.0]


def test_the_difference_names_three_keys_and_counts_the_rest() -> None:
    one = configuration_of("plain", build("top_k", density=0.01), {}, sgd(make_model()))
    other = {**one, "integration": "ddp", "commopt": "2", "bucket_bytes": 7, "parameters": {"a": "[1] float32 on cpu"}}
    text = difference({0: one, 1: other})
    assert text.count(" on rank 0 and ") == 3
    assert "and 1 more differences" in text
