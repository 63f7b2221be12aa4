"""What every framework's attach does first: resolve the method and optimizer, check everything, and find the other ranks."""

import json
import os
import secrets
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Module, Parameter
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from commopt.choice import Choice
from commopt.errors import AttachError, ConfigError, check_option
from commopt.groups import Group, LocalGroup, PacedGroup, Peers, SimGroup, SimWorld, TcpPeers, TorchGroup, World
from commopt.groups.listening import listen_anywhere
from commopt.groups.membership import Membership
from commopt.method import EveryStep, Kind, Method
from commopt.methods import resolve
from commopt.optim.update import UpdateMethod
from commopt.plan.links import LinkModel
from commopt.run.agree import Configuration, agree, configuration_of, meeting_group
from commopt.run.stand_in import StandIn
from commopt.secret import given_secret

ATTACHED = WeakIdKeyDictionary()  # models and their parameters; an attribute of a model would be pickled with it
_BARE: weakref.WeakKeyDictionary[Module, str] = weakref.WeakKeyDictionary()  # modules and the method that refuses DDP
ATTACHING = threading.Lock()  # held while ATTACHED changes: simulated ranks attach at the same time
HALF = (torch.float16, torch.bfloat16)
_JOB_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # as torchrun and mpirun set it


@dataclass(frozen=True)
class Refusal:
    """One combination that cannot work: a row of the table behind the errors and a page of the docs."""

    fact: str  # the name by which a framework reports it
    framework: str  # which looks for it
    what: str  # these three are the error, with {method}'s name, and the {detail} that the framework found
    why: str
    instead: str
    kinds: Sequence[Kind] = ("gradient", "update", "outer")  # of methods that it concerns

    def text(self, method: str, detail: object = "") -> str:
        """The error's text."""
        return f"{self.what}: {self.why}; {self.instead}".format(method=method, detail=detail)


@cache
def table() -> dict[str, Refusal]:
    """Every refusal by its fact, from refusals.yaml."""
    from commopt.reading import read_yaml  # slow to import

    found: dict[str, Refusal] = {}
    for framework, entries in read_yaml(Path(__file__).with_name("refusals.yaml")).items():
        found |= {fact: Refusal(fact, framework, **entry) for fact, entry in entries.items()}
    return found


def refuse(facts: Mapping[str, object], method: str, kind: Kind) -> None:
    """Raise AttachError for the first fact that holds and concerns a method of this kind.

    facts: by the table's names; the value is falsy, or the detail that the error shows.
    """
    for fact, detail in facts.items():
        if detail and kind in table()[fact].kinds:
            raise AttachError(table()[fact].text(method, detail))


@dataclass(frozen=True)
class Request:
    """The arguments of `attach`."""

    method: Method | type[Method] | Choice
    optimizer: torch.optim.Optimizer | None = None
    group: Group | Peers | None = None
    max_norm: float | None = None
    grad_scaler: torch.amp.GradScaler | None = None
    overlap: bool | None = None

    def joint_decision(self, method: EveryStep) -> str:
        """Why a step's buckets must be exchanged together, after backward: a norm or a decision over all; "" if they need not."""
        if self.max_norm is not None:
            return "max_norm"
        if self.grad_scaler is not None and not method.is_linear:
            return "grad_scaler"
        return f"{method.name} in this form" if method.merges_buckets else ""


@dataclass(frozen=True)
class Checked:
    """A checked request, with the optimizer that will step. Nothing has been changed yet."""

    method: Method
    optimizer: torch.optim.Optimizer
    request: Request
    configuration: Configuration


