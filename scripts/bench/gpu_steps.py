"""Training steps of GPT-2-small under each method, on one GPU: one rank of pretended others, or two ranks over Gloo.

One rank: DistributedDataParallel with the method's own hook, over a process group that pretends four ranks. Each exchange
returns at once, and every pretended rank has sent what this one sends (tests/same.py). So the codecs' work for four ranks is measured,
on the side stream beside backward as in training, and no network. "plain" is DDP with a hook that exchanges nothing.

Two ranks: two processes on the same GPU, over Gloo through the host's memory. "plain" is DDP with its own all-reduce.
"""

from __future__ import annotations

import gc
import json
import math
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from commopt import attach, build
from commopt.frameworks.ddp import DDPRun
from commopt.groups import Group
from commopt.methods import METHODS
from commopt.optim import make_optimizer

PRETENDED = 4  # ranks
WARM_UP = 4  # steps: DDP lays its buckets out anew after the first, and warm-ups of methods end in the second
# what methods need to be past their warm-up by then, and what has no default
OPTIONS: dict[str, dict[str, Any]] = {
    "auto": {"measure": 1, "candidates": ["fp16"]},
    "dgc": {"warmup_steps": 0},
    "dice_sgd": {"noise_multiplier": 1e-3, "noise_seed": 1},
    "onebit_adam": {"freeze_step": 2},
    "onebit_lamb": {"freeze_step": 2},
    "threshold": {"threshold": 1e-3},
    "zero_one_adam": {"var_freeze_step": 2, "local_step_clipper": 1},
}
OPTIMIZERS = {"onebit_adam": "adam", "zero_one_adam": "adam", "onebit_lamb": "lamb", "distributed_lion": "lion"}
COMMON = ("plain", "dense", "ef_sign", "two_way", "two_way(4bit)", "top_k", "powersgd", "onebit_adam", "signum")


@dataclass(frozen=True)
class Case:
    """A method with its options and optimizer; plain DDP, if it has no method."""

    name: str
    method: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "sgd"

    @property
    def against(self) -> str:
        """The name of what this is compared with: plain DDP with an optimizer that does as much."""
        return "plain" if self.optimizer == "sgd" else "plain, adam"


def all_cases() -> list[Case]:
    """Plain DDP, then what is used most, then all others."""
    cases = [Case("plain"), Case("plain, adam", optimizer="adam")]
    for name, method in METHODS.items():
        if method.kind != "outer":
            cases.append(Case(name, name, OPTIONS.get(name, {}), OPTIMIZERS.get(name, "sgd")))
    cases += [Case(f"two_way({codec})", "two_way", {"worker": codec}) for codec in ("4bit", "fp8")]
    return sorted(cases, key=lambda case: (not case.name.startswith("plain"), case.name not in COMMON))


# ---- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50304
    length: int = 1024
    batch: int = 8


SMALL, TINY = Shape(), Shape(layers=1, width=16, heads=2, vocabulary=64, length=8, batch=2)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, self.heads = shape.width, shape.heads
        self.norm, self.next_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        widened = nn.functional.gelu(self.up(self.next_norm(x)), approximate="tanh")
        return x.add(self.down(widened))


