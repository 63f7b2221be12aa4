"""The exchange between a DeepSpeed engine's backward and its optimizer's step: fp32, and the wrappers of fp16 and bf16."""

import inspect
import logging
import math
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from commopt.errors import AttachError
from commopt.frameworks.plain import PlainRun
from commopt.groups import Group
from commopt.optim.update import UpdateMethod
from commopt.run.checkpoint import has_block, read_block, save_block
from commopt.run.checks import Checked
from commopt.run.every_step import EveryStepRun
from commopt.run.run import Replaced, Run
from commopt.run.stand_in import StandIn

_log = logging.getLogger(__name__)


def is_half(engine: Any) -> bool:
    """Whether DeepSpeed has wrapped the optimizer, and steps float32 copies of fp16 or bf16 parameters."""
    return engine.optimizer is not engine.basic_optimizer


def has_masters(engine: Any) -> bool:
    """Whether these copies are separate tensors, and not parts of a flat one."""
    return hasattr(engine.optimizer, "fp32_groups") and hasattr(engine.optimizer, "fp16_groups")


def forget_dry_step(engine: Any) -> None:
    """Undo the step on zeros by which DeepSpeed's wrappers allocate an optimizer's state: it counts for Adam, and decays weights."""
    if has_masters(engine) and engine.global_steps == 0 and not hasattr(engine, "commopt"):
        engine.basic_optimizer.state.clear()
        engine.optimizer.refresh_fp32_params()


class Masters(Module):
    """An engine's model as its optimizer sees it: names and modules of the model, and the float32 copies of its parameters."""

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self._seen: dict[str, Any] = dict(engine.module.named_parameters())
        self.named_modules = engine.module.named_modules  # type: ignore[method-assign]
        self.named_buffers = engine.module.named_buffers  # type: ignore[method-assign]
        self.low: dict[str, Parameter] = {}  # the parameters that have float32 copies; empty in fp32
        if has_masters(engine):
            name_of = {id(p): name for name, p in self._seen.items()}
            lows, masters = engine.optimizer.fp16_groups, engine.optimizer.fp32_groups
            for low, master in zip(chain(*lows), chain(*masters), strict=True):
                name = name_of[id(low)]
                self.low[name], self._seen[name] = low, master

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, Parameter]]:
        yield from self._seen.items()

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Round the float32 copies into the model's own parameters."""
        for name, low in self.low.items():
            low.copy_(self._seen[name])


