"""Where a method is plugged in; the only files that know a framework. `attach` finds the right one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from commopt.choice import read_choice
from commopt.errors import AttachError

__all__ = ["attach"]

# (module that defines the class, class, our module): looked at only where that module has been imported
_FRAMEWORKS = (
    ("deepspeed.runtime.engine", "DeepSpeedEngine", "deepspeed"),
    ("torch.distributed.fsdp", "FSDPModule", "fsdp"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "fsdp"),  # which refuses it, with the reason
    ("torch.nn.parallel", "DistributedDataParallel", "ddp"),
    ("transformers", "Trainer", "transformers"),
    ("torch.nn", "Module", "plain"),
)


def attach(model: Any, method: Any, optimizer: Any = None, group: Any = None, **options: Any) -> Any:
    """Put a method into a training script, whatever it trains with: one door to `integrations.*.attach`.

    model: a DistributedDataParallel, an FSDP2 model, a DeepSpeed engine, a transformers Trainer, or a plain module.
    method: what `commopt.build` made, or what it takes: a name, a `method:` block, or a file that holds one.
    optimizer: the one that steps, for gradient and outer methods; an update method, as 1-bit Adam, is its own.
    group, options: as the integration's own `attach` has them. Lightning and Accelerate have doors of their own
    (`integrations.lightning.CommoptStrategy`, `integrations.accelerate.attach`).

    Raises AttachError if they do not fit together, on every rank of the job, and ConfigError for a method that does not exist.
    """
    for module, kind, ours in _FRAMEWORKS:
        known = getattr(sys.modules.get(module), kind, None)
        if known is not None and isinstance(model, known):
            framework = importlib.import_module(f"commopt.integrations.{ours}")
            return framework.attach(model, method, optimizer, group, **options)
    from commopt.run.agree import agree, meeting_group

    error = AttachError(
        f"{type(model).__name__} is nothing to attach a method to; pass the model, wrapped for DDP or FSDP2 or not at all, or the "
        "DeepSpeed engine or transformers Trainer; Accelerate and Lightning have doors of their own, integrations.accelerate.attach and "
        "integrations.lightning.CommoptStrategy"
    )

    def refuse() -> Any:
        raise error

    return agree(meeting_group(group), refuse)  # so that ranks with a model hear of it


def made(method: Any, model: Any, optimizer: Any) -> Any:
    """The method itself, built here where only its name or block was given. Raises ConfigError and AttachError."""
    from commopt.exchange.mean import Aggregator
    from commopt.gossip.loop import OuterLoop
    from commopt.methods import build, is_update_method

    if isinstance(method, Aggregator | OuterLoop):
        return method
    if not isinstance(method, str | Path | Mapping):
        raise AttachError(
            f"{type(method).__name__} is no commopt method; make one with commopt.build(...), or give its name"
        )
    name, options = read_choice(method)
    if is_update_method(name) and optimizer is not None:
        raise AttachError(
            f"{name} is an optimizer itself, and would leave this {type(optimizer).__name__} without effect: leave it out, and step the "
            f"attachment's own, `attach(model, {name!r}).optimizer`"
        )
    return build(name, model.named_parameters() if is_update_method(name) else None, **options)
