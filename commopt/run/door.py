"""`commopt.attach`: one call for every method and framework."""

import importlib
import sys
from typing import Any, Protocol

import torch
from torch.nn import Module

from commopt.choice import Choice
from commopt.errors import AttachError
from commopt.groups import Group, Peers
from commopt.method import Method
from commopt.methods import chosen
from commopt.run.agree import agree, meeting_group
from commopt.run.checks import Request
from commopt.run.run import Run

# (module that defines the class of model or optimizer, class, our module): checked only if that module has been imported
_KNOWN = (
    ("accelerate.optimizer", "AcceleratedOptimizer", "accelerate"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine", "deepspeed"),
    ("transformers.trainer", "Trainer", "transformers"),
    ("torch.distributed.fsdp", "FSDPModule", "fsdp"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "fsdp"),  # which refuses it, with the reason
    ("torch.nn.parallel", "DistributedDataParallel", "ddp"),
    ("torch.nn", "Module", "plain"),
)


class TrainerLike(Protocol):
    """A transformers Trainer."""

    @property
    def callback_handler(self) -> object: ...


def attach(
    model: Module | TrainerLike,
    method: Method | type[Method] | Choice,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    group: Group | Peers | None = None,
    max_norm: float | None = None,
    grad_scaler: torch.amp.GradScaler | None = None,
    overlap: bool | None = None,
) -> Run:
    """Put a communication method into a training script, with any of the supported frameworks.

    model: a plain module, a DistributedDataParallel or FSDP2 model, a DeepSpeed engine, a transformers Trainer, or what
        `Accelerator.prepare` returned. Lightning takes `commopt.frameworks.lightning.CommoptStrategy` instead.
    method: its name, a `method:` block, a file that holds one, or a `Method`. `commopt compare` and `commopt run` put others in its place.
    optimizer: yours. Gradient and outer methods keep it; an update method, such as onebit_adam, stands in for it (Adam or AdamW;
        LAMB for onebit_lamb, Lion for distributed_lion, SGD for demo), with its parameter groups and its schedulers. Step
        `run.optimizer`. Engines and Trainers bring their own.
    group: the ranks that exchange; if None, all ranks of the job, or one rank alone without torch.distributed.
    max_norm: clip gradients to this global L2 norm: that of the mean if the method yields it, else before the exchange.
    grad_scaler: the scaler of the loss, if there is one.
    overlap: exchange during backward; if None, whenever possible.

    Raises AttachError if these do not fit together, and ConfigError for a wrong option: on every rank, before anything is changed.
    """
    return dispatch(model, Request(chosen(method), optimizer, group, max_norm, grad_scaler, overlap))


def dispatch(model: Any, request: Request) -> Run:
    """Attach by the framework's module for this kind of model or optimizer."""
    for module, kind, ours in _KNOWN:
        found = getattr(sys.modules.get(module), kind, None)
        if found is not None and isinstance(request.optimizer if ours == "accelerate" else model, found):
            run: Run = importlib.import_module(f"commopt.frameworks.{ours}").attach(model, request)
            return run

    def refuse() -> tuple[Run, Any]:
        raise AttachError(
            f"model: got {type(model).__name__}, expected a module (plain, DDP or FSDP2), a DeepSpeed engine, a transformers Trainer or a "
            "model that Accelerate has prepared; Lightning takes commopt.frameworks.lightning.CommoptStrategy"
        )

    return agree(meeting_group(request.group), refuse)  # so that it raises on ranks with a model, too
