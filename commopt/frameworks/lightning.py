"""A method in a Lightning Trainer: a DDPStrategy whose gradients or replicas the method averages, on CPUs too."""

import functools
import importlib
import inspect
import logging
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from commopt.choice import Choice
from commopt.errors import CheckpointError, ConfigError, MissingExtra, did_you_mean
from commopt.method import Method
from commopt.methods import chosen, resolve
from commopt.run.checkpoint import read_block, save_block
from commopt.run.checks import Request, agree_on_method, refuse
from commopt.run.door import attach
from commopt.run.run import Run, broadcast_
from commopt.run.stand_in import StandIn

__all__ = ["CommoptStrategy"]

_log = logging.getLogger(__name__)
_KEY = "commopt"  # where a checkpoint says that a folder beside it holds the method's state
_HOOK_OPTIONS = ("ddp_comm_hook", "ddp_comm_state", "ddp_comm_wrapper", "model_averaging_period")


def _import_lightning() -> Any:
    """The package that the Trainer comes from: `lightning.pytorch`, or `pytorch_lightning` if only that is imported or installed."""
    for package in sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(package)
        except ModuleNotFoundError as error:
            if error.name not in (package, package.partition(".")[0]):
                raise
    raise MissingExtra("commopt.frameworks.lightning", "lightning")


pl = _import_lightning()
_launch_options, _wrapper_options = (
    inspect.signature(kind.__init__).parameters for kind in (pl.strategies.DDPStrategy, DistributedDataParallel)
)
_THEIRS = ("self", "kwargs", "module", "device_ids", "output_device", "dim", "process_group", *_HOOK_OPTIONS)
_ddp_options = [key for key in (*_launch_options, *_wrapper_options) if key not in _THEIRS]


