"""A method in the Trainer of Hugging Face transformers: a callback, or `commopt.attach(trainer, method)`."""

from __future__ import annotations

import functools
import inspect
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from commopt.choice import Choice, read_choice
from commopt.errors import AttachError, CheckpointError, MissingExtra
from commopt.exchange.mean import Aggregator
from commopt.gossip.loop import OuterLoop
from commopt.groups import Group, Peers
from commopt.methods import check_options, is_outer_method, is_update_method
from commopt.run.agree import agree, meeting_group
from commopt.run.rank_state import load_rank_state, read_rank_states, save_rank_state, together
from commopt.run.stand_in import move_schedulers, refuse_steps, stand_in

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

    from commopt.frameworks import accelerate
except ModuleNotFoundError as error:
    package = (error.name or "").partition(".")[0]
    if package not in ("transformers", "accelerate"):
        raise
    raise MissingExtra("commopt.frameworks.transformers", package, "transformers") from None

_log = logging.getLogger(__name__)


class CommoptCallback(TrainerCallback):  # type: ignore[misc]
    """Exchange by any method while a Trainer trains: `Trainer(..., callbacks=[CommoptCallback("onebit_adam")])`.

    method: what `commopt.build` made, or takes. An update method by its name takes the place of the optimizer that the Trainer makes,
    with its learning rates and groups; one that was built becomes the Trainer's optimizer. Outer methods leave DDP out, join when
    training begins and finish after its last step. optimizer, group, overlap: see `integrations.accelerate.attach`.

    `max_grad_norm` becomes an update method's `max_norm`, since clipping what it has exchanged already would do nothing; the log then
    holds no `grad_norm`. Checkpoints hold what each rank still has to send, in `commopt_rank0.pt` and so on, and the log holds
    `commopt_payload_mb`: megabytes that this rank has sent since the program started.

    attachment: what is at work, from the beginning of training on; None before.
    """

    def __init__(
        self,
        method: Aggregator | OuterLoop | Choice,
        optimizer: torch.optim.Optimizer | None = None,
        group: Group | Peers | None = None,
        *,
        overlap: bool | None = None,
    ) -> None:
        self.attachment: Any = None
        self.trainer: Any = None
        self._given, self._optimizer, self._group, self._overlap = method, optimizer, group, overlap
        self._is_built = isinstance(method, Aggregator | OuterLoop)
        self._method: Any = method  # or what was made of a name, for the model of this training
        self._name = method.name if isinstance(method, Aggregator | OuterLoop) else read_choice(method)[0]
        self._checkpoint: str | None = None
        self._is_finished = self._is_closed = False
        if self._is_built:
            self._is_update, self._is_outer = isinstance(method, torch.optim.Optimizer), isinstance(method, OuterLoop)
            return
        name, options = read_choice(method)  # type: ignore[arg-type]
        check_options(name, options)
        self._is_update, self._is_outer = is_update_method(name), is_outer_method(name)

    # -- before training

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # a callback is not told whose it is, and the Trainer that just made it is the one that calls
        frame = inspect.currentframe()
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, Trainer) and self in owner.callback_handler.callbacks:
                self.connect(owner)
                return
            frame = frame.f_back

    def connect(self, trainer: Any) -> None:
        """Take part in what this Trainer does from now on; `callbacks=[...]` and `attach` do it. Raises AttachError on all ranks."""
        self.trainer = agree(meeting_group(self._group), lambda: (self._checked(trainer), {}))
        if self._optimizer is None and self._is_update and self._is_built:
            self._optimizer = self._given  # type: ignore[assignment]
        if trainer.optimizer is None and self._optimizer is not None:
            trainer.optimizer = self._optimizer
            if self._is_update:
                _log.warning(
                    "%s steps with the options that it was built with; learning_rate and weight_decay of the TrainingArguments have "
                    "no effect on it (its name instead, or a block, takes them over)",
                    self._method.name,
                )
        for name, ours in (("create_optimizer", self._create_optimizer), ("train", self._train), ("log", self._log)):
            original = getattr(trainer, name)
            setattr(trainer, name, functools.wraps(original)(functools.partial(ours, original)))
        accelerator = trainer.accelerator
        if self._is_update:
            accelerator.clip_grad_norm_ = functools.partial(self._clip_grad_norm, accelerator.clip_grad_norm_)
        if self._is_outer:
            accelerator.prepare_model = functools.partial(accelerator.prepare_model, evaluation_mode=True)

    def _checked(self, trainer: Any) -> Any:
        """The Trainer, if it can train so. Raises AttachError."""
        args = trainer.args
        if self.trainer is not None:
            raise AttachError("this CommoptCallback belongs to a Trainer already; make another one")
        if any(isinstance(one, CommoptCallback) and one is not self for one in trainer.callback_handler.callbacks):
            raise AttachError("this Trainer has a CommoptCallback already, and takes one method")
        if trainer.is_deepspeed_enabled or args.deepspeed:
            raise AttachError(
                "deepspeed: DeepSpeed exchanges gradients itself: leave the CommoptCallback out, and write the method into its JSON, "
                'as {"commopt": {"method": "dgc"}}, with `import commopt.frameworks.deepspeed` in the script'
            )
        if trainer.is_fsdp_enabled or args.fsdp:
            raise AttachError(
                "fsdp: a sharded model is not supported here; use integrations.fsdp in a loop of your own, or DDP"
            )
        if args.n_gpu > 1:
            raise AttachError("one process with several GPUs averages inside itself: start one per GPU, by torchrun")
        if args.auto_find_batch_size:
            raise AttachError("auto_find_batch_size starts training anew on one rank alone: set the batch size")
        if trainer.model_wrapped is not trainer.model:
            raise AttachError("this Trainer has trained already: attach before the first train()")
        if self._is_built and trainer.model_init is not None and self._is_update:
            raise AttachError(
                f"model_init makes another model than {self._method.name} was built for: pass the method's name or block"
            )
        given = self._given if self._is_built and self._is_update else self._optimizer
        if given is not None and trainer.optimizer not in (None, given):
            raise AttachError(
                f"the Trainer was given another optimizer, {type(trainer.optimizer).__name__}: leave `optimizers` out, or pass "
                f"optimizers=({type(given).__name__.lower()}, None)"
            )
        if given is not None and getattr(trainer, "optimizer_cls_and_kwargs", None) is not None:
            raise AttachError("optimizer_cls_and_kwargs makes an optimizer, and there is one already: leave it out")
        if self._is_outer and getattr(args, "average_tokens_across_devices", False):
            _log.warning(
                "average_tokens_across_devices makes all ranks wait for each other in every step: set it to False under an outer method"
            )
        return trainer

    def _create_optimizer(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Let the Trainer make its optimizer, and put an update method in its place."""
        trainer = self.trainer
        if self.attachment is not None:
            if self.attachment.model is trainer.model:
                return original(*args, **kwargs)
            self.attachment.detach()  # model_init has made another one
            self.attachment = None
        original(*args, **kwargs)
        old = trainer.optimizer
        if self._is_update and not self._is_built:
            schedulers = [trainer.lr_scheduler] if trainer.lr_scheduler is not None else []
            where = "Trainer(optimizers=...)"
            self._method = stand_in(self._given, trainer.model, old, schedulers, where)  # type: ignore[arg-type]
            trainer.optimizer = self._method
            move_schedulers(schedulers, old, self._method)
            refuse_steps(old, self._method.name, "step trainer.optimizer")
            _log.info("%s has taken the place of %s", self._method.name, type(old).__name__)
        if self._is_update:
            self._take_over_max_norm()
        return trainer.optimizer

    def _take_over_max_norm(self) -> None:
        method, wanted = self._method, self.trainer.args.max_grad_norm or 0.0
        if wanted <= 0 or method.max_norm == wanted:
            return
        if method.max_norm is not None:
            _log.warning(
                "max_grad_norm=%s of the TrainingArguments has no effect: %s clips to its own max_norm=%s",
                wanted,
                method.name,
                method.max_norm,
            )
            return
        method.max_norm = float(wanted)
        _log.info(
            "%s clips to max_grad_norm=%s before it exchanges, and therefore after backward; max_grad_norm=0 lets both overlap",
            method.name,
            wanted,
        )

    def _clip_grad_norm(self, original: Any, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        """None where the method clips itself: gradients are what it has exchanged, and must stay."""
        if max_norm in (math.inf, self.trainer.args.max_grad_norm):
            return None
        return original(parameters, max_norm, norm_type)

    # -- training

    def _train(self, original: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if self._is_closed:
            raise AttachError(f"{self._method.name} has left this Trainer's job: make another Trainer to train again")
        if kwargs.get("trial", args[0] if args else None) is not None:
            raise AttachError("hyperparameter_search: a method belongs to one training; make a Trainer for each trial")
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.trainer.args.output_dir)
        self._checkpoint, self._is_finished = str(folder) if folder else None, False
        if folder and Path(folder).is_dir():
            # before the Trainer gives the state of another optimizer to this one
            _check_saved_under(self._name, Path(folder))
        return original(resume_from_checkpoint, *args, **kwargs)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        if trainer is None:
            raise AttachError(
                "CommoptCallback was added to a Trainer that was there already: Trainer(..., callbacks=[CommoptCallback(...)]), or "
                "commopt.attach(trainer, method) before train()"
            )
        if self.attachment is None:
            agree(meeting_group(self._group), lambda: (self._is_wrapped(trainer), {}))
            method = self._method if self._is_built or self._is_update else self._given
            optimizer, wrapped = trainer.optimizer, trainer.model_wrapped
            self.attachment = accelerate.attach(
                trainer.accelerator, wrapped, method, optimizer, self._group, overlap=self._overlap
            )
            self._method = self.attachment.method
        if self._checkpoint is not None:
            load_rank_state(self.attachment, read_rank_states(self._checkpoint, self.attachment))
        if self._is_outer:
            self.attachment.join()

    def _is_wrapped(self, trainer: Any) -> bool:
        """Raise AttachError for a model that an evaluation before training has left without DDP, with commopt or without."""
        inside = accelerate._uncompiled(trainer.model_wrapped)
        if self._is_outer or trainer.args.world_size == 1 or isinstance(inside, DistributedDataParallel):
            return True
        raise AttachError(
            "the Trainer has not wrapped the model in DDP: it does not (transformers 5.23) when evaluate() or predict() came before "
            "train(), and would train each rank alone. Make another Trainer for train(), or set eval_on_start=True"
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            self._finish()  # before the last evaluation and checkpoint

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._is_outer and args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.attachment.forget_rounds()  # the model is another one now
        else:
            self._finish()
        if self._is_outer:
            self.attachment.detach()
            self.attachment.close()
            self._is_closed = True

    def _finish(self) -> None:
        if self._is_finished:
            return
        self._is_finished = True
        if self._is_outer:
            self.attachment.finish()
        else:
            self._method.synchronise(self.attachment.group)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not args.save_only_model:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            save_rank_state(folder, self.attachment)

    def _log(self, original: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.attachment is not None and ("loss" in logs or "train_loss" in logs):
            logs["commopt_payload_mb"] = self.attachment.group.traffic.payload_bytes / 1e6
        original(logs, *args, **kwargs)


def _check_saved_under(name: str, folder: Path) -> None:
    """Raise CheckpointError, on all ranks alike, for a checkpoint of another method, or of none: its optimizer's state is another."""
    anew = "start anew from its model alone, Trainer(model=...from_pretrained(folder)), without resume_from_checkpoint"

    def look() -> None:
        own, first = (folder / f"commopt_rank{rank}.pt" for rank in (meeting_group(None).rank, 0))
        path = own if own.exists() else first
        if not path.exists():
            raise CheckpointError(
                f"{path} is missing: this checkpoint was saved without the method; take another, or {anew}"
            )
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if str(saved.get("method")).partition("(")[0] != name.partition("(")[0]:
            raise CheckpointError(
                f"{folder}: was saved under {saved.get('method')}, not {name}; take another, or {anew}"
            )

    together(look)


def attach(
    trainer: Any,
    method: Aggregator | OuterLoop | Choice,
    optimizer: torch.optim.Optimizer | None = None,
    group: Group | Peers | None = None,
    *,
    overlap: bool | None = None,
) -> CommoptCallback:
    """Give a Trainer a method before it trains; returns the callback that does it, whose `attachment` is there once training begins.

    Raises AttachError where the Trainer cannot train so, on every rank, and ConfigError for a method that does not exist.
    """
    callback = CommoptCallback(method, optimizer, group, overlap=overlap)
    callback.connect(trainer)
    trainer.add_callback(callback)
    return callback
