"""Five ranks that are started once: processes with Gloo on loopback, which take functions over pipes.

They are forks of one process that has imported everything, which takes longer than all else.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from commopt import kernels

SIZES = (1, 2, 3, 5)
GRACE_S = 5.0  # how long the other ranks may take to end a call in which one rank failed


class Pool:
    """`pool.run(3, function, *args)` calls function(process_group, *args) on ranks 0 to 2 and returns what each returned.

    Functions travel by their names; warnings are errors in them. After a failure or a timeout the
    ranks are ended, and the next call starts new ones.
    """

    def __init__(self) -> None:
        self._ranks: list[tuple[subprocess.Popen[bytes], Connection]] = []

    def run(self, n: int, function: Callable[..., Any], *args: Any, timeout_s: float = 100.0) -> list[Any]:
        assert n in SIZES
        if not self._ranks:
            self._start()
        deadline = time.monotonic() + timeout_s
        waiting: dict[Connection, int] = {}
        for rank in range(n):
            connection = self._ranks[rank][1]
            connection.send_bytes(pickle.dumps((n, function, args)))
            waiting[connection] = rank
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in [one for one in waiting if one in ready]:
                rank = waiting.pop(connection)
                try:
                    ok, value = pickle.loads(connection.recv_bytes())
                except EOFError:
                    ok, value = False, "the process ended"
                (results if ok else failures)[rank] = value
                if not ok:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if failures or waiting:
            self.close()
            failures.update(dict.fromkeys(waiting.values(), "no answer in time"))
            raise AssertionError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
        return [results[rank] for rank in range(n)]

    def close(self) -> None:
        for process in {process for process, _ in self._ranks}:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the ranks that are its forks
            process.kill()
            process.wait()
        for _, connection in self._ranks:
            with contextlib.suppress(EOFError, OSError):  # a fork has nobody else who waits for its end
                while connection.poll(GRACE_S):
                    connection.recv_bytes()
            connection.close()
        self._ranks = []

    def _start(self) -> None:
        # not multiprocessing.Process: its resource tracker lives on for seconds after the tests
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        pipes = [multiprocessing.Pipe() for _ in range(max(SIZES))]
        descriptors = [theirs.fileno() for _, theirs in pipes]
        words = ["python", "-c", f"import pool; pool.fork_ranks({port}, {descriptors})"]
        process = subprocess.Popen(
            words, env=environment, stdin=subprocess.DEVNULL, pass_fds=descriptors, start_new_session=True
        )
        for ours, theirs in pipes:
            theirs.close()
            self._ranks.append((process, ours))


def fork_ranks(port: int, descriptors: list[int]) -> None:
    """Import what ranks want, become all of them, and end after the last one."""
    import rig  # noqa: F401
    import torch

    import commopt.frameworks.ddp
    import commopt.frameworks.plain  # noqa: F401

    torch.set_num_threads(1)
    kernels.warm_up()
    for rank, own in enumerate(descriptors):
        if os.fork() == 0:
            for other in descriptors:
                if other != own:
                    os.close(other)
            try:
                serve(rank, port, own)
            finally:
                os._exit(0)
    for descriptor in descriptors:
        os.close(descriptor)
    for _ in descriptors:
        os.wait()


_twins: dict[Any, Any] = {}


def twin_of(process_group: Any) -> Any:
    """Another process group of the same ranks."""
    return _twins[process_group]


def serve(rank: int, port: int, descriptor: int) -> None:
    """Be one rank, until the other end of the pipe is closed."""
    connection = Connection(descriptor)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    world, limit = max(SIZES), timedelta(seconds=60)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", timeout=limit, rank=rank, world_size=world)
    groups = {}
    for n in SIZES:
        # every rank is in as many groups as any other, which groups made later by some of them need
        for first in range(0, world, n):
            ranks = list(range(first, min(first + n, world)))
            own, twin = (dist.new_group(ranks, timeout=limit) for _ in range(2))
            if rank in ranks:
                groups[n], _twins[own] = own, twin
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        try:
            with warnings.catch_warnings():
                n, function, args = pickle.loads(message)  # functions by their module's name, which this imports
                warnings.simplefilter("error")
                answer = (True, function(groups[n], *args))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))
