"""A method in the Trainer of Hugging Face transformers: `run = commopt.attach(trainer, method)`, before it trains."""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch.nn.parallel import DistributedDataParallel

from commopt.choice import Choice
from commopt.errors import AttachError, MissingExtra
from commopt.groups import Group, Peers
from commopt.method import Method
from commopt.methods import chosen
from commopt.run.checkpoint import read_block, save_block
from commopt.run.checks import Request, agree_on_method
from commopt.run.run import Run

try:
    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    from commopt.frameworks import accelerate
except ModuleNotFoundError as error:
    package = (error.name or "").partition(".")[0]
    if package not in (NEEDED := ("transformers", "accelerate")):
        raise
    raise MissingExtra("commopt.frameworks.transformers", *sorted(NEEDED, key=package.__ne__)) from None


@Run.register
class CommoptCallback(TrainerCallback):  # type: ignore[misc]
    """Exchanges by any method while a Trainer trains; `commopt.attach(trainer, method)` makes, adds and returns one.

    callback = CommoptCallback(trainer, "onebit_adam")
    trainer.add_callback(callback)

    The Trainer makes its optimizer as usual, or takes yours; when training begins, an update method stands in for it. Outer methods run
    without DDP, join when training begins and finish after its last step. max_norm: of an update method; the TrainingArguments'
    `max_grad_norm` if None. group, overlap: see `commopt.attach`.

    run: the run, from the beginning of training on; None before. Attributes that the callback lacks are those of the run; before
        training they raise AttachError. finish: does nothing, because the callback finishes the run after the last step.
    Raises AttachError on every rank if the Trainer does not fit, and ConfigError for a wrong option.
    """

    run: Run | None = None

    def __init__(
        self,
        trainer: Any,
        method: Method | type[Method] | Choice,
        *,
        group: Group | Peers | None = None,
        max_norm: float | None = None,
        overlap: bool | None = None,
    ) -> None:
        self._trainer = trainer
        self._request = Request(chosen(method), group=group, max_norm=max_norm, overlap=overlap)
        self._is_closed = False
        made = agree_on_method(self._request, _facts(trainer))
        self._name, self._kind, self._clips_itself = made.name, made.kind, not made.may_be_clipped
        trainer._commopt = self
        _put_around(trainer, "train", self._train)
        _put_around(trainer, "hyperparameter_search", self._search)
        _put_around(trainer, "_load_optimizer_and_scheduler", self._load)
        _put_around(trainer, "log", self._log)
        accelerator = trainer.accelerator
        if self._clips_itself:
            _put_around(accelerator, "clip_grad_norm_", self._clip_grad_norm)
        if self._kind == "outer":
            accelerator.prepare_model = functools.partial(accelerator.prepare_model, evaluation_mode=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._at_work, name)

    def __enter__(self) -> CommoptCallback:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def finish(self) -> None:
        pass

    def close(self) -> None:
        """Take the method out; this Trainer cannot train again."""
        self._is_closed = True
        if self.run is not None:
            self.run.close()

    # -- training

    def _start(self) -> None:
        """Attach to what the Trainer has prepared; once for a model, however often it trains."""
        trainer = self._trainer
        wrapped = accelerate.uncompiled(trainer.model_wrapped)
        is_alone = trainer.args.world_size > 1 and not isinstance(wrapped, DistributedDataParallel)
        agree_on_method(self._request, {"trainer without ddp": is_alone})
        if self.run is not None:
            if self.run.model is accelerate.uncompiled(trainer.model):
                self.run.is_finished = False
                return
            self.run.close()  # model_init has made another model
        max_norm = self._request.max_norm
        if max_norm is None and self._clips_itself and trainer.args.max_grad_norm:
            max_norm = float(trainer.args.max_grad_norm)
        request = replace(self._request, optimizer=trainer.optimizer, max_norm=max_norm)
        run: Any = accelerate.attach(wrapped, request)
        if self._kind == "outer":
            run.method.max_lag = sys.maxsize  # the Trainer counts the steps: a rank can't leave any out to catch up
        self.run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._start()
        self._at_work._log.plan(state.max_steps)
        self._at_work.join()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            self._finish()  # before the last evaluation and checkpoint

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not (args.load_best_model_at_end and state.best_model_checkpoint is not None):
            self._finish()
        elif self._kind == "outer":
            cast("Any", self.run).forget_rounds()  # the best model has been loaded
        if self._kind == "outer":
            self.close()

    def _finish(self) -> None:
        if not self._at_work.is_finished:
            self._at_work.finish()

    @property
    def _at_work(self) -> Run:
        if self.run is None:
            raise AttachError(f"{self._name}: its run begins with training; call trainer.train() first")
        return self.run

    # -- what is put around the Trainer's own methods

    def _train(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        is_added = self in self._trainer.callback_handler.callbacks
        agree_on_method(self._request, {"trainer left": self._is_closed, "trainer without callback": not is_added})
        return original(*args, **kwargs)

    def _search(self, *_: Any, **__: Any) -> None:
        agree_on_method(self._request, {"trainer trial": True})

    def _log(self, original: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.run is not None and ("loss" in logs or "train_loss" in logs):
            logs["commopt_payload_mb"] = self.run.traffic.payload_bytes / 1e6
            if "loss" in logs and self.run.grad_norm is not None:
                logs["grad_norm"] = self.run.grad_norm
            if "loss" in logs:
                self.run.note(loss=logs["loss"])
        original(logs, *args, **kwargs)

    def _clip_grad_norm(self, original: Any, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        """Leave clipping by the Trainer's own norm to the method: gradients are what it has exchanged, and must stay; return None."""
        if max_norm in (math.inf, self._trainer.args.max_grad_norm):
            return None
        return original(parameters, max_norm, norm_type)

    def _load(self, original: Any, checkpoint: str | None) -> None:
        """Attach before the optimizer's state is loaded into the method's stand-in; then load the method's own state."""
        if checkpoint is None:
            return
        self._start()
        take_over = read_block(Path(checkpoint), self._at_work)
        original(checkpoint)
        take_over()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not args.save_only_model:
            save_block(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", self._at_work)


def attach(trainer: Any, request: Request) -> Run:
    """Give a Trainer a method before it trains; the run's attributes exist once training begins."""
    facts = {
        "trainer optimizer": request.optimizer is not None and type(request.optimizer).__name__,
        "accelerate scaler": request.grad_scaler is not None,
    }
    agree_on_method(request, facts)
    callback = CommoptCallback(
        trainer, request.method, group=request.group, max_norm=request.max_norm, overlap=request.overlap
    )
    trainer.add_callback(callback)
    return cast("Run", callback)


def _facts(trainer: Any) -> dict[str, object]:
    args = trainer.args
    return {
        "trainer callbacks": hasattr(trainer, "_commopt"),
        "trainer deepspeed": trainer.is_deepspeed_enabled or args.deepspeed,
        "trainer fsdp": trainer.is_fsdp_enabled or args.fsdp,
        "trainer devices": args.n_gpu > 1,
        "trainer batch size": args.auto_find_batch_size,
        "trainer has trained": trainer.model_wrapped is not trainer.model,
    }


def _put_around(thing: Any, name: str, ours: Any) -> None:
    original = getattr(thing, name)
    setattr(thing, name, functools.wraps(original)(functools.partial(ours, original)))
