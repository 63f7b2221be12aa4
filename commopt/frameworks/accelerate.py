"""A method in a loop of Hugging Face Accelerate: one call after `accelerator.prepare`."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from commopt.choice import Choice, read_choice
from commopt.errors import AttachError, MissingExtra
from commopt.exchange.mean import Aggregator
from commopt.frameworks import ddp, plain
from commopt.gossip.loop import OuterLoop
from commopt.groups import Group, Peers
from commopt.methods import build, is_update_method
from commopt.run.agree import agree, meeting_group
from commopt.run.base import Attachment
from commopt.run.outer import OuterAttachment
from commopt.run.rank_state import load_rank_state, read_rank_states, save_rank_state
from commopt.run.stand_in import move_schedulers, refuse_steps, stand_in

try:
    from accelerate.optimizer import AcceleratedOptimizer, patch_optimizer_step
    from accelerate.utils import DistributedType
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "accelerate":
        raise
    raise MissingExtra("commopt.frameworks.accelerate", "accelerate", "accelerate") from None

_log = logging.getLogger(__name__)


def attach(
    accelerator: Any,
    model: Module,
    method: Aggregator | OuterLoop | Choice,
    optimizer: torch.optim.Optimizer | None = None,
    group: Group | Peers | None = None,
    *,
    overlap: bool | None = None,
    **options: Any,
) -> Any:
    """Exchange by any method in a loop of Accelerate; returns the attachment of the integration that does it.

    model: what `accelerator.prepare` returned. method: what `commopt.build` made, or takes. optimizer: the prepared one, found where
    there is only one for this model. A choice as "onebit_adam" takes the place of a prepared Adam, in its schedulers too; an
    update method that was built is given to `prepare` as the optimizer, and found. overlap: exchange during backward; None for
    wherever the method can (DDP only). options: for FSDP2 and DeepSpeed, what their integrations take.

    `accumulate`, `clip_grad_norm_` (gradient methods), mixed precision and `save_state`/`load_state` work as ever: what each rank
    still has to send is saved beside the rest, in `commopt_rank0.pt` and so on. For an outer method
    prepare the model by `accelerator.prepare_model(model, evaluation_mode=True)`, which leaves DDP out.

    Raises AttachError if they do not fit together, on every rank, and ConfigError for a method that does not exist.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _attach_to_engine(accelerator, model, method, optimizer, group, overlap, options)
    if getattr(accelerator, "is_fsdp2", False):
        agree(meeting_group(group), lambda: (_has_no_overlap("FSDP2", overlap), {}))
        return _integration("fsdp").attach(model, method, _inner(optimizer), group, **options)
    if options:
        raise TypeError(f"attach() got an unexpected keyword argument {next(iter(options))!r}")
    plan = agree(meeting_group(group), lambda: (_plan(accelerator, model, method, optimizer, overlap), {}))
    undo = [_take_place(plan)] if plan.replaced is not None else []
    try:
        attachment = _attached(plan, group, overlap)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    attachment._handles += _keep_in_checkpoints(accelerator, attachment)
    return attachment


def _attach_to_engine(
    accelerator: Any, model: Any, method: Any, optimizer: Any, group: Any, overlap: bool | None, options: dict[str, Any]
) -> Any:
    """Hand over to DeepSpeed's integration, which checks the optimizer, and has to know of schedules that Accelerate steps."""
    agree(meeting_group(group), lambda: (_has_no_overlap("DeepSpeed", overlap), {}))
    before = getattr(model, "optimizer", None)
    schedulers = [one.scheduler for one in accelerator._schedulers]
    given = {"schedulers": schedulers, **options}
    attachment = _integration("deepspeed").attach(model, method, _inner(optimizer), group, **given)
    for one in accelerator._optimizers:
        if one.optimizer is before:
            one.optimizer = model.optimizer  # an update method, where it has taken the place of the engine's
    return attachment


def _has_no_overlap(framework: str, overlap: bool | None) -> bool:
    if overlap is not None:
        raise AttachError(f"overlap: has no effect under {framework}, whose integration decides itself; leave it out")
    return True


