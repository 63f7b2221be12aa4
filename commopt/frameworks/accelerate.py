"""A method in a loop of Hugging Face Accelerate: one call after `accelerator.prepare`."""

from __future__ import annotations

import functools
import gc
import importlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from commopt.errors import CheckpointError, MissingExtra
from commopt.groups import Group
from commopt.run.agree import meeting_group
from commopt.run.checkpoint import has_block, read_block, save_block
from commopt.run.prepare import Request, agree_on_method
from commopt.run.run import Run
from commopt.run.stand_in import StandIn
from commopt.run.storage import together

try:
    from accelerate import Accelerator
    from accelerate.optimizer import patch_optimizer_step
    from accelerate.utils import DistributedType
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "accelerate":
        raise
    raise MissingExtra("commopt.frameworks.accelerate", "accelerate", "accelerate") from None

_log = logging.getLogger(__name__)
_HINT = "run the other backwards under accelerator.accumulate(model), or accelerator.no_sync(model)"


def attach(model: Module, request: Request) -> Run:
    """Exchange by any method in a loop of Accelerate.

    model, request.optimizer: what `accelerator.prepare` returned; for an outer method the model comes from
    `accelerator.prepare_model(model, evaluation_mode=True)`, which leaves DDP out. An update method steps when the prepared optimizer
    does. `accumulate`, `clip_grad_norm_` (gradient methods), mixed precision and `save_state`/`load_state` work as ever: a checkpoint
    carries a block with what each rank still has to send. FSDP2 and DeepSpeed are handed on to their own modules.

    Raises AttachError if they do not fit together, on every rank, and ConfigError for a wrong option.
    """
    return attach_to(accelerator_of(request.optimizer), model, request)


def accelerator_of(prepared: Any) -> Any:
    """The Accelerator that has prepared this optimizer, or None.

    An optimizer doesn't know its Accelerator, but every Accelerator lists its optimizers; those alive are found by the garbage collector.
    """
    for one in gc.get_objects():
        if issubclass(type(one), Accelerator) and any(known is prepared for known in getattr(one, "_optimizers", ())):
            return one
    return None


def attach_to(accelerator: Any, model: Any, request: Request) -> Run:
    """What `attach` does, for an Accelerator that is known."""
    prepared: Any = request.optimizer
    model = uncompiled(model)
    method = agree_on_method(request, _facts(accelerator, model, request))
    scaler = accelerator.scaler
    is_ddp = isinstance(model, DistributedDataParallel)
    is_sharded = accelerator.is_fsdp2 or accelerator.distributed_type == DistributedType.DEEPSPEED
    if method.kind == "outer" or (method.kind == "gradient" and not is_ddp and not is_sharded):
        scaler = None  # alone, gradients are exchanged in the step, when the scaler has unscaled them
    request = replace(request, method=method, optimizer=prepared.optimizer, grad_scaler=scaler)
    is_engine = accelerator.distributed_type == DistributedType.DEEPSPEED
    before = model.optimizer if is_engine else None
    ours = "deepspeed" if is_engine else "fsdp" if accelerator.is_fsdp2 else "ddp" if is_ddp else "plain"
    run: Any = importlib.import_module(f"commopt.frameworks.{ours}").attach(model, request)
    if is_engine:  # whose checkpoints, which Accelerate writes and loads, carry the block
        for one in accelerator._optimizers:
            if one.optimizer is before:
                one.optimizer = model.optimizer  # an update method's, if it has taken the place of the engine's
        return run  # type: ignore[no-any-return]
    if ours != "plain":
        run.repeat_hint = _HINT
    if ours != "fsdp":  # whose state is by shard, and no part of checkpoints
        run._handles.append(_Bond(accelerator, prepared, run))
    return run  # type: ignore[no-any-return]


def uncompiled(model: Any) -> Any:
    """The module inside torch.compile's wrapper: DDP's hook goes to DDP itself."""
    while hasattr(model, "_orig_mod"):
        model = model._orig_mod
    return model


