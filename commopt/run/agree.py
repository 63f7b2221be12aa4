"""Collective checks: every rank runs its own, and one rank's failure raises on all of them."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

import commopt
from commopt.errors import AttachError, CheckpointError, GroupError
from commopt.groups import Group, LocalGroup, TorchGroup
from commopt.method import Method
from commopt.run.machine import bytes_of

T = TypeVar("T")
Configuration = dict[str, str]  # by dotted keys
_SHOWN = 3  # differences that an error names


def agree(group: Group, check: Callable[[], tuple[T, Configuration]]) -> T:
    """Run `check` on this rank; return its result once all ranks have passed theirs with the same configuration.

    Changes nothing, and traffic does not count it. Raises what `check` raised, and on the other ranks AttachError with that reason. If
    configurations differ, raises AttachError with the differences on all ranks. Raises GroupError if a rank did not come.
    """
    try:
        result, configuration = check()
    except Exception as error:
        with contextlib.suppress(GroupError):  # what `check` raised matters more
            group.tell(json.dumps({"error": _reason(error)}))
        raise
    replies = _told(group, json.dumps({"hash": digest(configuration).hex()}))
    failed = [(rank, reply["error"]) for rank, reply in enumerate(replies) if "error" in reply]
    if failed:
        raise AttachError(f"rank {failed[0][0]} could not attach: {failed[0][1]}; nothing was attached on any rank")
    if len({reply["hash"] for reply in replies}) > 1:
        every = _told(group, json.dumps(configuration))
        raise AttachError(difference(dict(enumerate(every))))
    return result


def together(group: Group, part: Callable[[], T]) -> T:
    """Run `part` on every rank. Raises CheckpointError on all ranks if it fails on any, and GroupError if a rank is gone."""
    return met(group, lambda: (part(), None))[0]


def met(group: Group, part: Callable[[], tuple[T, Any]]) -> tuple[T, list[Any]]:
    """Like `together`, for a `part` that also returns JSON: return its result on this rank, and the JSON of every rank."""
    failure: Exception | None = None
    done: tuple[T, Any] | None = None
    try:
        done = part()
        text = json.dumps(["", done[1]])
    except Exception as error:
        failure, text = error, json.dumps([_reason(error), None])
    try:
        replies = _told(group, text)
    except GroupError:
        if failure is None:
            raise
        raise CheckpointError(_reason(failure)) from failure
    failed = {rank: reason for rank, (reason, _) in enumerate(replies) if reason}
    if not failed:
        return cast("tuple[T, Any]", done)[0], [said for _, said in replies]
    rank, reason = next(iter(failed.items()))
    if len(failed) == group.size and len(set(failed.values())) == 1:
        raise CheckpointError(reason) from failure
    more = f" (and {len(failed) - 1} more ranks failed)" if len(failed) > 1 else ""
    raise CheckpointError(f"rank {rank}: {reason}{more}") from failure


def _told(group: Group, text: str) -> list[Any]:
    """Every rank's JSON, by rank. Equal texts, which most are, become one object."""
    read: dict[str, Any] = {}
    return [read.get(text) or read.setdefault(text, json.loads(text)) for text in group.tell(text)]


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}" if error.filename else error.strerror.lower()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
    return lines[0] if isinstance(error, CheckpointError) else f"{type(error).__name__}: {lines[0]}"


def meeting_group(group: Any, process_group: dist.ProcessGroup | None = None) -> Group:
    """The group for checks, before attach has made one of its own: the group that was given, if it is one."""
    if isinstance(group, Group):
        return group
    return TorchGroup(process_group) if dist.is_initialized() else LocalGroup()


