"""A method in a Lightning Trainer: a DDPStrategy that exchanges gradients, or averages replicas, in the method's way, on CPUs too."""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from commopt.choice import Choice, make, read_choice
from commopt.errors import AttachError, CheckpointError, ConfigError, MissingExtra, did_you_mean
from commopt.exchange.mean import Aggregator, State
from commopt.frameworks import ddp, plain
from commopt.gossip.loop import OuterLoop
from commopt.methods import build, is_outer_method, is_update_method
from commopt.run.agree import agree, meeting_group
from commopt.run.outer import OuterAttachment
from commopt.run.stand_in import move_schedulers

__all__ = ["CommoptStrategy"]

_log = logging.getLogger(__name__)
_KEY, _FORMAT = "commopt", 1  # where a checkpoint holds what is ours
_HOOK_OPTIONS = ("ddp_comm_hook", "ddp_comm_state", "ddp_comm_wrapper", "model_averaging_period")


def _import_lightning() -> Any:
    """The package that the Trainer comes from: `lightning.pytorch`, or `pytorch_lightning` where only that is imported or installed."""
    packages = ["lightning.pytorch", "pytorch_lightning"]
    if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
        packages.reverse()
    for package in packages:
        try:
            return importlib.import_module(package)
        except ModuleNotFoundError as error:
            if error.name not in (package, package.partition(".")[0]):
                raise
    raise MissingExtra("commopt.frameworks.lightning", "lightning", "lightning")


pl = _import_lightning()
_strategies = importlib.import_module(f"{pl.__name__}.strategies")
_ddp_options = [
    key
    for base in (_strategies.DDPStrategy, DistributedDataParallel)
    for key in inspect.signature(base.__init__).parameters
    if key not in ("self", "kwargs", "module", "device_ids", "output_device", "dim", "process_group", *_HOOK_OPTIONS)
]
_launch_options = [key for key in inspect.signature(_strategies.DDPStrategy.__init__).parameters if key != "kwargs"]


