"""What attach refuses of an FSDP2 model, with the fix in the message."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsdp_rig import Uneven, mesh_of, sgd, sharded, train
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard

import commopt
from commopt.errors import CommoptError
from commopt.groups import LocalGroup, TorchGroup

Attempt = Callable[[], object]


def attach(method: Any, model: Any = None, optimizer: Any = None, **options: Any) -> None:
    model = sharded(mesh_of(2, 2)) if model is None else model
    commopt.attach(model, method, optimizer or sgd(model), **options)


def one_dimension(method: Any) -> Attempt:
    return lambda: attach(method, sharded(mesh_of(4)))


def on_two_meshes() -> None:
    model = Uneven()
    fully_shard(model.first, mesh=mesh_of(4))
    attach("ef_sign", fully_shard(model, mesh=mesh_of(2, 2)))


def on_ignored_parameters() -> None:
    model = Uneven()
    attach("ef_sign", fully_shard(model, mesh=mesh_of(2, 2), ignored_params={model.scale}))


def on_a_part() -> None:
    model = Uneven()
    fully_shard(model.first, mesh=mesh_of(2, 2))
    attach("ef_sign", model)


def on_the_first_fsdp() -> None:
    model = FullyShardedDataParallel(Uneven(), mesh_of(2, 2).get_group("shard"), device_id=torch.device("cpu"))
    attach("ef_sign", model)


def on_nothing() -> None:
    model = fully_shard(nn.Tanh(), mesh=mesh_of(4))
    attach("ef_sign", model, sgd(nn.Linear(1, 1)))


def changed(change: Callable[[Any], object], method: str = "ef_sign", shape: Sequence[int] = (2, 2)) -> Attempt:
    """An attempt to attach to a sharded model that was changed before."""

    def attempt() -> None:
        model = sharded(mesh_of(*shape))
        change(model)
        attach(method, model)

    return attempt


def on_a_compiled_model() -> None:
    model, compiled = sharded(mesh_of(2, 2)), nn.Module()
    compiled._orig_mod = model  # as torch.compile does, whose import takes seconds on every rank
    attach("ef_sign", compiled, sgd(model))


CASES: dict[str, tuple[Attempt, str]] = {
    "only a part is sharded": (on_a_part, "first is sharded by FSDP2.*use fully_shard for the whole model"),
    "LAMB": (lambda: attach("onebit_lamb"), "it needs norms of whole parameters"),
    "outer method": (lambda: attach("diloco"), "FSDP2 shards over all ranks: there is one replica"),
    "max_norm": (lambda: attach("onebit_adam", max_norm=1.0), "clips before the exchange.*use a gradient method"),
    "scaler": (lambda: attach("ef_sign", grad_scaler=torch.amp.GradScaler("cpu")), "train in bfloat16"),
    "overlap": (lambda: attach("ef_sign", overlap=False), "overlap=False with FSDP2.*leave overlap out"),
    "one scale": (lambda: attach("dice_sgd"), "one norm or scale for the whole model"),
    "first FSDP": (on_the_first_fsdp, "use torch.distributed.fsdp.fully_shard instead"),
    "one replica": (
        lambda: attach("ef_sign", sharded(mesh_of(1, 4))),
        "a mesh with one replica: there is nothing to average",
    ),
    "replicated": (
        lambda: attach("ef_sign", replicate(Uneven(), mesh=mesh_of(4))),
        "root: a mesh without a shard dimension.*use DistributedDataParallel",
    ),
    "no parameter": (on_nothing, "no trainable parameter"),
    "half precision": (
        lambda: attach("ef_sign", sharded(mesh_of(2, 2), mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float16))),
        "root: float16 gradients.*divides them in two parts",
    ),
    "two meshes": (on_two_meshes, "several meshes in its modules.*with the same mesh everywhere"),
    "ignored": (on_ignored_parameters, "scale among ignored_params"),
    "empty shard": (
        lambda: attach("two_way(int8)", fully_shard(nn.Linear(8, 3), mesh=mesh_of(4))),
        "shard 3 of 4 without an element",
    ),
    "hook": (
        changed(lambda model: model.first.set_all_reduce_hook(lambda _: None)),
        "first: an all-reduce hook of your own",
    ),
    "sum": (changed(lambda model: model.set_force_sum_reduction_for_comms(True)), "set_force_sum_reduction_for_comms"),
    "factor": (
        changed(lambda model: model.first.set_gradient_divide_factor(1.0), "two_way(int8)", (4,)),
        "first: set_gradient_divide_factor",
    ),
    "other torch": (  # without a private name
        changed(lambda model: delattr(model.second._get_fsdp_state()._fsdp_param_groups[0], "_all_reduce_hook")),
        rf"FSDP2 of torch {re.escape(torch.__version__)}, which has no FSDPParamGroup\._all_reduce_hook",
    ),
    "other meshes": (
        changed(
            lambda model: delattr(model._get_fsdp_state()._fsdp_param_groups[0].mesh_info, "replicate_process_group")
        ),
        r"has no HSDPMeshInfo\.replicate_process_group",
    ),
    "compiled": (on_a_compiled_model, "attach to the sharded model first, then compile it"),
    "wrong group": (
        lambda: attach("ef_sign", group=TorchGroup(mesh_of(2, 2).get_group("shard"))),
        "group: TorchGroup: its ranks are not those that hold this shard",
    ),
    "local group": (lambda: attach("ef_sign", group=LocalGroup()), "group: LocalGroup: .* pass TorchGroup"),
    "dense alone": (one_dimension("dense"), "FSDP's own reduce-scatter is exact"),
    "sparse alone": (one_dimension("top_k"), "give FSDP a mesh with a replicate dimension"),
    "momentum alone": (
        one_dimension({"name": "powersgd"}),
        "powersgd on a mesh of one dimension: it cannot.*; use two_way",
    ),
    "server": (one_dimension("two_way(sign, int8)"), "has no answers to compress"),
    "dense_1d": (one_dimension({"name": "qsgd", "dense_1d": True}), "dense_1d of qsgd on a mesh of one dimension"),
    "one scale alone": (one_dimension("two_way(sign_l2)"), "use int8, 4bit"),
}


@pytest.mark.ranks("fsdp", 4)
@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_refused_on_every_rank(case: str) -> None:
    work, pattern = CASES[case]
    with pytest.raises(CommoptError, match=pattern):
        work()


@pytest.mark.ranks("fsdp", 4)
def test_an_optimizer_may_have_state_before_attach() -> None:
    model = sharded(mesh_of(2, 2))
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, dist.get_rank(), 2)  # as after a checkpoint: each rank has state of its own shards
    with commopt.attach(model, "ef_sign", optimizer) as run:
        train(model, optimizer, dist.get_rank(), 1)
        assert run.traffic.payload_bytes > 0
