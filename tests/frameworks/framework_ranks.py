"""Warm ranks for each framework: forks of one process, because importing the framework is what takes long; and what they share."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import runpy
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from rig import flat, loss_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from commopt import attach
from commopt.errors import CommoptError


class FrameworkRanks(Pool):
    """`ranks.run(2, function, *args)` calls function(*args) on the ranks of its job of two, as torchrun would start them."""

    def _members(self, n: int) -> range:
        before = sum(self.jobs[: self.jobs.index(n)])
        return range(before, before + n)

    @classmethod
    def begin(cls, rank: int, size: int, port: int) -> Callable[[int], tuple[Any, ...]]:
        if size > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "GROUP_RANK": "0"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(size)}
        cls.join_job()
        return lambda _: ()

    @classmethod
    def join_job(cls) -> None:
        """Initialise torch.distributed."""
        dist.init_process_group("gloo")


class FSDPRanks(FrameworkRanks):
    """Four ranks, and two that initialise torch.distributed themselves."""

    jobs = (4, 2)

    @classmethod
    def load(cls) -> None:
        import fsdp_rig  # noqa: F401

        import commopt.frameworks.fsdp  # noqa: F401

    @classmethod
    def join_job(cls) -> None:
        if os.environ["WORLD_SIZE"] == "4":
            super().join_job()


class DeepSpeedRanks(FrameworkRanks):
    jobs = (2, 4)
    environment: ClassVar = {"OMP_NUM_THREADS": "1"}  # or Accelerate would change the threads of these ranks

    @classmethod
    def load(cls) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DeepSpeed's imports warn about torch
            import accelerate  # noqa: F401
            import deepspeed
            from deepspeed.accelerator import get_accelerator

        # an extension that it would compile, and not use
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        get_accelerator().is_fp16_supported = lambda: True  # torch has it on every CPU; DeepSpeed asks for fast ones
        logging.getLogger("DeepSpeed").setLevel(logging.CRITICAL)
        import deepspeed_rig  # noqa: F401


class HuggingFaceRanks(FrameworkRanks):
    """Two ranks with Accelerate and transformers, and one process that is no part of a job."""

    jobs = (2, 1)
    environment: ClassVar = {
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    # warnings about the frameworks themselves, not about their use here
    their_warnings = (
        (DeprecationWarning, ""),  # of what they import
        (FutureWarning, ""),
        (UserWarning, ".*find_unused_parameters=True was specified"),
        (UserWarning, ".*'pin_memory' argument is set as true but no accelerator is found"),
    )

    @classmethod
    def load(cls) -> None:
        sys.modules["deepspeed"] = None  # type: ignore[assignment]  # Accelerate imports it where it is, which takes seconds
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import transformers  # noqa: F401
            from accelerate import Accelerator  # noqa: F401
        super().load()

    @classmethod
    def join_job(cls) -> None:
        from accelerate import PartialState

        PartialState(cpu=True)


class LightningRanks(FrameworkRanks):
    jobs = (2,)
    environment: ClassVar = {"TORCHELASTIC_RUN_ID": "test"}
    their_warnings = (
        (Warning, ".*does not have many workers"),  # advice on speed, which tiny runs do not need
        (Warning, ".*number of training batches"),
        (Warning, ".*LeafSpec.*deprecated"),  # Lightning's own use of torch's trees
        (Warning, ".*your dataloader is not resumable"),  # the cases draw a batch by its step, which needs no state
        (Warning, "Checkpoint directory .* is not empty"),
        (Warning, ".*configure_optimizers. returned .None."),  # which one case tries
        (Warning, "Using .DistributedSampler."),  # advice for benchmarks
    )

    @classmethod
    def load(cls) -> None:
        import lightning.pytorch  # noqa: F401

        super().load()

    @classmethod
    def join_job(cls) -> None:
        """Leave it to Lightning."""


def new_accelerator(cpu: bool = True, **options: Any) -> Any:
    """An Accelerator with nothing left of the one before; it finds the device and the processes anew if `cpu` is False."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(not cpu)
    GradientState._reset_state()
    return Accelerator(cpu=cpu, **options)


def error_of(work: Callable[..., object], *given: Any, **options: Any) -> str:
    """The error that a call raises, or nothing."""
    try:
        work(*given, **options)
    except CommoptError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def gathered(x: Tensor) -> list[Tensor]:
    """A tensor of every rank."""
    every = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(every, x)
    return every


def run_program(name: str, *words: str) -> str:
    """What a program of launch/ prints on this rank."""
    launch = Path(__file__).parents[2] / "launch"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", [name, *words])
        patch.syspath_prepend(str(launch))
        runpy.run_path(str(launch / name), run_name="__main__")
    return printed.getvalue()


def train_by_ddp(
    model: nn.Module,
    method: Any,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    every: int = 1,
    clip: float = 0.0,
    scaler: torch.amp.GradScaler | None = None,
    dtype: torch.dtype | None = None,
    schedule: Callable[[], Any] = lambda: None,
    **options: Any,
) -> tuple[Tensor, float]:
    """The training that a framework's is compared with, in a plain loop: parameters, and bytes sent.

    every: batches in a step; dtype: of autocast; schedule: called after each step.
    """
    wrapped = DistributedDataParallel(model)
    run = attach(wrapped, method, optimizer, grad_scaler=scaler, **options)
    scaling = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for k, (x, y) in enumerate(batches, 1):
        wrapped.require_backward_grad_sync = is_last = k % every == 0
        with torch.autocast("cpu", dtype, enabled=dtype is not None, cache_enabled=False):
            loss = loss_of(wrapped(x), y) / every
        scaling.scale(loss).backward()
        if is_last:
            if clip:
                scaling.unscale_(run.optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaling.step(run.optimizer)
            scaling.update()
            schedule()
            run.optimizer.zero_grad()
    run.close()
    return flat(model), run.traffic.payload_bytes