@dataclass(frozen=True)
class _Plan:
    """Who is put together with whom. replaced: the optimizer whose place the method takes, with its schedulers."""

    accelerator: Any
    model: Any  # DDP, or the user's own module
    method: Any
    prepared: Any  # AcceleratedOptimizer
    replaced: torch.optim.Optimizer | None
    schedulers: list[Any]


def _plan(accelerator: Any, model: Module, method: Any, optimizer: Any, overlap: bool | None) -> _Plan:
    """Check everything, and change nothing. Raises AttachError and ConfigError."""
    _check_accelerator(accelerator)
    inside = _uncompiled(model)
    is_ddp = isinstance(inside, DistributedDataParallel)
    own: Module = inside.module if is_ddp else inside
    if not any(_uncompiled(one) in (inside, own) for one in accelerator._models):
        raise AttachError("this model has not been prepared: model, optimizer = accelerator.prepare(model, optimizer)")
    is_built = isinstance(method, Aggregator | OuterLoop)
    prepared = _prepared_optimizer(accelerator, own, method if is_built else None, optimizer)
    replaced, schedulers = None, []
    if not is_built:
        name, chosen = read_choice(method)
        if is_update_method(name):
            replaced = prepared.optimizer
            schedulers = [one.scheduler for one in accelerator._schedulers]
            method = stand_in(method, own, replaced, schedulers)
        else:
            method = build(name, **chosen)
    is_outer = isinstance(method, OuterLoop)
    if is_outer and is_ddp:
        raise AttachError(
            f"{method.name} averages parameters now and then, and prepare() has wrapped this model in DDP, which averages gradients in "
            "every step: model = accelerator.prepare_model(model, evaluation_mode=True), and prepare the rest without it"
        )
    if is_outer and overlap is not None:
        raise AttachError(f"overlap: {method.name} exchanges no gradients, so that it has no effect; leave it out")
    if not is_outer and not is_ddp and accelerator.num_processes > 1:
        raise AttachError(
            f"{type(inside).__name__} is not wrapped in DDP: pass what accelerator.prepare(model) returns, without evaluation_mode"
        )
    if not is_outer:
        _check_scaler(accelerator.scaler, method)
    return _Plan(accelerator, inside, method, prepared, replaced, schedulers)


def _check_accelerator(accelerator: Any) -> None:
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.MEGATRON_LM, DistributedType.XLA):
        raise AttachError(
            f"Accelerate's {kind.value} shards or averages by itself: use DDP, FSDP2 (fsdp_version=2) or DeepSpeed"
        )
    hook = getattr(accelerator.ddp_handler, "comm_hook", "no")
    hook = getattr(hook, "value", hook)
    if str(hook).lower() != "no":
        raise AttachError(
            f"DistributedDataParallelKwargs(comm_hook={hook!r}) compresses already, and DDP takes one hook: leave it out"
        )
    if accelerator.gradient_state.plugin_kwargs.get("sync_each_batch"):
        raise AttachError(
            "sync_each_batch exchanges the same gradients several times before a step, and residuals with them: leave it out"
        )


def _check_scaler(scaler: Any, method: Aggregator) -> None:
    if method.grad_scaler is not None and method.grad_scaler is not scaler:
        raise AttachError("grad_scaler: the loss is scaled by accelerator.scaler; leave the option out, it is found")


def _uncompiled(model: Any) -> Any:
    """The module inside torch.compile's wrapper: DDP's hook goes to DDP itself."""
    while hasattr(model, "_orig_mod"):
        model = model._orig_mod
    return model


def _inner(optimizer: Any) -> Any:
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _prepared_optimizer(accelerator: Any, model: Module, method: Any, optimizer: Any) -> Any:
    """The AcceleratedOptimizer that steps: it knows when gradients are only accumulated."""
    known = list(accelerator._optimizers)
    is_optimizer = isinstance(method, torch.optim.Optimizer)
    if optimizer is not None:
        found = [one for one in known if one is optimizer or one.optimizer is _inner(optimizer)]
        if not found:
            raise AttachError(
                f"this {type(_inner(optimizer)).__name__} has not been prepared: optimizer = accelerator.prepare(optimizer)"
            )
        if is_optimizer and found[0].optimizer is not method:
            other = type(found[0].optimizer).__name__
            raise AttachError(
                f"{method.name} is an optimizer itself: prepare it in the place of this {other}, or pass its name"
            )
    elif is_optimizer:
        found = [one for one in known if one.optimizer is method]
        if not found:
            raise AttachError(
                f"this {method.name} steps by itself, and Accelerate does not know it: optimizer = accelerator.prepare(method)"
            )
    else:
        own = {id(p) for p in model.parameters()}
        found = [one for one in known if any(id(p) in own for group in one.param_groups for p in group["params"])]
    if len(found) != 1:
        raise AttachError(
            f"{len(found) or 'no'} prepared optimizers hold parameters of this model; attach takes one with all of them: "
            "attach(accelerator, model, method, optimizer)"
        )
    return found[0]


