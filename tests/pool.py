"""Five ranks that are started once: processes with Gloo on the loopback interface, which receive functions over pipes.

They are forks of one process that has imported everything, because imports take longest.
"""

from __future__ import annotations

import contextlib
import gc
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
from collections.abc import Callable, Iterable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, ClassVar

from commopt.run.prepare import prepare_all

SIZES = (1, 2, 3, 5)
GRACE_S = 5.0  # how long the other ranks may take to end a call in which one rank failed


class Pool:
    """`pool.run(3, function, *args)` calls function(process_group, *args) on ranks 0 to 2 and returns what each returned.

    Functions travel by their names; warnings are errors in them. After a failure or a timeout the
    ranks are ended, and the next call starts new ones.

    jobs: the number of ranks of each torch.distributed job. environment: of all its processes.
    their_warnings: (category, text) of the warnings that are not errors.
    """

    jobs: ClassVar[tuple[int, ...]] = (max(SIZES),)
    environment: ClassVar[dict[str, str]] = {}
    their_warnings: ClassVar[tuple[tuple[type[Warning], str], ...]] = ()

    def __init__(self) -> None:
        self._ranks: list[tuple[subprocess.Popen[bytes], Connection]] = []
        self._pids: set[int] = set()  # of ranks, stopped between calls because idle process groups keep waking

    @classmethod
    def load(cls) -> None:
        """Import what all ranks need, in the process that they are forked from."""
        import rig  # noqa: F401

        import commopt.frameworks.ddp
        import commopt.frameworks.plain  # noqa: F401

    @classmethod
    def begin(cls, rank: int, size: int, port: int) -> Callable[[int], tuple[Any, ...]]:
        """Become a rank of a job; returns a function from a call's number of ranks to the first arguments of its function."""
        import torch.distributed as dist

        limit = timedelta(seconds=60)
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", timeout=limit, rank=rank, world_size=size)
        groups = {}
        for n in SIZES:
            # groups that some ranks make later need every rank to be in equally many groups
            for first in range(0, size, n):
                ranks = list(range(first, min(first + n, size)))
                own, twin = (dist.new_group(ranks, timeout=limit) for _ in range(2))
                if rank in ranks:
                    groups[n], _twins[own] = own, twin
        return lambda n: (groups[n],)

    def _members(self, n: int) -> range:
        """The ranks that a call with n of them goes to."""
        assert n in SIZES
        return range(n)

    def run(self, n: int, function: Callable[..., Any], *args: Any, timeout_s: float = 100.0) -> list[Any]:
        if not self._ranks:
            self._start()
        self._signal(signal.SIGCONT)
        deadline = time.monotonic() + timeout_s
        waiting: dict[Connection, int] = {}
        for rank, member in enumerate(self._members(n)):
            connection = self._ranks[member][1]
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
                    ok, value, pid = pickle.loads(connection.recv_bytes())
                    self._pids.add(pid)
                except (EOFError, ConnectionError):
                    ok, value = False, "the process ended"
                (results if ok else failures)[rank] = value
                if not ok:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if failures or waiting:
            self.close()
            failures.update(dict.fromkeys(waiting.values(), "no answer in time"))
            raise AssertionError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
        self._signal(signal.SIGSTOP)
        return [results[rank] for rank in range(n)]

    def _signal(self, number: int) -> None:
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        self._pids = set()
        for process in {process for process, _ in self._ranks}:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the ranks that are its forks
            process.kill()
            process.wait()
        for _, connection in self._ranks:
            with contextlib.suppress(EOFError, OSError):  # nobody else waits for a fork to end
                while connection.poll(GRACE_S):
                    connection.recv_bytes()
            connection.close()
        self._ranks = []

    def _start(self) -> None:
        # not multiprocessing.Process: its resource tracker lives on for seconds after the tests
        environment = {**os.environ, **self.environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment |= {"GLOO_SOCKET_IFNAME": "lo"}
        pipes = [multiprocessing.Pipe() for _ in range(sum(self.jobs))]
        descriptors = [theirs.fileno() for _, theirs in pipes]
        own = type(self)
        script = f"import pool, {own.__module__} as own; pool.fork_ranks(own.{own.__name__}, {descriptors})"
        process = subprocess.Popen(
            ["python", "-c", script],
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=descriptors,
            start_new_session=True,
        )
        for ours, theirs in pipes:
            theirs.close()
            self._ranks.append((process, ours))


def fork_ranks(kind: type[Pool], descriptors: list[int]) -> None:
    """Import what ranks need, fork all of them, and end after the last one."""
    import torch

    torch.set_num_threads(1)
    kind.load()
    prepare_all(lambda _: None)
    gc.freeze()  # a collection in a rank would write to all imported objects, and so copy them
    own = iter(descriptors)
    for size in kind.jobs:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        for rank in range(size):
            descriptor = next(own)
            if os.fork() == 0:
                for other in descriptors:
                    if other != descriptor:
                        os.close(other)
                try:
                    serve(Connection(descriptor), kind.begin(rank, size, port), kind.their_warnings)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(0)
    for descriptor in descriptors:
        os.close(descriptor)
    for _ in descriptors:
        os.wait()


def end_groups() -> None:
    """End the process groups that attach made in earlier calls: each wakes a hundred times a second."""
    import torch.distributed as dist

    world = dist.distributed_c10d._world
    for group in list(world.pg_map):
        if group.group_desc == "commopt":
            name = world.pg_names[group]
            dist.destroy_process_group(group)
            world.pg_names[object()] = name  # type: ignore[index]  # torch counts these to make names, and would repeat one


_twins: dict[Any, Any] = {}


def twin_of(process_group: Any) -> Any:
    """Another process group of the same ranks."""
    return _twins[process_group]


def serve(
    connection: Connection,
    first: Callable[[int], tuple[Any, ...]],
    their_warnings: Iterable[tuple[type[Warning], str]] = (),
) -> None:
    """Be one rank, until the other end of the connection is closed."""
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, ConnectionError):
            return
        end_groups()
        try:
            with warnings.catch_warnings():
                n, function, args = pickle.loads(message)  # functions by their module's name, which this imports
                warnings.simplefilter("error")
                for category, text in their_warnings:
                    warnings.filterwarnings("ignore", text, category)
                answer = (True, function(*first(n), *args))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps((*answer, os.getpid())))
