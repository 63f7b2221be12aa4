"""Every rank checks for itself, and all ranks hear how it went: what fails on one rank fails on all, and nobody waits for it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

import commopt
from commopt.errors import AttachError, GroupError
from commopt.groups import Group, LocalGroup, Peers, TorchGroup
from commopt.method import Method

T = TypeVar("T")
Configuration = dict[str, Any]
_SHOWN = 3  # differences that an error names
_JOB_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # as torchrun and mpirun say it
_LONG = 80  # characters of a value that it shows


def agree(group: Group, check: Callable[[], tuple[T, Configuration]]) -> T:
    """Run `check` on this rank; return its result once all ranks have passed theirs with the same configuration.

    Before anything is changed, and outside the counted traffic. Raises what `check` raised; on the other ranks AttachError with that,
    or, on all ranks, AttachError with what the configurations differ in. GroupError where a rank did not come.
    """
    try:
        result, configuration = check()
    except Exception as error:
        if group.size > 1:
            line = (str(error) or "no reason given").splitlines()[0]
            with contextlib.suppress(GroupError):  # what went wrong here is told by its own error
                group.tell(json.dumps({"error": f"{type(error).__name__}: {line}"}))
        raise
    if group.size == 1:
        return result
    replies = [json.loads(text) for text in group.tell(json.dumps({"hash": digest(configuration).hex()}))]
    failed = [(rank, reply["error"]) for rank, reply in enumerate(replies) if "error" in reply]
    if failed:
        raise AttachError(f"rank {failed[0][0]} could not attach: {failed[0][1]}; nothing was attached on any rank")
    if len({reply["hash"] for reply in replies}) > 1:
        every = [json.loads(text) for text in group.tell(_canonical(configuration))]
        raise AttachError(difference(dict(enumerate(every))))
    return result


def meeting_group(group: Any, process_group: dist.ProcessGroup | None = None) -> Group:
    """Where ranks meet before their attach has a group of its own: the group that was given, if it is one."""
    if isinstance(group, Group):
        return group
    return TorchGroup(process_group) if dist.is_initialized() else LocalGroup()


def check_group(group: Any) -> None:
    """Raise AttachError for something that is not a group, and for one rank alone in a job of several."""
    ranks = max(int(text) for key in _JOB_SIZES if (text := os.environ.get(key, "1")).isdigit())
    if group is None and ranks > 1 and not dist.is_initialized() and "COMMOPT_PEERS" not in os.environ:
        raise AttachError(
            f"this process is one of {ranks}, and torch.distributed is not initialised: call torch.distributed.init_process_group() before "
            "attach, or pass group=commopt.groups.MPIGroup() under mpirun, or group=commopt.groups.LocalGroup() for a rank by itself"
        )
    if group is not None and not isinstance(group, Group | Peers):
        hint = "; pass TorchGroup(process_group)" if isinstance(group, dist.ProcessGroup) else ""
        raise AttachError(f"group: {type(group).__name__} is not a commopt.groups.Group{hint}")


def configuration_of(
    framework: str,
    method: Method,
    named_parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    model: Module,
    **options: Any,
) -> Configuration:
    """What ranks must have in common: version, method, model, optimizer and how they are put together, as JSON.

    model: whose frozen parameters and buffers are made those of rank 0, too.
    """
    name_of = {id(p): name for name, p in named_parameters.items()}
    groups: Any = None
    # outer methods: messages leave from the CPU, and ranks may have come at different moments of a schedule
    is_every_step = method.kind != "outer"
    if is_every_step:
        groups = [
            {
                "state": _state(optimizer, group["params"]),
                "parameters": [name_of.get(id(p), "frozen") for p in group["params"]],
                **{k: _plain(v) for k, v in sorted(group.items()) if k not in ("params", "param_names")},
            }
            for group in optimizer.param_groups
        ]
    kind = type(getattr(optimizer, "replaced", optimizer)).__name__
    others = {
        name: x for name, x in (*model.named_parameters(), *model.named_buffers()) if name not in named_parameters
    }
    trained = enumerate(named_parameters.items())
    return {
        "commopt": commopt.__version__,
        "framework": framework,
        "method": {"name": method.name, **_attributes(method.options)},
        "optimizer": {"name": kind, "groups": groups, **_plain(dict(optimizer.defaults))},
        "parameters": {name: f"{_kind(p, is_every_step)}, number {k}" for k, (name, p) in trained},
        "others": {name: _kind(x, is_every_step) for name, x in others.items()},
        **options,
    }


def digest(configuration: Configuration) -> bytes:
    """32 bytes that differ where configurations do."""
    return hashlib.sha256(_canonical(configuration).encode()).digest()


def difference(configurations: Mapping[int, Configuration]) -> str:
    """What differs between ranks, in a line: which key, and who has which value."""
    flat = {rank: dict(_flattened(one)) for rank, one in configurations.items()}
    every = dict.fromkeys(key for one in flat.values() for key in one)
    told: list[str] = []
    of_another_kind: list[str] = []
    for key in sorted(every, key=_importance):
        if any(key.startswith(other) for other in of_another_kind):
            continue
        ranks_of: dict[str, list[int]] = {}
        for rank, one in flat.items():
            ranks_of.setdefault(one.get(key, "missing"), []).append(rank)
        if len(ranks_of) > 1:
            if key in ("method.name", "optimizer.name"):  # whose other settings differ then, too
                of_another_kind.append(key.removesuffix("name"))
            told.append(f"{key} is " + " and ".join(f"{_short(value)} on {listed(r)}" for value, r in ranks_of.items()))
    more = f"; and {len(told) - _SHOWN} more differences" if len(told) > _SHOWN else ""
    return f"the ranks' configurations differ: {'; '.join(told[:_SHOWN])}{more}; give every rank the same"


def _importance(key: str) -> int:
    if key in ("commopt", "framework", "method.name", "optimizer.name"):
        return 0
    return 1 if key.startswith(("parameters.", "others.")) else 2


def _state(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Any:
    if any(hasattr(p, "to_local") for p in parameters):
        return "sharded"  # each rank has a part of its own
    return _plain([optimizer.state.get(p, {}) for p in parameters]) if optimizer.state else "empty"


def _kind(x: Tensor, with_device: bool) -> str:
    kind = f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"
    return f"{kind} on {x.device.type}" if with_device else kind


def _canonical(configuration: Configuration) -> str:
    return json.dumps(configuration, sort_keys=True)


def _attributes(thing: Any) -> Configuration:
    """The settings of a method or a codec."""
    return {key.lstrip("_"): _plain(value) for key, value in sorted(vars(thing).items()) if not callable(value)}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, Tensor):
        if value.numel() == 1:
            return repr(value.item())
        content = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return f"{list(value.shape)} {hashlib.sha256(content).hexdigest()[:12]}"
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [_plain(one) for one in value]
    if isinstance(value, Module) or not type(value).__module__.startswith("commopt"):
        return type(value).__name__  # a GradScaler, a Generator: its state is not a setting
    return {"kind": type(value).__name__, **(_attributes(value) if hasattr(value, "__dict__") else {})}


def _flattened(configuration: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(configuration, dict):
        items: Any = configuration.items()
    elif isinstance(configuration, list) and any(isinstance(one, dict) for one in configuration):
        items = enumerate(configuration)
    else:
        return [(prefix, json.dumps(configuration) if isinstance(configuration, list) else str(configuration))]
    return [pair for key, value in items for pair in _flattened(value, f"{prefix}.{key}" if prefix else str(key))]


def _short(value: str) -> str:
    return value if len(value) <= _LONG else f"{value[:_LONG]}..."


def listed(ranks: Sequence[int]) -> str:
    """Ranks as a message names them: "ranks 0, 2"."""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
