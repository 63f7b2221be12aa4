"""Ranks with Accelerate and transformers, started once for all tests: their import is what costs."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
from pool import Pool

# what the frameworks say about themselves, not about what they are given here
THEIR_WARNINGS = (
    (DeprecationWarning, ""),  # of what they import
    (FutureWarning, ""),
    (UserWarning, ".*find_unused_parameters=True was specified"),
    (UserWarning, ".*'pin_memory' argument is set as true but no accelerator is found"),
)


class HuggingFaceRanks(Pool):
    """A `Pool` of as many processes as its jobs have, each with the environment that torchrun gives."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def _start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "TRANSFORMERS_VERBOSITY": "error"}
        environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        if self.size > 1:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(self.size)}
        for rank in range(self.size):
            ours, theirs = multiprocessing.Pipe()
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if self.size > 1 else {}
            words = ["python", "-c", f"import huggingface_ranks as h; h.serve({theirs.fileno()})"]
            with theirs:
                process = subprocess.Popen(
                    words, env={**environment, **place}, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
                )
            self._ranks.append((process, ours))

    def call(self, function: Any, *args: Any) -> list[Any]:
        """function(*args) on every rank."""
        return self.run(self.size, function, *args, timeout_s=100.0)


def serve(descriptor: int) -> None:
    """Be one rank, until the other end of the pipe is closed."""
    connection = Connection(descriptor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.modules["deepspeed"] = None  # type: ignore[assignment]  # Accelerate imports it where it is, which takes seconds
        import torch
        import transformers  # noqa: F401
        from accelerate import PartialState

        torch.set_num_threads(1)
        PartialState(cpu=True)
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        try:
            with warnings.catch_warnings():
                _, function, args = pickle.loads(message)
                warnings.simplefilter("error")
                for category, text in THEIR_WARNINGS:
                    warnings.filterwarnings("ignore", text, category)
                answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))


@functools.cache
def ranks_of(size: int) -> HuggingFaceRanks:
    """One pool per size in this process, whichever test asks for it."""
    return HuggingFaceRanks(size)


@pytest.fixture(scope="session")
def two() -> Iterator[HuggingFaceRanks]:
    """Two ranks of one job."""
    yield ranks_of(2)
    ranks_of(2).close()


@pytest.fixture(scope="session")
def alone() -> Iterator[HuggingFaceRanks]:
    """One process that is no part of a job."""
    yield ranks_of(1)
    ranks_of(1).close()


def new_accelerator(**options: Any) -> Any:
    """An Accelerator with nothing left of the one before."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()
    GradientState._reset_state()
    return Accelerator(cpu=True, **options)