def _facts(accelerator: Any, model: Any, request: Request) -> dict[str, object]:
    if accelerator is None:
        return {"accelerate unprepared optimizer": True}
    kind = accelerator.distributed_type
    is_theirs = accelerator.is_fsdp2 or kind == DistributedType.DEEPSPEED
    others = (DistributedType.FSDP, DistributedType.MEGATRON_LM, DistributedType.XLA)
    hook = getattr(accelerator.ddp_handler, "comm_hook", "no")
    hook = str(getattr(hook, "value", hook)).lower()
    is_ddp = isinstance(model, DistributedDataParallel)
    own = model.module if is_ddp else model
    known = [uncompiled(one) for one in accelerator._models]
    is_alone = not is_ddp and not is_theirs and accelerator.num_processes > 1
    return {
        "accelerate sharding": kind in others and not is_theirs and kind.value,
        "accelerate hook": hook != "no" and repr(hook),
        "accelerate sync_each_batch": accelerator.gradient_state.plugin_kwargs.get("sync_each_batch"),
        "accelerate unprepared model": not any(one is model or one is own for one in known),
        "accelerate scaler": request.grad_scaler is not None and request.grad_scaler is not accelerator.scaler,
        "accelerate ddp around an outer method": is_ddp,
        "accelerate without ddp": is_alone and type(model).__name__,
    }


class _Bond:
    """What ties a run to its Accelerator until `remove`: the place of the optimizer, and a block in checkpoints.

    Accelerate has no hook for the moment after it has loaded, and an object that is registered for checkpointing would be unpickled
    without any safeguard; so `load_state` itself is wrapped.
    """

    def __init__(self, accelerator: Any, prepared: Any, run: Run) -> None:
        self._prepared, self._run = prepared, run
        self._take_over: Callable[[], None] | None = None
        hooks = accelerator._save_model_state_pre_hook.values()
        earlier = sum(isinstance(getattr(hook, "__self__", None), _Bond) for hook in hooks)
        self._folder = f"model{earlier}" if earlier else ""  # each of several runs has a block of its own
        self._handles = [
            accelerator.register_save_state_pre_hook(self._save),
            accelerator.register_load_state_pre_hook(self._read),
        ]
        accelerator.load_state = self._followed(accelerator.load_state)
        if isinstance(run.optimizer, StandIn):
            _put(prepared, run.optimizer)
            kind = type(run.optimizer.replaced).__name__
            _log.info("%s stands in for %s", run.method.name, kind)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        if isinstance(self._run.optimizer, StandIn) and self._prepared.optimizer is self._run.optimizer:
            _put(self._prepared, self._run.optimizer.replaced)

    def _save(self, _models: Any, _weights: Any, folder: str) -> None:
        save_block(Path(folder) / self._folder, self._run)

    def _read(self, _models: Any, folder: str) -> None:
        self._take_over = read(Path(folder) / self._folder, self._run, meeting_group(None))

    def _followed(self, load_state: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(load_state)
        def load_ours_too(*args: Any, **kwargs: Any) -> Any:
            result = load_state(*args, **kwargs)
            take_over, self._take_over = self._take_over, None
            if take_over is not None:
                take_over()
            return result

        return load_ours_too


def read(folder: Path, run: Run, meeting: Group) -> Callable[[], None]:
    """Verify a checkpoint's block on all ranks, even if each has its own; returns what takes it over. Raises CheckpointError."""

    def look() -> None:
        if not has_block(folder):
            raise CheckpointError(
                f"{folder}: was saved without a method; take another checkpoint, or start anew from its model alone"
            )

    together(meeting, look)
    return together(meeting, lambda: read_block(folder, run))


def _put(prepared: Any, optimizer: torch.optim.Optimizer) -> None:
    """Let an AcceleratedOptimizer step this optimizer; with a scaler it keeps two forms of its `step`."""
    prepared.optimizer = optimizer
    if prepared.scaler is not None:
        prepared._optimizer_original_step_method = optimizer.step
        prepared._optimizer_patched_step_method = patch_optimizer_step(prepared, optimizer.step)
