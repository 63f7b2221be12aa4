"""What is looked at before anything is attached, and how a run finds the other ranks."""

from __future__ import annotations

import json
import os
import threading
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Module, Parameter
from torch.utils.weak import WeakIdKeyDictionary

from commopt.errors import AttachError
from commopt.groups import Group, LocalGroup, PacedGroup, Peers, SimGroup, SimWorld, TcpPeers, TorchGroup
from commopt.groups.tcp import Membership, listen_anywhere
from commopt.method import Method
from commopt.plan.links import LinkModel

ATTACHED = WeakIdKeyDictionary()  # models and their parameters; not an attribute of the model, which must stay picklable
_attaching = threading.Lock()  # simulated ranks attach at the same time
HALF = (torch.float16, torch.bfloat16)


def has_closure(args: Any, kwargs: Any) -> bool:
    """Whether `step` was called with one, by what its hooks get; args[0] is the optimizer, and wrappers pass None on."""
    return any(x is not None for x in (*args[1:], *(kwargs or {}).values()))


def connect(process_group: dist.ProcessGroup | None = None) -> Group:
    """The group that integrations use unless they are given one: ranks of the job, in a process group of its own.

    One rank alone where torch.distributed is not initialised. Under `emulate: paced`, the launcher's links slow it down.
    """
    if not dist.is_initialized():
        return LocalGroup()
    group: Group = TorchGroup.like(process_group)
    links = os.environ.get("COMMOPT_LINKS")
    return PacedGroup(group, LinkModel.from_json(links)) if links else group


def connect_peers(group: Group | Peers | None = None) -> Peers:
    """The peers that outer methods use: those given, those of the launcher's environment, or a group's ranks."""
    if isinstance(group, Peers):
        return group
    if isinstance(group, SimGroup):
        return group.peers
    if group is None and (membership := Membership.from_environment()) is not None:
        links = os.environ.get("COMMOPT_LINKS")
        return TcpPeers(membership, links=LinkModel.from_json(links) if links else None)
    if isinstance(group, LocalGroup) or (group is None and not dist.is_initialized()):
        alone: SimWorld[None] = SimWorld(1)
        return SimGroup(alone, 0).peers
    group = group or TorchGroup()
    listener, address = listen_anywhere()
    told = group.tell(json.dumps([*address, os.getpid()]))
    members = tuple((host, port) for host, port, _ in map(json.loads, told))
    return TcpPeers(Membership(group.rank, members, told[0]), listener=listener)


def note_attached(model: Module) -> None:
    """Remember that a method is attached to this model."""
    with _attaching:
        ATTACHED.update(dict.fromkeys((model, *model.parameters())))


def note_detached(model: Module) -> None:
    """Forget it again."""
    with _attaching:
        for one in (model, *model.parameters()):
            ATTACHED.pop(one, None)  # type: ignore[no-untyped-call]


def check_wrapping(model: Module) -> None:
    """Raise AttachError for a model inside which another wrapper averages gradients already."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, torch.nn.parallel.DistributedDataParallel | torch.nn.DataParallel):
            where = f"{type(model).__name__} has a {kind} inside ({name or 'itself'})"
            fix = "attach to that one, before anything else is wrapped around it (torch.compile too)"
        elif kind.startswith("FSDP") or any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
            where = f"{name or type(model).__name__} is sharded by {'FSDP1' if kind == 'FullyShardedDataParallel' else 'FSDP2'}"
            fix = "use fully_shard for the whole model, and commopt.frameworks.fsdp"
        else:
            continue
        raise AttachError(f"{where}, which averages gradients itself; {fix}")


class RefusesDDP:
    """Raises AttachError in a forward inside a DDP that was put around the model, or around what holds it, after attach.

    By forward pre-hooks of all modules with parameters, until `remove` after the first step. A copy of the model gets none.
    """

    def __init__(self, model: Module, method: str) -> None:
        self._method = method
        owners = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
        self._handles = [module.register_forward_pre_hook(self) for module in owners]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __call__(self, module: Module, _: Any) -> None:
        if torch.compiler.is_compiling():
            return
        active = torch.nn.parallel.DistributedDataParallel._active_ddp_module
        if active is not None and active.process_group.size() > 1 and any(one is module for one in active.modules()):
            raise AttachError(
                f"this model was wrapped in DDP after {self._method} had been attached to it, and gradients would be averaged twice: "
                "wrap it first, and attach to the wrapped model"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return _Nothing, ()


class _Nothing:
    def __call__(self, *_: Any) -> None:
        pass


def check_steps(optimizer: Any) -> None:
    """Raise AttachError for an optimizer whose steps cannot be followed."""
    if isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        raise AttachError(
            f"{type(optimizer).__name__} is a wrapper: use its framework's integration, or pass the optimizer inside"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise AttachError(
            "LBFGS evaluates the loss several times in a step, by a closure, and gradients are exchanged once: use another optimizer"
        )


def check_parameters(model: Module, method: Method, optimizer: torch.optim.Optimizer) -> dict[str, Parameter]:
    """The trainable parameters by name, in registration order. Raises AttachError for any that the method cannot serve."""
    if hasattr(method, "state"):
        raise AttachError(f"this {method.name} was attached to a model before; build another one")
    with _attaching:
        is_attached = any(one in ATTACHED for one in (model, *model.parameters()))
    if is_attached:
        raise AttachError("a method is attached to this model already; close() what attach returned first")
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise AttachError("the model has no trainable parameter")
    if len(devices := {p.device for p in named.values()}) > 1:
        raise AttachError(
            f"the parameters are on several devices ({', '.join(sorted(map(str, devices)))}); one per rank is supported"
        )
    if any(x.device.type == "meta" for x in (*model.parameters(), *model.buffers())):
        raise AttachError(
            "parameters or buffers are on the meta device: give them storage first, as by model.to_empty(device='cpu')"
        )
    for module_name, module in model.named_modules():
        if getattr(module, "sparse", False) is True:
            raise AttachError(
                f"{module_name}: sparse gradients are not supported; build the embedding with sparse=False"
            )
    for name, p in named.items():
        if not p.dtype.is_floating_point:
            raise AttachError(f"{name}: {p.dtype} parameters are not supported")
        if method.needs_float32 and p.dtype not in (torch.float32, *HALF):
            raise AttachError(
                f"{name}: {method.name} works in float32, and would lose precision of {p.dtype}; use dense"
            )
        if not p.is_contiguous():
            raise AttachError(f"{name} is not contiguous in memory (channels_last?); call .contiguous() on the model")
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    strangers = known - {id(p) for p in model.parameters()}
    if strangers:
        raise AttachError("the optimizer holds parameters that are not this model's; build it from model.parameters()")
    for name, p in named.items():
        if id(p) not in known:
            raise AttachError(
                f"the optimizer does not hold the trainable parameter {name}; attach takes one optimizer with all of them"
            )
    return named