class GPT(nn.Module):
    """GPT-2, with the embedding as its last layer; returns the loss of predicting each next token."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.places = nn.Parameter(torch.zeros(shape.length, shape.width))
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.tokens(tokens[:, :-1]) + self.places))
        logits = nn.functional.linear(x, self.tokens.weight)
        loss: Tensor = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        return loss


# ---- training --------------------------------------------------------------------------------------------------------


class Training:
    """A model under DDP with a case's method; close it before the next one."""

    def __init__(self, case: Case, shape: Shape, device: torch.device, group: Group | None) -> None:
        self.device, self.shape = device, shape
        model = GPT(shape).to(device)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
        self.optimizer = make_optimizer({"name": case.optimizer, "lr": 1e-4}, self.model.parameters())
        self.tokens = torch.randint(shape.vocabulary, (shape.batch, shape.length + 1), device=device)
        self.run: Any = None
        self.is_guarded = False
        if case.method is not None:
            with guardable(self):
                self.run = attach(self.model, build(case.method, **case.options), self.optimizer, group=group)
            self.optimizer = self.run.optimizer
        elif group is not None:
            self.model.register_comm_hook(group, _nothing)

    def step(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(self.tokens)
        loss.backward()
        self.optimizer.step()

    def seconds(self, steps: int) -> float:
        """The median of some steps, on a GPU between events on the stream that trains."""
        if self.device.type != "cuda":
            return statistics.median(_elapsed(self.step) for _ in range(steps))
        events: Any = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]  # type: ignore[no-untyped-call]
        events[0].record()
        for event in events[1:]:
            self.step()
            event.record()
        torch.cuda.synchronize()
        return statistics.median(float(a.elapsed_time(b)) / 1000 for a, b in pairwise(events))

    def guarded_step(self) -> str:
        """What in the hook made the host wait, in a last step; empty for nothing."""
        self.is_guarded = True
        try:
            self.step()
        except RuntimeError as error:
            return _first_line(error)
        return ""

    def close(self) -> None:
        if self.run is not None:
            self.run.close()


def _nothing(group: Group, bucket: Any) -> Any:
    """A hook of DDP that divides, as DDP does, and exchanges nothing."""
    flat = bucket.buffer().div_(group.size)
    future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[flat.device] if flat.is_cuda else [])
    future.set_result(flat)
    return future


# DDP looks at the annotations, which are text in this file
_nothing.__annotations__ = {"bucket": GradBucket, "return": torch.futures.Future[Tensor]}