def _take_place(plan: _Plan) -> Callable[[], None]:
    """Put the method where the prepared optimizer was; returns what undoes it."""
    old, prepared = plan.replaced, plan.prepared
    assert old is not None
    back = move_schedulers(plan.schedulers, old, plan.method)
    handle = refuse_steps(old, plan.method.name)

    def put(optimizer: torch.optim.Optimizer) -> None:
        prepared.optimizer = optimizer
        if prepared.scaler is not None:
            prepared._optimizer_original_step_method = optimizer.step
            prepared._optimizer_patched_step_method = patch_optimizer_step(prepared, optimizer.step)

    put(plan.method)
    _log.info("%s has taken the place of %s", plan.method.name, type(old).__name__)

    def undo() -> None:
        put(old)
        handle.remove()
        back()

    return undo


def _attached(plan: _Plan, group: Any, overlap: bool | None) -> Attachment | OuterAttachment:
    method, is_ddp = plan.method, isinstance(plan.model, DistributedDataParallel)
    optimizer = plan.prepared.optimizer
    if isinstance(method, OuterLoop):
        return plain.attach(plan.model, method, optimizer, group)
    is_update = isinstance(method, torch.optim.Optimizer)
    had = method.grad_scaler
    if is_ddp or is_update:  # alone, a gradient method exchanges at the step, when the scaler has unscaled them
        method.grad_scaler = plan.accelerator.scaler
    try:
        given = None if is_update else optimizer
        if is_ddp:
            overlaps = not method.needs_all_buckets if overlap is None else overlap
            attached: Attachment = ddp.attach(plan.model, method, given, group, overlap=overlaps)
        else:
            attached = plain.attach(plan.model, method, given, group)
    except BaseException:
        method.grad_scaler = had
        raise
    return attached


def _integration(name: str) -> Any:
    if importlib.util.find_spec(f"commopt.integrations.{name}") is None:
        raise AttachError(f"Accelerate runs {name} here, for which this version of commopt has no integration: use DDP")
    return importlib.import_module(f"commopt.integrations.{name}")


# -- checkpoints


def _keep_in_checkpoints(accelerator: Any, attachment: Any) -> list[Any]:
    """Handles of what makes `save_state` and `load_state` keep the method's state, until they are removed."""
    earlier = sum(isinstance(one, _Kept) for one in accelerator._custom_objects)
    kept = _Kept(accelerator, attachment, f"commopt_{earlier}" if earlier else "commopt")
    accelerator.register_for_checkpointing(kept)
    return [
        kept,
        accelerator.register_save_state_pre_hook(kept.write),
        accelerator.register_load_state_pre_hook(kept.read),
    ]


class _Kept:
    """What Accelerate loads last, when model and optimizer are there; its own file says only that there are others."""

    def __init__(self, accelerator: Any, attachment: Any, label: str) -> None:
        self._accelerator, self._attachment, self._label = accelerator, attachment, label
        self._states: list[dict[str, Any]] = []

    def write(self, _models: Any, _weights: Any, folder: str) -> None:
        save_rank_state(folder, self._attachment, self._label)

    def read(self, _models: Any, folder: str) -> None:
        self._states = read_rank_states(folder, self._attachment, self._label)

    def state_dict(self) -> dict[str, Any]:
        return {"commopt": True}

    def load_state_dict(self, _: Any) -> None:
        load_rank_state(self._attachment, self._states)
        self._states = []

    def remove(self) -> None:
        self._accelerator._custom_objects.remove(self)