class CommoptStrategy(pl.strategies.DDPStrategy):  # type: ignore[misc,name-defined]
    """Train by a communication method in Lightning: `Trainer(strategy=CommoptStrategy("dgc"), devices=2)`.

    method: what `commopt.attach` takes: a name, a `method:` block, a file that holds one, or a `Method`. `configure_optimizers` returns
        an optimizer as usual; an update method, such as "onebit_adam", stands in for it, with its parameter groups and schedulers.
    overlap: exchange each bucket while backward computes the next; by default wherever the method allows it.
    max_norm: clip gradients to this global L2 norm, as `commopt.attach` does; update methods need it instead of `gradient_clip_val`.
    ddp_options: what `DDPStrategy` takes (`find_unused_parameters`, `process_group_backend`, `timeout` ...), but no hook of its own.

    run: from `fit` on, what `commopt.attach` returns; `run.traffic` counts the bytes that this rank sends. Each step's are logged as
        `commopt/payload_mb` (10^6 bytes).
    Beside each checkpoint `name.ckpt` a folder `name.ckpt.commopt` holds the method's state of every rank.
    Raises ConfigError for a method or an option that does not exist, here; AttachError for what does not fit, here or in `fit`.
    """

    strategy_name = "commopt"
    optimizers: list[Any]

    def __init__(
        self,
        method: Method | type[Method] | Choice,
        *,
        overlap: bool | None = None,
        max_norm: float | None = None,
        **ddp_options: Any,
    ) -> None:
        method = chosen(method)
        tried = resolve(method)
        self.method, self.name, self.kind = method, tried.name, tried.kind  # by name or block, each fit makes a new one
        self.overlap, self.max_norm, self._may_be_clipped = overlap, max_norm, tried.may_be_clipped
        self.run: Run | None = None
        self._payload_log = _PayloadLog()
        self._loaded_from = ""
        unknown = [key for key in ddp_options if key not in (*_ddp_options, *_HOOK_OPTIONS)]
        if unknown:
            raise ConfigError(f"{unknown[0]}: unknown option of DDPStrategy{did_you_mean(unknown[0], _ddp_options)}")
        facts: dict[str, object] = {
            "lightning hook": next((key for key in ddp_options if key in _HOOK_OPTIONS), None),
            "lightning ddp option": next((key for key in ddp_options if key not in _launch_options), None),
            "lightning overlap": overlap is not None,
        }
        refuse(facts, self.name, self.kind)
        super().__init__(**ddp_options)

    def __repr__(self) -> str:  # shown by a Trainer of the other package, which refuses this one
        return f"<CommoptStrategy of {pl.__name__}; for the Trainer of another package, import that before this one>"

    # -- fit

    def setup(self, trainer: Any) -> None:
        """Check what can be checked before DDP wraps the model; then as DDPStrategy does."""
        if trainer.state.fn == "fit":
            facts = {
                "lightning manual optimization": not self.lightning_module.automatic_optimization,
                "lightning sync_batchnorm": self._layer_sync is not None,
                "lightning scaler": self._scaler is not None,
                "lightning gradient_clip_val": not self._may_be_clipped and trainer.gradient_clip_val,
                "no parameter": not any(p.requires_grad for p in self.lightning_module.parameters()),
            }
            refuse(facts, self.name, self.kind)
            if not trainer.barebones and self._payload_log not in trainer.callbacks:
                trainer.callbacks.insert(0, self._payload_log)  # before callbacks that read what is logged
        super().setup(trainer)

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        return getattr(self.precision_plugin, "scaler", None)

    def configure_ddp(self) -> None:
        """Wrap the model in DDP; under an outer method only start from rank 0's parameters and buffers."""
        if self.kind != "outer":
            super().configure_ddp()
        else:
            broadcast_((*self.model.parameters(), *self.model.buffers()), functools.partial(dist.broadcast, src=0))

    def _register_ddp_hooks(self) -> None:
        """Leave DDP's hook to the method, which is attached once there is an optimizer."""

    def setup_optimizers(self, trainer: Any) -> None:
        """Attach the method to the optimizer of `configure_optimizers`; the run's optimizer steps from now on."""
        self.run = None
        super().setup_optimizers(trainer)
        returned = self.optimizers[0]  # with automatic optimization Lightning allows one
        has_none = type(returned).__name__ == "_MockOptimizer"
        agree_on_method(Request(self.method), {"lightning without an optimizer": has_none})
        run: Any = attach(
            self.model, self.method, returned, max_norm=self.max_norm, grad_scaler=self._scaler, overlap=self.overlap
        )
        self.run, self.optimizers = run, [run.optimizer]
        if run.method.kind == "outer":
            run.method.max_lag = sys.maxsize  # the Trainer counts the steps: a rank can't leave any out to catch up
        hook = run.optimizer.register_step_pre_hook(_run_closure)
        run.optimizer._optimizer_step_pre_hooks.move_to_end(hook.id, last=False)
        run._handles.append(hook)
        self._payload_log.follow(run)

    def on_train_start(self) -> None:
        """Join the other replicas, under an outer method."""
        super().on_train_start()
        self.run.join()  # type: ignore[union-attr]

    def on_train_end(self) -> None:
        """Finish the run: replicas that local steps have moved apart become equal again."""
        super().on_train_end()
        self.run.finish()  # type: ignore[union-attr]

    def teardown(self) -> None:
        """Take the method out of the optimizer; `run` keeps its state and its counts."""
        if self.run is not None and not self.run.is_closed:
            self.run.close()
        super().teardown()

    # -- checkpoints

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint, and the method's state of every rank into a folder beside it; all ranks call it."""
        run = self.run
        if run is not None and checkpoint.get("optimizer_states"):
            if self.lightning_module.trainer.interrupted:
                _log.warning(
                    "%s: written after an error, without the method's state, because other ranks may be gone", filepath
                )
            elif "://" in str(filepath):
                raise CheckpointError(
                    f"{filepath}: the method's state goes into a folder beside the checkpoint: write to a path of the file system, or "
                    "save_weights_only=True"
                )
            else:
                save_block(_beside(filepath), run)
                checkpoint[_KEY] = {"method": run.method.name, "steps": run.steps, "ranks": dist.get_world_size()}
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def remove_checkpoint(self, filepath: Any) -> None:
        """Delete a checkpoint, and the folder beside it."""
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            shutil.rmtree(_beside(filepath), ignore_errors=True)

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        self._loaded_from = checkpoint_path
        return super().load_checkpoint(checkpoint_path, *args, **kwargs)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Load the optimizer's state and this rank's part of the method's. Raises CheckpointError if it does not belong here."""
        run, said = self.run if checkpoint["optimizer_states"] else None, checkpoint.get(_KEY)
        if run is not None and said is None and not isinstance(run.optimizer, StandIn):
            _log.warning("the checkpoint holds no state of %s, which starts with an empty one", self.name)
            run = None
        if run is None:
            super().load_optimizer_state_dict(checkpoint)
            return
        if self.kind == "outer" and said["ranks"] != dist.get_world_size():
            raise CheckpointError(
                f"the checkpoint holds {said['ranks']} replicas under {said['method']}, and there are {dist.get_world_size()} ranks"
            )
        take_over = read_block(_beside(os.path.realpath(self._loaded_from)), run)  # `save_last="link"` makes links
        super().load_optimizer_state_dict(checkpoint)
        take_over()
        if run.steps != said["steps"]:
            raise CheckpointError(
                f"{self._loaded_from}: is of step {said['steps']}, and the folder beside it of step {run.steps}: a job may have been "
                "killed between the two; resume another checkpoint"
            )


class _PayloadLog(pl.Callback):  # type: ignore[misc,name-defined]
    def follow(self, run: Run) -> None:
        self._run, self._steps, self._sent = run, 0, run.traffic.payload_bytes

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        if self._run.steps == self._steps:  # gradients accumulate
            return
        if isinstance(outputs, Mapping) and "loss" in outputs:
            self._run.note(loss=outputs["loss"])
        sent = self._run.traffic.payload_bytes
        payload_mb, self._steps, self._sent = (sent - self._sent) / 1e6, self._run.steps, sent
        pl_module.log("commopt/payload_mb", payload_mb, on_step=True, on_epoch=False, batch_size=1)


def _beside(filepath: Any) -> Path:
    return Path(f"{filepath}.commopt")


def _run_closure(_: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """Run the closure (forward and backward) that Lightning passes to `step` before it: gradients are exchanged in backward."""
    rest = dict(kwargs)
    closure = rest.pop("closure", args[1] if len(args) > 1 else None)
    if closure is not None:
        with torch.enable_grad():
            closure()
    return args[:1], rest