class CommoptStrategy(_strategies.DDPStrategy):  # type: ignore[misc,name-defined]
    """Train by a communication method in Lightning: `Trainer(strategy=CommoptStrategy("dgc"), devices=2)`.

    method: what `commopt.build` takes (a name, a `method:` block, a file that holds one), or a gradient or outer method that it made. An
        update method, as "onebit_adam", takes the place of the optimizer that `configure_optimizers` returns, with its learning rate
        and its schedulers. None: `configure_optimizers` returns an update method itself.
    overlap: exchange each bucket while backward computes the next; by default wherever the method allows it.
    ddp_options: what `DDPStrategy` takes (`find_unused_parameters`, `process_group_backend`, `timeout` ...), but no hook of its own.

    attachment: from `fit` on, what `ddp.attach`, or for an outer method `plain.attach`, returns; `attachment.group.traffic` counts the
        bytes that this rank sends. Each step's are logged as `commopt/payload_mb` (10^6 bytes).

    Gradient methods and update methods exchange in DDP's hook; outer methods (NoLoCo, DiLoCo ...) train without DDP's exchange, join
    before the first step and finish after the last. Checkpoints hold the state of every rank: rank 0 gathers it.
    Raises ConfigError for a method or an option that does not exist, here; AttachError in `fit`, on every rank, for what does not fit.
    """

    strategy_name = "commopt"
    optimizers: list[Any]

    def __init__(
        self, method: Aggregator | OuterLoop | Choice | None = None, *, overlap: bool | None = None, **ddp_options: Any
    ) -> None:
        self.method = _checked(method)
        self.overlap, self._is_outer = overlap, _is_outer(self.method)
        self.attachment: Any = None
        self._payload_log = _PayloadLog()
        self._closure_hook: Any = None
        for key in ddp_options:
            if key in _HOOK_OPTIONS:
                raise ConfigError(f"{key}: the method is the communication hook here; leave {key} out")
            if key not in _ddp_options:
                raise ConfigError(f"{key}: unknown option of DDPStrategy{did_you_mean(key, _ddp_options)}")
            if self._is_outer and key not in _launch_options:
                raise ConfigError(f"{key}: an outer method trains without DDP, so that it has no effect; leave it out")
        if self._is_outer and overlap is not None:
            raise ConfigError(
                "overlap: an outer method exchanges no gradients; leave it out (its own option is 'delay')"
            )
        super().__init__(**ddp_options)

    def __repr__(self) -> str:
        return (  # which a Trainer of the other package shows, as it refuses this one
            f"<CommoptStrategy of {pl.__name__}; for the Trainer of another package, import that package before "
            "commopt.frameworks.lightning>"
        )

    # -- fit

    def setup(self, trainer: Any) -> None:
        """Check what can be checked before DDP wraps the model; then as DDPStrategy does."""
        if trainer.state.fn == "fit":
            self._check_training(trainer)
            if not trainer.barebones and self._payload_log not in trainer.callbacks:
                trainer.callbacks.insert(0, self._payload_log)  # before callbacks that read what is logged
        super().setup(trainer)

    def configure_ddp(self) -> None:
        """Wrap the model in DDP, but under an outer method, which only starts from rank 0's parameters."""
        if not self._is_outer:
            super().configure_ddp()
            return
        with torch.no_grad():
            for x in (*self.model.parameters(), *self.model.buffers()):
                flat = x.detach().contiguous().view(-1)
                dist.broadcast(flat.view(torch.uint8) if flat.dtype == torch.bool else flat, 0)
                x.copy_(flat.view_as(x))

    def _register_ddp_hooks(self) -> None:
        """Leave DDP's hook to the method, which is attached once there is an optimizer."""

    def setup_optimizers(self, trainer: Any) -> None:
        """Make the optimizer that steps, and attach the method to it."""
        self.attachment = None
        super().setup_optimizers(trainer)
        returned = self.optimizers[0]  # with automatic optimization Lightning allows one
        method, optimizer = agree(meeting_group(None), lambda: (self._checked_method(returned, trainer), {}))
        if optimizer is not returned:
            move_schedulers([config.scheduler for config in self.lr_scheduler_configs], returned, optimizer)
            self.optimizers = [optimizer]
        self._closure_hook = optimizer.register_step_pre_hook(_run_closure)  # before those of the attachment
        if isinstance(method, OuterLoop):
            self.attachment = plain.attach(self.model, method, optimizer)
            method.max_lag = sys.maxsize  # the Trainer counts its steps itself: no rank can leave any out to catch up
        else:
            overlap = not method.needs_all_buckets if self.overlap is None else self.overlap
            own = None if method is optimizer else optimizer
            self.attachment = ddp.attach(self.model, method, own, overlap=overlap)
        self._payload_log.follow(self.attachment)

    def on_train_start(self) -> None:
        """Start together, under an outer method."""
        super().on_train_start()
        if isinstance(self.attachment, OuterAttachment):
            self.attachment.join()

    def on_train_end(self) -> None:
        """End with equal replicas, where local steps have moved them apart, or as the outer method has it."""
        super().on_train_end()
        if isinstance(self.attachment, OuterAttachment):
            self.attachment.finish()
        elif self.attachment is not None:
            self.attachment.method.synchronise(self.attachment.group)

    def teardown(self) -> None:
        """Take the method out of the optimizer; `attachment` keeps its state and its counts."""
        if self._closure_hook is not None:
            self._closure_hook.remove()
            self._closure_hook = None
            if self.attachment is not None:
                self.attachment.detach()
            if isinstance(self.attachment, OuterAttachment):
                self.attachment.close()
        super().teardown()

    def _checked_method(self, returned: torch.optim.Optimizer, trainer: Any) -> tuple[Any, torch.optim.Optimizer]:
        method, optimizer = self._made(returned)
        self._check_method(method, trainer)
        return method, optimizer

    def _made(self, returned: torch.optim.Optimizer) -> tuple[Any, torch.optim.Optimizer]:
        """The method, and the optimizer that steps, from what `configure_optimizers` returned."""
        if type(returned).__name__ == "_MockOptimizer":
            raise AttachError("configure_optimizers returned no optimizer; return the one that is to step")
        if isinstance(returned, Aggregator):
            if self.method is not None:
                raise AttachError(
                    f"configure_optimizers returned {returned.name}, which is a method itself: leave the method out, as in "
                    "CommoptStrategy(), or return an optimizer of torch"
                )
            return returned, returned
        if self.method is None:
            raise AttachError(
                f"CommoptStrategy has no method, and configure_optimizers returned {type(returned).__name__}: write "
                "CommoptStrategy('dgc'), say, or return an update method such as commopt.build('onebit_adam', ...)"
            )
        if isinstance(self.method, Aggregator | OuterLoop):
            return self.method, returned
        name, options = self.method
        if is_update_method(name) and "lr" in options and self.lr_scheduler_configs:
            raise AttachError(
                f"lr: {options['lr']!r} of {name} would be overwritten by the scheduler, which starts from configure_optimizers' own; "
                "set it there, and leave it out here"
            )
        return make({"name": name, **options}, self.lightning_module, returned)

    def _check_training(self, trainer: Any) -> None:
        if not self.lightning_module.automatic_optimization:
            raise AttachError(
                "manual optimization: gradients are exchanged in backward, once before each step of one optimizer, which a "
                "training_step of your own need not keep to; use automatic optimization, or commopt.frameworks.ddp in a loop of your own"
            )
        if not any(p.requires_grad for p in self.lightning_module.parameters()):
            raise AttachError("the model has no trainable parameter")
        if self._is_outer and self._layer_sync is not None:
            raise AttachError("sync_batchnorm: it exchanges in every step, which outer methods are there to do without")
        if self._is_outer and getattr(self.precision_plugin, "scaler", None) is not None:
            raise AttachError(
                "precision: a GradScaler skips steps on each rank by itself, and rounds would come apart; use 'bf16-mixed'"
            )

    def _check_method(self, method: Any, trainer: Any) -> None:
        """Raise AttachError where the Trainer would change gradients in a way that the method cannot take."""
        if isinstance(method, OuterLoop):
            return
        if method.grad_scaler is not None:
            raise AttachError("grad_scaler: the Trainer's is used, with precision='16-mixed'; leave it out")
        method.grad_scaler = getattr(self.precision_plugin, "scaler", None)
        is_update_method = isinstance(method, torch.optim.Optimizer)
        if is_update_method and trainer.gradient_clip_val:
            raise AttachError(
                f"gradient_clip_val: {method.name} has exchanged its momentum when the Trainer clips, and would not notice; leave it "
                f"out, and clip by the method's own option, CommoptStrategy({{'name': {method.name!r}, 'max_norm': "
                f"{trainer.gradient_clip_val}}})"
            )

    # -- checkpoints

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint with the compression state of every rank, which rank 0 gathers; all ranks call it."""
        if self.attachment is not None and checkpoint.get("optimizer_states"):
            trainer = self.lightning_module.trainer
            if trainer.interrupted:
                _log.warning("%s: written after an error, without the residuals, which other ranks hold", filepath)
            else:
                checkpoint[_KEY] = self._gathered()
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Load the optimizer's state and this rank's part of the method's. Raises CheckpointError if it does not belong here."""
        stored = checkpoint.get(_KEY)
        if not checkpoint["optimizer_states"] or self.attachment is None:
            super().load_optimizer_state_dict(checkpoint)
            return
        if stored is None:
            if isinstance(self.attachment.optimizer, Aggregator):
                raise CheckpointError(
                    f"the checkpoint holds no state of {self.attachment.method.name}, and that of another optimizer is of no use to it; "
                    "load its weights only, and fit without ckpt_path"
                )
            _log.warning("the checkpoint holds no state of %s, which begins anew", self.attachment.method.name)
            super().load_optimizer_state_dict(checkpoint)
            return
        self._check_stored(stored)
        super().load_optimizer_state_dict(checkpoint)
        self._resume(stored)

    def _gathered(self) -> dict[str, Any] | None:
        """Every rank's part, on rank 0; one part at most as large as what the method keeps for the model."""
        attachment, is_outer = self.attachment, isinstance(self.attachment, OuterAttachment)
        state = attachment.comm_state()
        part: dict[str, Any] = {"local": _copied(state["local"])}
        if is_outer:  # replicas differ
            part |= {
                "model": _copied(self.lightning_module_state_dict()),
                "optimizer": attachment.optimizer.state_dict(),
            }
            part["steps"] = attachment.steps
        ranks = dist.get_world_size()
        parts: list[Any] | None = [None] * ranks if self.is_global_zero else None
        dist.gather_object(part, parts, dst=0)
        if parts is None:
            return None
        return {
            "format": _FORMAT,
            "ranks": ranks,
            "steps": attachment.steps,
            "method": attachment.method.name,
            "form": "" if is_outer else attachment.method.state_form,
            "buckets": attachment.bucket_layout(),
            "shared": _copied(state["shared"]),
            "parts": parts,
        }

    def _check_stored(self, stored: dict[str, Any]) -> None:
        method, is_outer = self.attachment.method, isinstance(self.attachment, OuterAttachment)
        if stored["format"] != _FORMAT:
            raise CheckpointError(
                f"the checkpoint's format {stored['format']} is not the {_FORMAT} that this version reads"
            )
        own_form = "" if is_outer else method.state_form
        for what, saved, own in (("under", stored["method"], method.name), ("with", stored["form"], own_form)):
            if saved != own:
                raise CheckpointError(f"the checkpoint was saved {what} {saved}, not {own}")
        if is_outer and stored["ranks"] != dist.get_world_size():
            raise CheckpointError(
                f"the checkpoint holds {stored['ranks']} replicas under {method.name}, and there are {dist.get_world_size()} ranks"
            )

    def _resume(self, stored: dict[str, Any]) -> None:
        attachment, parts = self.attachment, stored["parts"]
        states: list[State] = [{"shared": stored["shared"], "local": part["local"]} for part in parts]
        attachment.steps = int(stored["steps"])
        if len(parts) != dist.get_world_size():
            attachment.method.load_resharded(states)
            return
        part = parts[self.global_rank]
        if isinstance(attachment, OuterAttachment):
            self.lightning_module.load_state_dict(part["model"])
            attachment.optimizer.load_state_dict(part["optimizer"])
            attachment.steps = int(part["steps"])
        attachment.load_comm_state(states[self.global_rank])
        attachment.resume_bucket_layout(stored["buckets"])


