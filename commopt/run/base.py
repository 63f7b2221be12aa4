"""What every integration does around a method's exchange: checks, units, void buckets and the optimizer's step."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from commopt.errors import AttachError, GradientsChanged
from commopt.exchange.mean import Aggregator, State
from commopt.gossip.loop import OuterLoop
from commopt.groups import Group, LocalGroup, PacedGroup, Peers, SimGroup, SimWorld, TcpPeers, TorchGroup
from commopt.groups.tcp import Membership, listen_anywhere
from commopt.optim.update import UpdateMethod
from commopt.plan.links import LinkModel
from commopt.wire.bucket import Bucket
from commopt.wire.payload import Payload

_log = logging.getLogger(__name__)
ATTACHED: weakref.WeakSet[Module] = weakref.WeakSet()  # not an attribute of the model, which must stay picklable
_attaching = threading.Lock()  # simulated ranks attach at the same time
_HALF = (torch.float16, torch.bfloat16)


class Attachment:
    """A method at work in a training script: what `attach` returns.

    voided: (step, parameter name) of every bucket that a NaN or an inf on some rank made void; the same on all ranks, but for
        local steps, which exchange nothing: those are in the list of the rank that had the NaN.
    waited_s: seconds that this rank has spent waiting for exchanges, beyond those that backward hid.
    group.traffic: the bytes that this rank has sent.
    """

    def __init__(
        self, model: Module, method: Aggregator, optimizer: torch.optim.Optimizer | None, group: Group
    ) -> None:
        self.method, self.group = method, group
        self.optimizer = check_optimizer(method, optimizer)
        self.is_update_method = isinstance(method, torch.optim.Optimizer)
        self.parameters = check_parameters(model, method, self.optimizer)
        self.voided: list[tuple[int, str]] = []
        self.waited_s = 0.0
        self.steps = 0
        self._voids = 0
        self._void_names: set[str] = set()
        # parameter name -> its gradient when backward had ended, and the version of that
        self._exchanged: dict[str, tuple[Tensor | None, int]] = {}
        self._known = {id(p) for p in self.parameters.values()}
        self._rollback: dict[str, list[tuple[Tensor, Tensor]]] = {}
        group.traffic.method = method.name
        method.bind(self.served(), group)
        self.model = model
        note_attached(model)
        self._handles: list[Any] = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]

    def served(self) -> list[tuple[str, Tensor]]:
        """What the method keeps state for: the parameters by name, in registration order."""
        return list(self.parameters.items())

    def detach(self) -> None:
        """Take the method out of the optimizer again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if isinstance(self.method, UpdateMethod):
            self.method.is_attached = False
        note_detached(self.model)

    def comm_state(self) -> State:
        """What a checkpoint must hold of the method."""
        return self.method.comm_state()

    def load_comm_state(self, state: State) -> None:
        """Continue bit for bit from the `comm_state` of this rank."""
        self.method.load_comm_state(state)

    def checkpoint_folder(self, folder: Path) -> Path:
        """Where this rank's checkpoint goes: all ranks write one together."""
        return folder

    def bucket_layout(self) -> list[list[str]]:
        """The parameters of each bucket that was exchanged last, for a checkpoint; empty where it never changes."""
        return []

    def resume_bucket_layout(self, layout: list[list[str]]) -> None:
        """Exchange in these buckets until the framework has made the same ones: sums depend on where an element lies."""

    @contextmanager
    def communication_off(self) -> Iterator[None]:
        """Train this rank alone inside the block, to time arithmetic without the network.

        Replicas drift apart, and an update method's momentum with them: use it at the end of a run, or before loading a checkpoint.
        """
        group, self.group = self.group, LocalGroup()
        try:
            yield
        finally:
            self.group = group

    def replicas_are_equal(self) -> bool:
        """Whether every rank holds the same parameters, bit for bit; all ranks must ask. Sends 32 bytes."""
        digest = hashlib.sha256()
        for p in self.parameters.values():
            digest.update(p.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
        device = next(iter(self.parameters.values())).device
        own = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8).to(device)
        self.group.traffic.bucket = "parameter hashes"
        every = self.group.all_gather(Payload.of(own))
        return all(torch.equal(own, other.tensors[0]) for other in every)

    def run(self, buckets: Sequence[Bucket]) -> None:
        """Exchange buckets: what is in them afterwards is the method's mean, or what says that the bucket is void."""
        if self.is_update_method:
            for name in (name for bucket in buckets for name in bucket.names if name in self._exchanged):
                raise GradientsChanged(
                    f"{name}: a second exchange before {self.method.name}.step(), which must follow every one; to accumulate "
                    "gradients over several backwards, run all but the last under model.no_sync(); and it is this method that must step, "
                    "not another optimizer"
                )
        for bucket in buckets:
            self._void_names.difference_update(bucket.names)
        scaler = self.method.grad_scaler
        scale = float(scaler.get_scale()) if scaler is not None else 1.0
        if self.method.is_linear:
            scale = 1.0  # nothing is kept from step to step, and half precision on the wire needs the scale
        work = [self._unscaled(bucket, scale) for bucket in buckets]
        is_local = self.method.is_local
        self.method.exchange(work, self.group)
        for bucket, done in zip(buckets, work, strict=True):
            for name in bucket.names:
                self._exchanged[name] = (None, -1)
            if done.void is not None and is_local:
                self._record_local(bucket, done.void)
                bucket.flat.zero_()  # finite, so that no rank skips a step that the others take
                continue
            if done.void is not None:
                self._record_void(bucket, done.void)
                # a GradScaler, known to us or not, finds the NaN on every rank alike, skips the step and lowers its scale
                bucket.flat.fill_(0.0 if self.is_update_method and scaler is None else math.nan)
                continue
            if done is not bucket:
                bucket.flat.copy_(done.flat)
            if scale != 1.0 and not self.is_update_method:
                bucket.flat.mul_(scale)

    def note_versions(self) -> None:
        """Remember the gradients as backward left them, so that `step` sees a change."""
        for name in self._exchanged:
            grad = self.parameters[name].grad
            self._exchanged[name] = (grad, -1 if grad is None else grad._version)

    def save_for_rollback(self, bucket: Bucket) -> None:
        """Keep the state of parameters without any gradient here, in case that no rank has one."""
        for name, x in bucket.views():
            if name not in self._rollback and not bool(x[:8].any()) and not bool(x.any()):
                self._rollback[name] = [(view, view.clone()) for view in self.method.state_views(name)]

    def _unscaled(self, bucket: Bucket, scale: float) -> Bucket:
        if scale == 1.0 and not (self.method.needs_float32 and bucket.flat.dtype in _HALF):
            return bucket
        dtype = torch.float32 if self.method.needs_float32 else bucket.flat.dtype
        return bucket.with_flat(bucket.flat.to(dtype) / scale)

    def _record_void(self, bucket: Bucket, name: str) -> None:
        bucket.void = name
        self._void_names.update(bucket.names)
        self.voided.append((self.steps, name))
        self._voids += 1
        if self.group.rank == 0 and (self._voids & (self._voids - 1)) == 0:  # the 1st, 2nd, 4th, 8th ...
            _log.warning(
                "step %d: %s has a NaN or an inf in its gradient on some rank; %s is left out of this step on all ranks%s",
                self.steps,
                name,
                bucket.label,
                f" (the {self._voids}th time; has the training diverged?)" if self._voids > 2 else "",
            )

    def _record_local(self, bucket: Bucket, name: str) -> None:
        self.voided.append((self.steps, name))
        _log.warning(
            "step %d: %s has a NaN or an inf in its gradient on rank %d; %s is left out of this local step there",
            self.steps,
            name,
            self.group.rank,
            bucket.label,
        )

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any = (), kwargs: Any = None) -> None:
        if has_closure(args, kwargs):
            raise AttachError(
                "optimizer.step() takes no closure here: gradients are exchanged before it; call backward, then step()"
            )
        for group in self.optimizer.param_groups:
            if any(p.grad is not None and id(p) not in self._known for p in group["params"]):
                raise AttachError("a parameter that was frozen at attach has a gradient: detach(), and attach again")
        if self.is_update_method:
            self._check_gradients()
        for name, saved in self._rollback.items():
            grad = self.parameters[name].grad  # None, or the zeros that the user left: used on no rank
            if grad is None or not (self.is_update_method or bool(grad.any())):  # as if it had never been exchanged
                for view, value in saved:
                    view.copy_(value)
        if self._void_names and not self.is_update_method:  # a norm with NaN in it, and clipping by it, has spread them
            self._void_names.update(n for n, p in self.parameters.items() if not _is_finite(p.grad))
        for name in self._void_names:
            self.parameters[name].grad = None

    def _check_gradients(self) -> None:
        # GradScaler.step tests the gradients for infs by multiplying them by one
        allowed = 1 if getattr(self.optimizer, "found_inf", None) is not None else 0
        if allowed and getattr(self.optimizer, "grad_scale", None) is None:
            raise GradientsChanged(
                f"GradScaler.unscale_ has no effect on {self.method.name}: leave it out, and clip by max_norm"
            )
        if allowed and self.method.grad_scaler is None:
            raise GradientsChanged(f"{self.method.name} has to know the scaler: build it with grad_scaler=...")
        for name, p in self.parameters.items():
            if p.grad is None:
                continue
            if name not in self._exchanged:
                raise GradientsChanged(
                    f"{name}: step() without an exchange; was the last backward under no_sync(), or not through the wrapped model, or is "
                    "there a parameter that it did not use (DistributedDataParallel(..., find_unused_parameters=True))?"
                )
            grad, version = self._exchanged[name]
            if version >= 0 and (p.grad is not grad or p.grad._version > version + allowed):
                raise GradientsChanged(
                    f"{name}: the gradient was changed after backward, where it is only a copy of what {self.method.name} "
                    "has exchanged; clip with the option max_norm, and pass a GradScaler as the option grad_scaler"
                )

    def _after_step(self, *_: Any) -> None:
        self._void_names.clear()
        self._exchanged.clear()
        self._rollback.clear()
        self.steps += 1