def check_request(
    framework: str,
    model: Module,
    request: Request,
    meeting: Group,
    facts: Callable[[Method], Mapping[str, object]],
    configuration: Mapping[str, Any] | None = None,
) -> Checked:
    """Resolve and check everything, on every rank; one rank's failure raises on all of them.

    configuration: what else must be equal on all ranks. Raises ConfigError and AttachError.
    """

    def check() -> tuple[Checked, Configuration]:
        method = resolve(request.method)
        of_model = _wrappers_inside(model) if framework != "fsdp" else {}
        if isinstance(request.group, World) and framework not in ("plain", "ddp", "fsdp", "deepspeed"):
            of_model["machines under another framework"] = framework
        refuse({**_general_facts(method, request, model), **facts(method), **of_model}, method.name, method.kind)
        optimizer = _stepping(method, request.optimizer)
        named = check_parameters(model, method, optimizer)
        options = {"max_norm": request.max_norm, "overlap": request.overlap, **(configuration or {})}
        told = configuration_of(framework, method, named, optimizer, model, **options)
        return Checked(method, optimizer, request, told), told

    return agree(meeting, check)


def agree_on_method(request: Request, facts: Mapping[str, object]) -> Method:
    """Resolve the method. Raises on all ranks if that fails, or a fact is refused, on any of them."""

    def check() -> tuple[Method, Configuration]:
        method = resolve(request.method)
        refuse(facts, method.name, method.kind)
        return method, {"method.name": method.name}

    return agree(meeting_group(request.group), check)


def is_outer(method: Method | type[Method] | Choice) -> bool:
    """Whether this is an outer method; False if it cannot be made, for which `check_request` raises on all ranks."""
    try:
        return resolve(method).kind == "outer"
    except ConfigError:
        return False


def _general_facts(method: Method, request: Request, model: Module) -> dict[str, object]:
    if request.max_norm is not None:
        check_option("max_norm", request.max_norm, lambda x: x > 0, "a number above 0, or leave it out")
    if request.grad_scaler is not None and not hasattr(request.grad_scaler, "get_scale"):
        raise ConfigError(
            f"grad_scaler: {type(request.grad_scaler).__name__} has no get_scale(); pass the torch.amp.GradScaler itself"
        )
    if request.overlap not in (None, True, False):
        raise ConfigError(f"overlap: {request.overlap!r} is out of range; write True, False, or leave it out")
    compiled = [base.__name__ for base in type(getattr(model, "_orig_mod", None)).__mro__]
    group = request.group
    between = group.between if isinstance(group, World) else group
    ranks = max(int(text) for key in _JOB_SIZES if (text := os.environ.get(key, "1")).isdigit())
    is_alone = group is None and not dist.is_initialized() and "COMMOPT_PEERS" not in os.environ
    can_be_cut = not isinstance(method, EveryStep) or method.can_be_cut
    return {
        "one of several processes": is_alone and ranks > 1 and ranks,
        "group of another kind": group is not None and not isinstance(group, Group | Peers) and type(group).__name__,
        "max_norm of a private method": request.max_norm is not None and not method.takes_max_norm,
        "outer method and max_norm with a scaler": request.grad_scaler is not None,
        "peers for a synchronous method": isinstance(group, Peers),
        "peers of another run": getattr(between.peers if isinstance(between, SimGroup) else between, "is_used", False),
        "method that cannot be cut": isinstance(group, World) and not can_be_cut,
        "compiled ddp": "DistributedDataParallel" in compiled,
        "compiled fsdp": "FSDPModule" in compiled,
    }