class _PayloadLog(pl.Callback):  # type: ignore[misc,name-defined]
    """Logs what this rank has sent in each step."""

    def __init__(self) -> None:
        self._attachment: Any = None
        self._steps, self._sent = 0, 0.0

    def follow(self, attachment: Any) -> None:
        self._attachment, self._steps, self._sent = attachment, 0, attachment.group.traffic.payload_bytes

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if self._attachment.steps == self._steps:  # gradients accumulate
            return
        sent = self._attachment.group.traffic.payload_bytes
        payload_mb, self._steps, self._sent = (sent - self._sent) / 1e6, self._attachment.steps, sent
        pl_module.log("commopt/payload_mb", payload_mb, on_step=True, on_epoch=False, batch_size=1)


def _checked(method: Any) -> Any:
    """A method that was made, or (name, options), which have been tried on a model of one parameter. Raises ConfigError, AttachError."""
    if isinstance(method, torch.optim.Optimizer):
        raise AttachError(
            f"{type(method).__name__} is an optimizer: return it from configure_optimizers, and write CommoptStrategy() without it"
        )
    if method is None or isinstance(method, Aggregator | OuterLoop):
        return method
    name, options = read_choice(method)
    build({"name": name, **options}, [("tried", Parameter(torch.zeros(1)))] if is_update_method(name) else None)
    return name, options


def _is_outer(method: Any) -> bool:
    return isinstance(method, OuterLoop) or (isinstance(method, tuple) and is_outer_method(method[0]))


def _run_closure(_: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """Run forward and backward, which Lightning hands to `step` as a closure, ahead of it: gradients are exchanged in backward."""
    rest = dict(kwargs)
    closure = rest.pop("closure", args[1] if len(args) > 1 else None)
    if closure is not None:
        with torch.enable_grad():
            closure()
    return args[:1], rest


def _copied(tensors: Any) -> dict[str, Any]:
    """On the CPU, and each with storage of its own: a view would be pickled with all that it is a view of."""
    return {key: x.detach().cpu().clone() if isinstance(x, Tensor) else x for key, x in tensors.items()}


_strategies.StrategyRegistry.register(
    "commopt", CommoptStrategy, description="The update method that configure_optimizers returns", override=True
)
