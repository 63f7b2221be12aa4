"""How a program finds the ranks of its job, with any launcher, and how its model is wrapped."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from pool import Pool
from torch import nn

import commopt
from commopt.errors import ConfigError
from commopt.groups import LocalGroup, connect

NAMES = ["dgc", "onebit_adam", "noloco"]
LAUNCHERS = ("RANK", "WORLD_SIZE", "COMMOPT_PEERS", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in LAUNCHERS:
        monkeypatch.delenv(key, raising=False)


def test_a_program_started_by_hand_is_one_rank_alone() -> None:
    assert isinstance(connect(), LocalGroup)
    assert not dist.is_initialized()


def test_members_of_an_independent_job_find_each_other_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMOPT_PEERS", "{}")
    monkeypatch.setenv("RANK", "0")
    assert connect() is None
    assert not dist.is_initialized()


def test_mpi_is_refused_where_the_launcher_started_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMOPT_PEERS", "{}")
    with pytest.raises(ConfigError, match="commopt launch has started these ranks"):
        connect("mpi")


@pytest.mark.parametrize("name", NAMES)
def test_without_torch_distributed_a_model_is_not_wrapped(name: str) -> None:
    model = nn.Linear(2, 2)
    assert commopt.wrap(model, commopt.build(name)) is model


def wrapped_types(process_group: dist.ProcessGroup) -> list[str]:
    models = [commopt.wrap(nn.Linear(2, 2), commopt.build(name), process_group=process_group) for name in NAMES]
    return [type(model).__name__ for model in models]


def test_ddp_wraps_a_model_for_methods_that_exchange_in_every_step(pool: Pool) -> None:
    assert pool.run(2, wrapped_types) == [["DistributedDataParallel", "DistributedDataParallel", "Linear"]] * 2