def configuration_of(
    framework: str,
    method: Method,
    named_parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    model: Module,
    **options: Any,
) -> Configuration:
    """What must be equal on all ranks: version, framework, method, model, optimizer and options."""
    name_of = {id(p): name for name, p in named_parameters.items()}
    # outer methods send from the CPU, and ranks may join at different points of a schedule
    is_every_step, stepped = method.kind != "outer", getattr(optimizer, "replaced", optimizer)
    groups = [
        {
            "state": _state(stepped, group["params"]),
            "parameters": [name_of.get(id(p), "frozen") for p in group["params"]],
            **{k: v for k, v in group.items() if k not in ("params", "param_names")},
        }
        for group in optimizer.param_groups
    ]
    kind = type(stepped).__name__
    # frozen parameters and buffers, as they become those of rank 0
    everything = (*model.named_parameters(), *model.named_buffers())
    others = {name: x for name, x in everything if name not in named_parameters}
    trained = enumerate(named_parameters.items())
    return _flattened(
        {
            "commopt": commopt.__version__,
            "framework": framework,
            "method": {"name": method.name, **_attributes(method.options)},
            "optimizer": {"name": kind, "groups": groups if is_every_step else None, **optimizer.defaults},
            "parameters": {name: f"{_kind(p, is_every_step)}, number {k}" for k, (name, p) in trained},
            "others": {name: _kind(x, is_every_step) for name, x in others.items()},
            **options,
        }
    )


def digest(configuration: Configuration) -> bytes:
    """32 bytes that differ where configurations do."""
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).digest()


def difference(configurations: Mapping[int, Configuration]) -> str:
    """The differences between ranks in one line: which key, and which ranks have which value."""
    every = dict.fromkeys(key for one in configurations.values() for key in one)
    told: list[str] = []
    of_another_kind: list[str] = []
    for key in sorted(every, key=_importance):
        if any(key.startswith(other) for other in of_another_kind):
            continue
        ranks_of: dict[str, list[int]] = {}
        for rank, one in configurations.items():
            ranks_of.setdefault(one.get(key, "missing"), []).append(rank)
        if len(ranks_of) > 1:
            if key in ("method.name", "optimizer.name"):  # its other settings then differ, too
                of_another_kind.append(key.removesuffix("name"))
            told.append(f"{key} is " + " and ".join(f"{value:.80} on {listed(r)}" for value, r in ranks_of.items()))
    more = f"; and {len(told) - _SHOWN} more differences" if len(told) > _SHOWN else ""
    return f"the ranks' configurations differ: {'; '.join(told[:_SHOWN])}{more}; give every rank the same"


def _importance(key: str) -> int:
    if key in ("commopt", "framework", "method.name", "optimizer.name"):
        return 0
    return 1 if key.startswith(("parameters.", "others.")) else 2


def _state(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Any:
    if any(hasattr(p, "to_local") for p in parameters):
        return "sharded"  # each rank has a part of its own
    return [optimizer.state.get(p, {}) for p in parameters] if optimizer.state else "empty"


def _kind(x: Tensor, with_device: bool) -> str:
    kind = f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"
    return f"{kind} on {x.device.type}" if with_device else kind


def _attributes(thing: Any) -> dict[str, Any]:
    return {key.lstrip("_"): value for key, value in sorted(vars(thing).items()) if not callable(value)}


def _flattened(value: Any, key: str = "") -> Configuration:
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, list | tuple | set | frozenset):
        items = enumerate(value)
    elif isinstance(value, Tensor):
        if value.numel() == 1:
            return {key: str(value.item())}
        return {key: f"{list(value.shape)} {hashlib.sha256(bytes_of(value).numpy().data).hexdigest()[:12]}"}
    elif value is None or isinstance(value, bool | int | float | str):
        return {key: str(value)}
    elif isinstance(value, Module) or not type(value).__module__.startswith("commopt"):
        return {key: type(value).__name__}  # a GradScaler, a Generator: its state is not a setting
    else:
        items = {"kind": type(value).__name__, **_attributes(value)}.items()
    return {k: x for name, one in items for k, x in _flattened(one, f"{key}.{name}" if key else str(name)).items()}


def listed(ranks: Sequence[int]) -> str:
    """Ranks for a message: "rank 1", "ranks 0, 2"."""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
