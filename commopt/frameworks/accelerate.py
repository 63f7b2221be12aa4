"""A method in a Hugging Face Accelerate loop: one call after `accelerator.prepare`."""

import functools
import gc
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from commopt.errors import MissingExtra
from commopt.run.checkpoint import read_block, save_block
from commopt.run.checks import Request, agree_on_method
from commopt.run.door import dispatch
from commopt.run.run import Replaced, Run
from commopt.run.stand_in import StandIn

try:
    from accelerate import Accelerator
    from accelerate.optimizer import patch_optimizer_step
    from accelerate.utils import DistributedType
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "accelerate":
        raise
    raise MissingExtra("commopt.frameworks.accelerate", "accelerate") from None

_log = logging.getLogger(__name__)


def attach(model: Any, request: Request) -> Run:
    """Attach any method in an Accelerate loop; FSDP2 and DeepSpeed models are passed on to their own modules.

    model, request.optimizer: what `accelerator.prepare` returned; for an outer method the model comes from
    `accelerator.prepare_model(model, evaluation_mode=True)`, which does not wrap it in DDP.
    """
    prepared: Any = request.optimizer
    accelerator, model = _accelerator_of(prepared), uncompiled(model)
    method = agree_on_method(request, _facts(accelerator, model, request))
    scaler = accelerator.scaler
    is_engine = accelerator.distributed_type == DistributedType.DEEPSPEED
    is_plain = not (isinstance(model, DistributedDataParallel) or accelerator.is_fsdp2 or is_engine)
    if method.kind == "outer" or (method.kind == "gradient" and is_plain):
        scaler = None  # without DDP, gradients are exchanged in the step, when the scaler has unscaled them
    run: Any = dispatch(model, replace(request, method=method, optimizer=prepared.optimizer, grad_scaler=scaler))
    if is_engine:  # the method's state is part of its checkpoints, which Accelerate writes and loads
        prepared.optimizer = model.optimizer  # the stand-in, under an update method
        return run  # type: ignore[no-any-return]
    if not is_plain:
        run.repeat_hint = "run the other backwards under accelerator.accumulate(model), or accelerator.no_sync(model)"
    run._handles += _tie(accelerator, prepared, run)
    return run  # type: ignore[no-any-return]


def _accelerator_of(prepared: Any) -> Any:
    """The Accelerator that has prepared this optimizer, or None.

    An optimizer doesn't know its Accelerator, but every Accelerator lists its optimizers; the garbage collector lists the Accelerators.
    """
    every = (one for one in gc.get_objects() if issubclass(type(one), Accelerator))
    return next((one for one in every if any(x is prepared for x in getattr(one, "_optimizers", ()))), None)


def uncompiled(model: Any) -> Any:
    """The module inside torch.compile's wrapper: the hook must go to DDP itself."""
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


def _tie(accelerator: Any, prepared: Any, run: Run) -> list[Any]:
    """Add the method's state to the Accelerator's checkpoints, and let its optimizer step the run's; return handles that undo it.

    `load_state` is wrapped, because Accelerate has no hook that runs after loading, and objects registered for checkpointing are
    unpickled without any safeguard.
    """
    earlier = sum(getattr(hook, "func", None) is _save for hook in accelerator._save_model_state_pre_hook.values())
    name = f"model{earlier}" if earlier else ""  # each of several runs has a block of its own
    take_overs: list[Callable[[], object]] = []
    load_state = accelerator.load_state

    def read(_models: Any, folder: str) -> None:
        take_overs.append(read_block(Path(folder) / name, run))

    @functools.wraps(load_state)
    def load_ours_too(*args: Any, **kwargs: Any) -> Any:
        take_overs.clear()  # left by a failed load
        result = load_state(*args, **kwargs)
        for take_over in take_overs:
            take_over()
        return result

    accelerator.load_state = load_ours_too
    handles = [
        accelerator.register_save_state_pre_hook(functools.partial(_save, run, name)),
        accelerator.register_load_state_pre_hook(read),
    ]
    if isinstance(run.optimizer, StandIn):
        ours: dict[str, Any] = {"optimizer": run.optimizer}
        if prepared.scaler is not None:  # then it keeps two versions of `step`
            ours["_optimizer_original_step_method"] = run.optimizer.step
            ours["_optimizer_patched_step_method"] = patch_optimizer_step(prepared, run.optimizer.step)
        handles.append(Replaced(prepared, **ours))
        _log.info("%s stands in for %s", run.method.name, type(run.optimizer.replaced).__name__)
    return handles


def _save(run: Run, name: str, _models: Any, _weights: Any, folder: str) -> None:
    save_block(Path(folder) / name, run)
