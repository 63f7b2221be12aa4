"""What stands between a DeepSpeed engine's backward and its optimizer's step, in fp32 and around the wrappers of fp16 and bf16."""

from __future__ import annotations

import inspect
import logging
import math
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from commopt.errors import AttachError, CheckpointError
from commopt.exchange.mean import Aggregator
from commopt.frameworks.deepspeed_config import check_settings
from commopt.frameworks.plain import PlainAttachment
from commopt.groups import Group
from commopt.run.outer import OuterAttachment
from commopt.run.rank_state import load_rank_state, read_rank_states, save_rank_state

_log = logging.getLogger(__name__)


class Undo:
    """A handle, as hooks have, of something that was changed."""

    def __init__(self, undo: Callable[[], Any]) -> None:
        self.remove = undo


def restored(engine: Any, *names: str) -> Undo:
    """Lets an engine have its own methods of these names again."""
    return Undo(lambda: [engine.__dict__.pop(name, None) for name in names])


def is_half(engine: Any) -> bool:
    """Whether DeepSpeed has wrapped the optimizer, and steps float32 copies of fp16 or bf16 parameters."""
    return engine.optimizer is not engine.basic_optimizer


class Masters(Module):
    """An engine's model as its optimizer sees it: names and modules of the model, and the float32 copies of its parameters."""

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self._seen: dict[str, Any] = dict(engine.module.named_parameters())
        self._model: tuple[Module] = (engine.module,)  # a tuple, so that it is no submodule
        self.low: dict[str, Parameter] = {}  # the parameters of which these are copies; empty in fp32
        if is_half(engine):
            name_of = {id(p): name for name, p in engine.module.named_parameters()}
            wrapper = engine.optimizer
            for lows, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
                for low, master in zip(lows, masters, strict=True):
                    self.low[name_of[id(low)]] = low
                    self._seen[name_of[id(low)]] = master

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Parameter]]:
        yield from ((f"{prefix}.{name}" if prefix else name, p) for name, p in self._seen.items())

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Module]]:
        yield from self._model[0].named_modules(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        yield from self._model[0].named_buffers(*args, **kwargs)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Round the float32 copies into the model's own parameters."""
        for name, low in self.low.items():
            low.copy_(self._seen[name])


def check_engine(engine: Any, name: str) -> list[str]:
    """Raise AttachError for an engine whose gradients are not one mean over all ranks; return what is to be logged."""
    import deepspeed

    for is_so, what in (
        (engine.pipeline_parallelism, "a pipeline engine, whose stages exchange in their own schedule"),
        (engine.has_moe_layers, "a mixture of experts, whose gradients are averaged over other groups"),
        (engine.mpu is not None, "an mpu: model-parallel ranks hold different parameters"),
        (getattr(engine, "sequence_parallel_size", 1) > 1, "sequence parallelism, whose ranks share a batch"),
        (_size_of(engine, "autotp_size") > 1, "tensor parallelism: ranks hold different parameters"),
        (bool(getattr(engine, "zenflow", False)), "ZenFlow, which splits the optimizer's step"),
        (
            not hasattr(engine, "_take_model_step"),
            f"DeepSpeed {deepspeed.__version__}, whose engine steps in an unknown way",
        ),
        (engine.basic_optimizer is None, "an engine without an optimizer; name one in the configuration"),
    ):
        if is_so:
            raise AttachError(f"{name} does not go with {what}")
    return check_settings(engine._config, engine._config._param_dict, name)


def _size_of(engine: Any, name: str) -> int:
    return int(getattr(engine, name)()) if hasattr(engine, name) else 1


class EngineAttachment(PlainAttachment):
    """Exchanges at the step of the engine's basic optimizer, on unscaled float32 gradients, after the last micro-batch.

    As DeepSpeed's old optimizers did; its own all-reduce is off. Gradients are clipped to `gradient_clipping` after the exchange;
    update methods clip by `max_norm` before it. An overflow under fp16 on any rank is seen on all ranks before anything is
    exchanged, and the step is skipped everywhere.
    """

    def __init__(self, engine: Any, method: Aggregator, optimizer: Any, group: Group, bucket_bytes: int) -> None:
        self._engine = engine
        self._wrapper: Any = engine.optimizer if is_half(engine) else None
        self._masters = Masters(engine)
        super().__init__(self._masters, method, None if optimizer is method else optimizer, group, bucket_bytes, True)
        self._clip = 0.0 if self.is_update_method else float(engine.gradient_clipping())
        self._scale = 1.0  # by which the loss of the gradients at hand was multiplied
        self._handles += hand_over(engine, method.name)
        if self._wrapper is not None:
            self._handles += self._guard_wrapper()
        self._handles += self._keep_in_checkpoints()

    def synchronise(self) -> None:
        """Make replicas equal now, in methods with local steps; all ranks call it, between steps."""
        self.method.synchronise(self.group)
        self._masters.copy_to_model()

    def detach(self) -> None:
        """Give the exchange back to DeepSpeed. An update method cannot step without one, and refuses to."""
        super().detach()
        if self.is_update_method:
            name = self.method.name

            def refuse(*_: Any) -> NoReturn:
                raise AttachError(
                    f"{name} was detached from its engine, and would step along a momentum that nobody updates"
                )

            self.optimizer.register_step_pre_hook(refuse)

    def checkpoint_folder(self, folder: Path) -> Path:
        raise CheckpointError(
            f"{folder}: an engine's checkpoint is engine.save_checkpoint(...), which keeps the method's state of every rank too"
        )

    def _guard_wrapper(self) -> list[Undo]:
        """Let DeepSpeed's wrapper hand over what every rank can use: finite, unscaled, and not yet clipped."""
        wrapper = self._wrapper
        checker, clip = wrapper.overflow_checker, wrapper.clip_grad
        wrapper.overflow_checker, wrapper.clip_grad = _Overflow(self), 0.0

        def give_back() -> None:
            wrapper.overflow_checker, wrapper.clip_grad = checker, clip

        undo = [Undo(give_back)]
        if wrapper.loss_scale_config.cur_scale != 1.0 or wrapper.loss_scale_config.dynamic_loss_scale:
            self._engine.backward = self._scaled_backward(self._engine.backward)
            undo.append(restored(self._engine, "backward"))
        return undo

    def _scaled_backward(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        """The engine's backward, on a scaled loss: at stage 0 DeepSpeed (0.19.6 to 0.19.8) divides gradients by a scale that the
        loss never had. Where it has, nothing is done."""

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

    def _used_anywhere(self) -> list[str]:
        for name, low in self._masters.low.items():
            if low.grad is None:  # of which DeepSpeed has made zeros
                self._masters._seen[name].grad = None
        return super()._used_anywhere()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any = (), kwargs: Any = None) -> None:
        if self._wrapper is not None:
            # the wrapper may have raised its scale just before it divided by it
            ratio = float(self._wrapper.loss_scale_config.cur_scale) / self._scale
            for p in self.parameters.values() if ratio != 1.0 else ():
                if p.grad is not None:
                    p.grad.mul_(ratio)
        super()._before_step(optimizer, args, kwargs)
        if not self.is_update_method:
            self._clip_mean()
        elif self._wrapper is not None:
            self._wrapper._global_grad_norm = None  # it was that of this rank's own gradients

    def _clip_mean(self) -> None:
        """Clip the mean to `gradient_clipping`, and tell the engine its norm."""
        used = [p for p in self.parameters.values() if p.grad is not None]
        if not used or not (self._clip or self._wrapper is not None):
            return
        norm = float(torch.nn.utils.clip_grad_norm_(used, self._clip or math.inf))
        self._engine._global_grad_norm = norm
        if self._wrapper is not None:
            self._wrapper._global_grad_norm = norm

    def _keep_in_checkpoints(self) -> list[Undo]:
        """Put every rank's state beside the engine's files, and take it back with them."""
        engine, save, load = self._engine, self._engine.save_checkpoint, self._engine.load_checkpoint

        def save_checkpoint(save_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
            tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
            save_rank_state(Path(save_dir) / tag, self)  # first: `latest` is written when all is there
            return save(save_dir, tag, *args, **kwargs)

        def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(load).bind(*args, **kwargs)
            given.apply_defaults()
            return self._load(load, given.arguments)

        engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint
        return [restored(engine, "save_checkpoint", "load_checkpoint")]

    def _load(self, load: Callable[..., Any], given: dict[str, Any]) -> Any:
        folder, tag = Path(given["load_dir"]), given["tag"]
        latest = folder / "latest"
        if tag is None and latest.is_file():
            tag = latest.read_text(encoding="utf-8").strip()
        states = None
        if tag is None:
            pass  # DeepSpeed says that it has found nothing
        elif given["load_module_only"] or not given["load_optimizer_states"]:
            if self.group.rank == 0:
                _log.warning(
                    "%s: only part is loaded, and %s goes on with the state it has", folder / tag, self.method.name
                )
        elif self.is_update_method or any((folder / tag).glob("commopt_rank*.pt")):
            states = read_rank_states(folder / tag, self)
        elif self.group.rank == 0:
            _log.warning(
                "%s: was saved without commopt; %s begins with empty residuals", folder / tag, self.method.name
            )
        found = load(**given)
        if self._wrapper is not None:
            self._wrapper.clip_grad = 0.0  # a checkpoint brings that of its own time
        if states is not None:
            load_rank_state(self, states)
            self._masters.copy_to_model()  # a rank between two exchanges of 0/1 Adam has parameters of its own
        return found


class _Overflow:
    """In the place of DeepSpeed's check: whether on any rank a gradient, or their norm, is not finite. Sends 4 bytes."""

    def __init__(self, attachment: EngineAttachment) -> None:
        self._attachment = attachment

    def check(self, param_groups: Any = None) -> bool:
        """Whether this step is to be skipped; the same answer on all ranks."""
        lows = self._attachment._masters.low.values()
        norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in lows if p.grad is not None]
        group = self._attachment.group
        device = next(iter(self._attachment.parameters.values())).device
        total = torch.stack(norms).square().sum() if norms else torch.zeros((), device=device)
        flag = (~total.isfinite()).to(torch.int32).reshape(1)
        group.traffic.bucket = "overflow"
        group.all_reduce(flag)
        return bool(flag)

    def has_overflow(self, params: Any = None, has_moe_params: Any = None) -> bool:
        """As `check`."""
        return self.check()


def hand_over(engine: Any, name: str) -> list[Undo]:
    """Switch the engine's own exchange and clipping off."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AttachError(
            f"allreduce_gradients would average, uncompressed, what {name} exchanges at engine.step(); leave it out"
        )

    def leave_to_the_exchange() -> None:
        """Before the exchange a norm is this rank's own: clipped after it."""

    engine.enable_backward_allreduce = False
    engine.allreduce_gradients = refuse
    if name_is_of_gradients(name):
        engine.clip_fp32_gradients = leave_to_the_exchange

    def give_back() -> None:
        engine.enable_backward_allreduce = True

    return [Undo(give_back), restored(engine, "allreduce_gradients", "clip_fp32_gradients")]


def hand_over_outer(engine: Any, attachment: OuterAttachment) -> list[Undo]:
    """Switch DeepSpeed's exchange off, and refuse its checkpoints, which keep rank 0's replica alone."""
    undo = hand_over(engine, attachment.method.name)
    load = engine.load_checkpoint

    def refuse_save(*_: Any, **__: Any) -> NoReturn:
        raise CheckpointError(
            f"under {attachment.method.name} each rank has a replica of its own, and DeepSpeed saves rank 0's: use "
            "commopt.run.checkpoint.save(folder, engine.commopt)"
        )

    def load_model(*args: Any, **kwargs: Any) -> Any:
        if not inspect.signature(load).bind(*args, **kwargs).arguments.get("load_module_only"):
            raise CheckpointError(
                "DeepSpeed's checkpoint has no replicas: load_checkpoint(..., load_module_only=True) starts all from its model; "
                "to go on use commopt.run.checkpoint.load(folder, engine.commopt)"
            )
        return load(*args, **kwargs)

    engine.save_checkpoint, engine.load_checkpoint = refuse_save, load_model
    undo.append(restored(engine, "save_checkpoint", "load_checkpoint"))
    return undo


def name_is_of_gradients(name: str) -> bool:
    """Whether a method exchanges in every step; the inner steps of outer methods are clipped by DeepSpeed, each rank for itself."""
    from commopt.methods import is_outer_method

    return not is_outer_method(name)


HELD: dict[int, Any] = {}  # update methods inside an engine that is being made


def _step_when_attached(self: Any, closure: Any = None) -> Any:
    """`step`, but for the one on zero gradients by which DeepSpeed's wrappers let an optimizer make its state."""
    if id(self) not in HELD:
        return type(self).step(self) if closure is None else type(self).step(self, closure)
    if any(p.grad is not None and bool(p.grad.any()) for group in self.param_groups for p in group["params"]):
        raise AttachError(f"{self.name}: step() before it was attached to its engine: nothing has been exchanged")
    return None


def hold(method: Any) -> None:
    """Let an update method pass through the making of an engine; `HELD.pop(id(method))` when it is attached."""
    method.step = types.MethodType(_step_when_attached, method)
    HELD[id(method)] = method