def _elapsed(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


# ---- host synchronisations -------------------------------------------------------------------------------------------


def alarm(mode: str) -> None:
    """What becomes of operations of torch that let the host wait for the GPU, in all threads: "error", "warn" or "default"."""
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode(mode)


@contextmanager
def counted_waits() -> Iterator[Counter[str]]:
    """How often an operation of torch let the host wait for the GPU: on the lane's thread, and on others."""
    found = Counter(lane=0, others=0)

    def note(message: Warning | str, *_: object, **__: object) -> None:
        if "called a synchronizing CUDA operation" in str(message):
            found["lane" if threading.current_thread().name.startswith("commopt lane") else "others"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        alarm("warn")
        try:
            yield found
        finally:
            alarm("default")


@contextmanager
def guardable(training: Training) -> Iterator[None]:
    """Let hooks that are made now be guarded while `training.is_guarded`: what lets the host wait for the GPU raises in them.

    The mode is the process's, and exchanges, which run on the lane's thread, may ask the GPU once. So they wait for the end of the hook.
    """
    hook = DDPRun._hook

    @wraps(hook)  # DDP looks at the annotations
    def guarded(run: DDPRun, bucket: Any) -> Any:
        lane: Any = run._lane
        if not training.is_guarded or lane is None:
            return hook(run, bucket)
        lane.close()  # waits for what earlier hooks have submitted
        is_over, submit = threading.Event(), lane.submit
        lane.submit = lambda job, uses=(): submit(lambda: (is_over.wait(), job())[1], uses)
        alarm("error")
        try:
            return hook(run, bucket)
        finally:
            alarm("default")
            del lane.submit
            is_over.set()

    DDPRun._hook = guarded  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        DDPRun._hook = hook  # type: ignore[method-assign]


# ---- one rank, and two -----------------------------------------------------------------------------------------------


def measured(case: Case, shape: Shape, device: torch.device, group: Group | None, steps: int) -> dict[str, Any]:
    """A row of one case. Whatever fails is a result too."""
    row: dict[str, Any] = {"case": case.name, **{key: value for key, value in asdict(case).items() if key != "name"}}
    try:
        training = Training(case, shape, device, group)
    except Exception as error:
        return row | {"status": "failed", "why": _first_line(error)}
    try:
        for _ in range(WARM_UP):
            training.step()
        row |= {"step_s": training.seconds(steps), "parameters": training.parameters}
        if training.run is not None:
            row |= {"steady": training.run.method.is_steady, "buckets": len(training.run.bucket_layout())}
        if device.type == "cuda":
            with counted_waits() as waits:
                training.step()
            row["host_waits"] = dict(waits)
        if training.run is not None and training.run._lane is not None:
            row["hook_waits"] = training.guarded_step()
        status, why = "ok", ""
    except Exception as error:
        status, why = "failed", _first_line(error)
    with suppress(Exception):
        training.close()
    return row | {"status": status, "why": why}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]


def fitting(shape: Shape, device: torch.device, ranks: int = 1) -> Shape:
    """The shape with the largest batch of each rank, up to its own, for which plain training takes at most half of the free memory."""
    free, _ = torch.cuda.mem_get_info(device)
    batch = max(shape.batch // ranks, 1)
    while batch > 1 and not _peak(replace(shape, batch=batch), device) * ranks < free / 2:
        batch //= 2
    _let_go(device)
    return replace(shape, batch=batch)


def _peak(shape: Shape, device: torch.device) -> float:
    """Bytes that a forward and backward pass takes."""
    torch.cuda.reset_peak_memory_stats(device)
    try:
        tokens = torch.zeros(shape.batch, shape.length + 1, dtype=torch.int64, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = GPT(shape).to(device)(tokens)
        loss.backward()
    except torch.cuda.OutOfMemoryError:
        return math.inf
    return torch.cuda.max_memory_allocated(device)


def one_rank(cases: Sequence[Case], shape: Shape, device: torch.device, steps: int) -> Iterator[dict[str, Any]]:
    """Rows of cases on this rank of some that are pretended."""
    from same import Same  # of tests/
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=PRETENDED, store=FakeStore())
    try:
        for case in cases:
            yield measured(case, shape, device, Same(PRETENDED), steps)
            _let_go(device)
    finally:
        dist.destroy_process_group()


def two_ranks(
    cases: Sequence[Case], shape: Shape, device: torch.device, steps: int, end: float
) -> Iterator[dict[str, Any]]:
    """Rows of cases on two processes, as they come, until the monotonic clock shows `end`."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    job = json.dumps([[asdict(case) for case in cases], asdict(shape), str(device), steps, port])
    words, outs = [sys.executable, __file__, job], (subprocess.PIPE, subprocess.DEVNULL)
    with tempfile.TemporaryFile("w+") as said:
        ranks = [subprocess.Popen([*words, str(k)], stdout=outs[k], stderr=said, text=True) for k in range(2)]
        killer = threading.Timer(max(end - time.monotonic(), 0), lambda: [*map(subprocess.Popen.kill, ranks)])
        killer.start()
        try:
            assert ranks[0].stdout is not None
            yield from (json.loads(line) for line in ranks[0].stdout if line.startswith("{"))
            if ranks[0].wait() > 0:
                said.seek(0)
                raise RuntimeError("a rank over Gloo failed: " + " ".join(said.read().splitlines()[-2:]))
        finally:
            killer.cancel()
            for rank in ranks:
                rank.kill()
                rank.communicate()


def _rank_of_two(job: str, rank: int) -> None:
    """Print a row of each case, on rank 0."""
    cases, shape, device, steps, port = json.loads(job)
    place = torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    for case in cases:
        row = measured(Case(**case), Shape(**shape), place, None, steps)
        if rank == 0:
            print(json.dumps(row), flush=True)
        _let_go(place)
        dist.barrier()  # a rank that failed alone must not begin the next case before the other one


def _let_go(device: torch.device) -> None:
    gc.collect()  # a model and its DDP refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    _rank_of_two(sys.argv[1], int(sys.argv[2]))
