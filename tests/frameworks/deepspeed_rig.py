"""DeepSpeed engines in ranks that are started once, and the plain training that they are compared with."""

from __future__ import annotations

import functools
import logging
import os
import pickle
import socket
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from rig import flat, loss_of, make_batch, make_model, start
from torch import Tensor, nn

from commopt.groups import Group

LIMIT_S, GRACE_S = 110.0, 5.0


class Ranks:
    """`ranks.run(function, *args)` calls function(*args) on n ranks of one torch.distributed job, and returns what each returned."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._ranks: list[tuple[subprocess.Popen[bytes], Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        if not self._ranks:
            self._start()
        for _, connection in self._ranks:
            connection.send_bytes(pickle.dumps((function, args)))
        answers: list[tuple[bool, Any]] = []
        for _, connection in self._ranks:
            if not wait([connection], LIMIT_S if all(is_good for is_good, _ in answers) else GRACE_S):
                answers.append((False, "no answer in time"))
                break
            try:
                answers.append(pickle.loads(connection.recv_bytes()))
            except EOFError:
                answers.append((False, "the process ended"))
        failures = [text for is_good, text in answers if not is_good]
        if failures:  # whose other ranks may be anywhere: the next call starts new ones
            self.close()
            raise AssertionError("\n".join(failures))
        return [value for _, value in answers]

    def _start(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        path = os.pathsep.join(filter(None, sys.path))
        for rank in range(self._n):
            ours, theirs = Pipe()
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self._n), "PYTHONPATH": path}
            own |= {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            words = ["python", "-c", f"import deepspeed_rig; deepspeed_rig.serve({theirs.fileno()})"]
            process = subprocess.Popen(words, env={**os.environ, **own}, pass_fds=[theirs.fileno()])
            theirs.close()
            self._ranks.append((process, ours))

    def close(self) -> None:
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.wait()
        self._ranks = []


@functools.cache
def two_ranks() -> Ranks:
    """Two ranks for the whole session: what costs is importing DeepSpeed."""
    return Ranks(2)


def serve(descriptor: int) -> None:
    """Be one rank, until the other end of the pipe is closed."""
    connection = Connection(descriptor)
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what DeepSpeed's imports say of torch is not ours to mend
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
            False  # an extension that it would compile, and not use
        )
        get_accelerator().is_fp16_supported = lambda: True  # torch has it on every CPU; DeepSpeed asks for fast ones
        logging.getLogger("DeepSpeed").setLevel(logging.CRITICAL)
    dist.init_process_group("gloo")
    while True:
        try:
            function, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            answer = (True, function(*args))
        except BaseException:
            answer = (False, f"rank {dist.get_rank()}: {traceback.format_exc()}")
        connection.send_bytes(pickle.dumps(answer))


def configuration(own: Mapping[str, Any]) -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": 8, "gradient_clipping": 0.0, **own}


def make_engine(own: Mapping[str, Any], *, ours: bool = True, model: nn.Module | None = None, **arguments: Any) -> Any:
    """An engine around the model of the rig, by our `initialize` or by DeepSpeed's own."""
    import deepspeed

    from commopt.deepspeed import initialize

    make: Any = initialize if ours else deepspeed.initialize
    model = model or make_model()
    arguments.setdefault("model_parameters", list(model.parameters()))
    return make(model=model, config=configuration(own), **arguments)[0]


def train(engine: Any, steps: int, *, first: int = 0, poison: Mapping[int, float] | None = None) -> None:
    """Steps from `first` on, each on this rank's own batch; poison: {step: by which rank 1's loss is multiplied}."""
    dtype, rank = next(engine.module.parameters()).dtype, dist.get_rank()
    micro_batches = engine.gradient_accumulation_steps()
    for step in range(first * micro_batches, (first + steps) * micro_batches):
        x, y = make_batch(rank, step)
        loss = loss_of(engine(x.to(dtype)).float(), y)
        if poison and rank == 1 and step in poison:
            loss = loss * poison[step]
        engine.backward(loss)
        engine.step()


def engine_run(own: Mapping[str, Any], steps: int, ours: bool = True) -> Tensor:
    engine = make_engine(own, ours=ours)
    train(engine, steps)
    return flat(engine.module).float()


def plain_run(
    group: Group,
    method: str,
    options: Mapping[str, Any],
    steps: int,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    clip: float = 0.0,
    micro_batches: int = 1,
) -> Tensor:
    """The same training by the plain integration: of float32 masters, whose copies in `dtype` make the gradients."""
    masters, model = make_model(), make_model().to(dtype)
    with torch.no_grad():
        for low, p in zip(model.parameters(), masters.parameters(), strict=True):
            p.copy_(low)
    run = start(masters, method, group, **options)
    for step in range(steps):
        for micro in range(micro_batches):
            x, y = make_batch(group.rank, step * micro_batches + micro)
            (loss_of(model(x.to(dtype)).float(), y) / micro_batches * scale).backward()
        for low, p in zip(model.parameters(), masters.parameters(), strict=True):
            assert low.grad is not None
            p.grad, low.grad = low.grad.float() / scale, None
        if clip:
            run.exchange_gradients()
            torch.nn.utils.clip_grad_norm_(masters.parameters(), clip)
        run.optimizer.step()
        with torch.no_grad():
            for low, p in zip(model.parameters(), masters.parameters(), strict=True):
                low.copy_(p)
    return flat(model).float()