class EngineRun(PlainRun):
    """Exchanges at the step of the engine's basic optimizer, on unscaled float32 gradients, after the last micro-batch.

    DeepSpeed's old optimizers did so too; the engine's own all-reduce is off. Gradients are clipped to `gradient_clipping` after the
    exchange, or before it, as by `max_norm`, if the method requires that. If a gradient overflows on any rank under fp16, all ranks
    skip the step before anything is exchanged.
    """

    saved_by = "write engine.save_checkpoint(...) and engine.load_checkpoint(...), which keep the method's state of every rank too"

    def __init__(self, engine: Any, masters: Masters, checked: Checked, group: Group) -> None:
        self._engine, self.masters = engine, masters
        self._wrapper: Any = engine.optimizer if is_half(engine) else None
        super().__init__(masters, checked, group)
        self._clip = float(engine.gradient_clipping()) if self.method.may_be_clipped else 0.0
        self._scale = 1.0  # of the loss that the current gradients come from
        if isinstance(self.optimizer, StandIn):
            holder = engine if self._wrapper is None else self._wrapper
            self._handles.append(Replaced(holder, optimizer=self.optimizer))
            self._handles.append(Replaced(engine, basic_optimizer=self.optimizer))
        if self._wrapper is not None:  # leaves gradients finite on all ranks, unscaled, and unclipped
            checker = SimpleNamespace(check=self._overflows)
            self._handles.append(Replaced(self._wrapper, overflow_checker=checker, clip_grad=0.0))
            scaling = self._wrapper.loss_scale_config
            if scaling.cur_scale != 1.0 or scaling.dynamic_loss_scale:
                self._handles.append(Replaced(engine, backward=self._scaled_backward(engine.backward)))

    def range(self, stop: int) -> Iterator[int]:
        """The steps that are left to do; those that the engine has skipped count as done."""
        self._log.plan(stop)
        return iter(range(self._engine.global_steps, stop))

    def finish(self) -> None:
        super().finish()
        self.masters.copy_to_model()  # finish makes ranks equal after local steps

    def _scaled_backward(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        """The engine's backward, on a scaled loss: at stage 0 DeepSpeed (0.19.6 to 0.19.8) divides gradients by a scale that it
        never multiplied the loss by. If it has, the loss is left as it is."""

        def scaled(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            scale = self._scale = float(self._wrapper.loss_scale_config.cur_scale)
            by_micro_batches = kwargs.get("scale_wrt_gas", args[1] if len(args) > 1 else True)
            unscaled = 1 / self._engine.gradient_accumulation_steps() if by_micro_batches else 1.0

            def scale_once(grad: Tensor) -> Tensor:
                return grad * scale if math.isclose(float(grad), unscaled, rel_tol=0.01) else grad

            handle = loss.register_hook(scale_once)  # type: ignore[no-untyped-call]
            try:
                return backward(loss, *args, **kwargs)
            finally:
                handle.remove()

        return scaled

    def _overflows(self, param_groups: Any = None) -> bool:
        """Whether on any rank a gradient, or their norm, is not finite; the same answer on all. Sends 4 bytes."""
        grads = [p.grad for p in self.masters.low.values() if p.grad is not None]
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
        device = next(iter(self.parameters.values())).device
        total = torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float32, device=device)
        flag = (~total.isfinite()).to(torch.int32).reshape(1)
        self.group.traffic.bucket = "overflow"
        self.group.all_reduce(flag)
        return bool(flag)

    def _used_anywhere(self) -> list[str]:
        for name, low in self.masters.low.items():
            if low.grad is None:  # DeepSpeed has made zeros of it
                self.masters._seen[name].grad = None
        return super()._used_anywhere()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any = (), kwargs: Any = None) -> None:
        if self._wrapper is not None:
            # the wrapper may have raised its scale just before dividing by it
            ratio = float(self._wrapper.loss_scale_config.cur_scale) / self._scale
            for p in self.parameters.values() if ratio != 1.0 else ():
                if p.grad is not None:
                    p.grad.mul_(ratio)
        super()._before_step(optimizer, args, kwargs)
        used = [p for p in self.parameters.values() if p.grad is not None]
        if not self._is_update and (self._clip or (self._wrapper is not None and self.max_norm is None)):
            norm = float(torch.nn.utils.clip_grad_norm_(used, self._clip or math.inf))
            self._norm = math.nan if self._void_names else norm
        for shown in (self._engine, self._wrapper) if self._wrapper is not None else (self._engine,):
            shown._global_grad_norm = self.grad_norm  # theirs was of this rank's own gradients


def hand_over(engine: Any, run: Run) -> Replaced:
    """Switch off the engine's own exchange and its clipping before ours, and add the method's state to its checkpoints."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AttachError(
            f"allreduce_gradients would average, uncompressed, what {run.method.name} exchanges at engine.step(); leave it out"
        )

    def save_checkpoint(save_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
        save_block(Path(save_dir) / tag, run)  # first: the engine writes `latest` when all is there
        return save(save_dir, tag, *args, **kwargs)

    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(load).bind(*args, **kwargs)
        given.apply_defaults()
        take_over = _block_of(engine, run, **given.arguments)
        found = load(*given.args, **given.kwargs)
        if take_over is not None:
            take_over()
            if isinstance(run, EngineRun):
                run.masters.copy_to_model()  # a rank between two exchanges of 0/1 Adam has parameters of its own
        return found

    save, load = engine.save_checkpoint, engine.load_checkpoint
    ours: dict[str, Any] = {"save_checkpoint": save_checkpoint, "load_checkpoint": load_checkpoint, "commopt": run}
    if isinstance(run, EveryStepRun):  # clipped after the exchange: before it, a norm is this rank's own
        ours["clip_fp32_gradients"] = lambda: None
    return Replaced(engine, enable_backward_allreduce=False, allreduce_gradients=refuse, **ours)


def _block_of(
    engine: Any, run: Run, load_dir: Any, tag: Any, load_module_only: bool, load_optimizer_states: bool, **_: Any
) -> Callable[[], object] | None:
    """A function that loads the method's state from a checkpoint, to call once the engine has loaded its part; None if there is none.

    Raises CheckpointError if an update method's state is missing.
    """
    latest, name = Path(load_dir) / "latest", run.method.name
    if tag is None and latest.is_file():
        tag = latest.read_text(encoding="utf-8").strip()
    if tag is None:
        return None  # DeepSpeed warns that it has found nothing
    folder = Path(load_dir) / str(tag)
    if load_module_only or not load_optimizer_states:
        note = f"only part is loaded; {name} keeps the state that it has"
    elif has_block(folder) or isinstance(run.method, UpdateMethod):
        return read_block(folder, run)
    else:
        note = f"was saved without commopt; {name} keeps the state that it has"
    if engine.global_rank == 0:
        _log.warning("%s: %s", folder, note)
    return None