def has_closure(args: Any, kwargs: Any) -> bool:
    """Whether `step` was called with one, by what its hooks get; args[0] is the optimizer, and wrappers pass None on."""
    return any(x is not None for x in (*args[1:], *(kwargs or {}).values()))


def _is_finite(grad: Tensor | None) -> bool:
    return grad is None or bool(grad.isfinite().all())


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
        ATTACHED.add(model)


def note_detached(model: Module) -> None:
    """Forget it again."""
    with _attaching:
        ATTACHED.discard(model)


def check_wrapping(model: Module) -> None:
    """Raise AttachError for a model inside which another wrapper averages gradients already."""
    if any(base.__name__ == "FSDPModule" for base in type(getattr(model, "_orig_mod", model)).__mro__):
        raise AttachError(
            "this is torch.compile around a sharded model: attach to the sharded model first, then compile it"
        )
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


def check_optimizer(method: Aggregator, optimizer: torch.optim.Optimizer | None) -> torch.optim.Optimizer:
    """The optimizer that applies what the method exchanges. Raises AttachError if it is missing, or one too many."""
    if isinstance(method, torch.optim.Optimizer):
        if optimizer is not None and optimizer is not method:
            raise AttachError(f"{method.name} is an optimizer itself: leave out the {type(optimizer).__name__}")
        return method
    if not isinstance(method, Aggregator):
        raise AttachError(f"{type(method).__name__} is no commopt method; make one with commopt.build(...)")
    check_steps(optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise AttachError(
            f"{method.name} replaces gradients: pass the optimizer that applies them, attach(model, method, optimizer)"
        )
    method.check_optimizer(optimizer)
    return optimizer


def check_steps(optimizer: Any) -> None:
    """Raise AttachError for an optimizer whose steps cannot be followed."""
    if isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        raise AttachError(
            f"{type(optimizer).__name__} is a wrapper: use its framework's integration, as commopt.frameworks.accelerate.attach, or pass "
            "the optimizer inside"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise AttachError(
            "LBFGS evaluates the loss several times in a step, by a closure, and gradients are exchanged once: use another optimizer"
        )


def check_parameters(
    model: Module, method: Aggregator | OuterLoop, optimizer: torch.optim.Optimizer
) -> dict[str, Parameter]:
    """The trainable parameters by name, in registration order. Raises AttachError for any that the method cannot serve."""
    if hasattr(method, "index"):
        raise AttachError(f"this {method.name} was attached to a model before; build another one")
    own = {id(p) for p in model.parameters()}
    with _attaching:
        others = list(ATTACHED)
    if any(other is model or not own.isdisjoint(map(id, other.parameters())) for other in others):
        raise AttachError("a method is attached to this model already; call detach() on what attach returned first")
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
        if isinstance(method, Aggregator) and method.needs_float32 and p.dtype not in (torch.float32, *_HALF):
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