def _stepping(method: Method, optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that will step. Raises AttachError if it is missing, or does not fit the method."""
    kind = type(optimizer).__name__
    given = "it is missing" if optimizer is None else f"got {kind}"
    # SAM steps by the optimizer inside it, in a method that isn't `step`
    is_wrapper = any(isinstance(x, torch.optim.Optimizer) for x in getattr(optimizer, "__dict__", {}).values())
    facts = {
        "optimizer of a method": isinstance(optimizer, StandIn) and f"{optimizer.method.name}'s",
        "wrapped optimizer": not kind.startswith("ZeroRedundancy") and is_wrapper and kind,
        "LBFGS": isinstance(optimizer, torch.optim.LBFGS),
        "no optimizer": not isinstance(optimizer, torch.optim.Optimizer) and given,
    }
    refuse(facts, method.name, method.kind)
    method.check_optimizer(optimizer)
    stepping: torch.optim.Optimizer = optimizer
    if isinstance(method, UpdateMethod):
        try:
            for entry in filter(None, optimizer.state.values()):
                method.translated(entry)
        except ValueError as error:
            raise AttachError(f"{kind} after steps: {error}") from None
        stepping = StandIn(method, optimizer)
    return stepping


def has_closure(args: Any, kwargs: Any) -> bool:
    """Whether `step` was called with a closure, from what its hooks get: args[0] is the optimizer, and wrappers pass None."""
    return any(x is not None for x in (*args[1:], *(kwargs or {}).values()))


def connect(process_group: dist.ProcessGroup | None = None, method: Method | None = None) -> Group:
    """The group that integrations use unless they are given one: the job's ranks, in process groups of its own.

    One rank alone if torch.distributed is not initialised. Under `emulate: paced`, the launcher's links slow it down.
    method: makes it a World, if the launcher has started several ranks on each of several machines, and the method can be cut.
    """
    if not dist.is_initialized():
        return LocalGroup()
    text = os.environ.get("COMMOPT_LINKS")
    links = LinkModel.from_json(text) if text else None
    can_be_cut = isinstance(method, EveryStep) and method.can_be_cut
    if can_be_cut and (machines := machines_of(process_group)):
        inside = TorchGroup.like(process_group, machines)
        between: Group = TorchGroup.like(process_group, list(zip(*machines, strict=True)))
        return World(inside, PacedGroup(between, links.of_one_rank(inside.size)) if links else between)
    group: Group = TorchGroup.like(process_group)
    return PacedGroup(group, links) if links else group


def machines_of(process_group: dist.ProcessGroup | None = None) -> list[list[int]]:
    """The ranks of each machine, as torchrun numbers machines (GROUP_RANK); none unless several have as many ranks, and more than one."""
    numbers = TorchGroup(process_group).tell(os.environ.get("GROUP_RANK", ""))
    machines: dict[str, list[int]] = {}
    for rank, number in enumerate(numbers):
        machines.setdefault(number, []).append(rank)
    sizes = {len(machine) for machine in machines.values()}
    has_levels = "" not in machines and len(machines) > 1 and len(sizes) == 1 and sizes != {1}
    return list(machines.values()) if has_levels else []


def has_other_machines(group: Group | Peers | None, ranks: int) -> bool:
    """Whether there are machines beside the one whose ranks a framework averages gradients among; ranks: how many these are."""
    if group is not None:
        return isinstance(group, World | Peers)
    return "COMMOPT_PEERS" in os.environ or ranks < dist.get_world_size()


def connect_machines(group: Group | Peers | None, machine: Sequence[int] = ()) -> tuple[Peers, Group | None]:
    """This rank's peers on other machines, and the ranks of its own machine if these are one replica; for outer methods.

    machine: the job's ranks among which a framework averages gradients. Without them only a World's machines are replicas. Raises
    AttachError if machines have different numbers of ranks.
    """
    if isinstance(group, World):
        return connect_peers(group.between), group.inside
    if len(machine) < 2:
        return connect_peers(group), None
    machines = [json.loads(text) for text in dict.fromkeys(TorchGroup().tell(json.dumps(sorted(machine))))]
    refuse({"machines of different sizes": len({len(one) for one in machines}) > 1 and f"{machines}"}, "", "outer")
    inside = TorchGroup.like(None, machines, "gloo")
    if group is not None or "COMMOPT_PEERS" in os.environ:  # where torch.distributed knows this machine only
        return connect_peers(group, inside), inside
    between = TorchGroup.like(None, list(zip(*machines, strict=True)), "gloo")
    peers = connect_peers(between, inside)
    between.close()
    return peers, inside


def connect_peers(group: Group | Peers | None = None, inside: Group | None = None) -> Peers:
    """The peers that outer methods use: those given, those of the launcher's environment, or a group's ranks.

    inside: the ranks of this machine, if each has as peers only those of its number.
    """
    if isinstance(group, Peers):
        return group
    if isinstance(group, SimGroup):
        return group.peers
    if group is None and (membership := Membership.from_environment()) is not None:
        text, (number, ranks) = os.environ.get("COMMOPT_LINKS"), (inside.rank, inside.size) if inside else (0, 1)
        links = LinkModel.from_json(text).of_one_rank(ranks) if text else None
        return TcpPeers(membership.of_number(number, ranks), links=links)
    if isinstance(group, LocalGroup) or (group is None and not dist.is_initialized()):
        return SimGroup(SimWorld[None](1), 0).peers
    group = group or TorchGroup()
    listener, address = listen_anywhere()
    told = group.tell(json.dumps([*address, secrets.token_hex(16)]))  # rank 0's is the job's word
    members = tuple((host, port) for host, port, _ in map(json.loads, told))
    return TcpPeers(Membership(group.rank, members, told[0], secret=given_secret()), listener=listener)


def _wrappers_inside(model: Module) -> dict[str, object]:
    """Modules inside a model that average gradients already."""
    found: dict[str, object] = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, torch.nn.parallel.DistributedDataParallel | torch.nn.DataParallel):
            found.setdefault("ddp inside", f"{type(model).__name__} has a {kind} inside ({name or 'itself'})")
        elif kind.startswith("FSDP") or any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
            which = "FSDP1" if kind == "FullyShardedDataParallel" else "FSDP2"
            found.setdefault("fsdp inside", f"{name or type(model).__name__} is sharded by {which}")
    return found


def refuse_ddp(model: Module, method: str, optimizer: torch.optim.Optimizer) -> list[RemovableHandle]:
    """Make forward raise AttachError, until the first step, if the model or a module that holds it was wrapped in DDP after attach."""
    owners = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    _BARE.update(dict.fromkeys(owners, method))
    until_first_step = [module.register_forward_pre_hook(_check_ddp) for module in owners]

    def end(*_: object) -> None:
        while until_first_step:
            until_first_step.pop().remove()

    return [*until_first_step, optimizer.register_step_post_hook(end)]


def _check_ddp(module: Module, _: Any) -> None:
    if torch.compiler.is_compiling() or module not in _BARE:  # it is in a copy of the model
        return
    active = torch.nn.parallel.DistributedDataParallel._active_ddp_module
    if active is not None and active.process_group.size() > 1 and any(one is module for one in active.modules()):
        raise AttachError(
            f"this model was wrapped in DDP after {_BARE[module]} had been attached to it, and gradients would be averaged twice: "
            "wrap it first, and attach to the wrapped model"
        )


def check_parameters(model: Module, method: Method, optimizer: torch.optim.Optimizer) -> dict[str, Parameter]:
    """The trainable parameters by name, in registration order. Raises AttachError for any that the method does not support."""
    own = {id(p) for p in model.parameters()}
    with ATTACHING:
        is_attached = any(one in ATTACHED for one in (model, *model.parameters()))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    devices = sorted({str(p.device) for p in named.values()})
    sparse = [name or "the model" for name, one in model.named_modules() if getattr(one, "sparse", False) is True]
    whole = [f"{name}: {p.dtype}" for name, p in named.items() if not p.dtype.is_floating_point]
    precise = [f"{name}: {p.dtype}" for name, p in named.items() if p.dtype not in (torch.float32, *HALF)]
    odd = [name for name, x in model.named_buffers() if x.is_quantized or x.layout is not torch.strided]
    facts = {
        "used method": hasattr(method, "state"),
        "second method": is_attached,
        "no parameter": not named,
        "several devices": len(devices) > 1 and ", ".join(devices),
        "meta device": any(x.device.type == "meta" for x in (*model.parameters(), *model.buffers())),
        "buffer of another kind": next(iter(odd), None),
        "sparse gradients": next(iter(sparse), None),
        "parameters of another type": next(iter(whole), None),
        "parameters of high precision": method.needs_float32 and next(iter(precise), None),
        "order in memory": next((name for name, p in named.items() if not p.is_contiguous()), None),
        "foreign parameters": bool(known - own),
        "missing parameter": next((name for name, p in named.items() if id(p) not in known), None),
    }
    refuse(facts, method.name, method.kind)
    return named
