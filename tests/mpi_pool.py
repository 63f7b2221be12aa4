"""Five ranks that mpiexec starts once, which receive functions over sockets: the pool of Gloo ranks, over MPI."""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import cache
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import pytest
from pool import SIZES, Pool
from pool import serve as serve_calls

from commopt.run.prepare import prepare_all

START_S, END_S = 60.0, 10.0
# Open MPI needs these to start more ranks than there are cores, or any as root; other MPIs ignore them
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}


def mpiexec() -> str | None:
    """The mpiexec of this Python's environment, or else the first one on the PATH."""
    beside = Path(sys.executable).parent / "mpiexec"
    return str(beside) if beside.exists() else shutil.which("mpiexec")


def why_not() -> str:
    """What is missing to run ranks over MPI here, or ""."""
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed"
    return "" if mpiexec() else "there is no mpiexec: pip install mpich"


def environment() -> dict[str, str]:
    """For mpiexec's ranks: Open MPI's settings and this Python's module path."""
    return {**os.environ, **OPEN_MPI, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@cache
def shared() -> MPIPool:
    """The ranks of all tests of this process, until it ends; skips the test, with the reason, if MPI is missing."""
    if why := why_not():
        pytest.skip(why)
    prepare_all(lambda _: None)
    ranks = MPIPool()
    atexit.register(ranks.close)
    return ranks


class MPIPool(Pool):
    """`pool.run(3, function, *args)` calls function(communicator, *args) on ranks 0 to 2 and returns what each returned."""

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        self._pids = set()
        for _, connection in self._ranks:
            connection.close()  # each rank returns from `serve`
        for process in {process for process, _ in self._ranks}:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:  # a rank waits in an exchange: mpiexec ends them all
                process.terminate()
                process.wait()
        self._ranks = []

    def _start(self) -> None:
        n = max(SIZES)
        with tempfile.TemporaryDirectory() as folder, Listener(f"{folder}/ranks", "AF_UNIX", n) as listener:
            script = "import mpi_pool; mpi_pool.serve()"
            words = [str(mpiexec()), "-n", str(n), "python", "-c", script, f"{folder}/ranks"]
            process = subprocess.Popen(words, env=environment(), stdin=subprocess.DEVNULL)
            listener._listener._socket.settimeout(START_S)  # type: ignore[attr-defined]
            by_rank: dict[int, Connection] = {}
            for _ in range(n):
                connection = listener.accept()
                by_rank[connection.recv()] = connection
        self._ranks = [(process, by_rank[rank]) for rank in range(n)]


def serve() -> None:
    """Be one rank, until the other end of the socket is closed."""
    from mpi4py import MPI

    world: Any = MPI.COMM_WORLD
    connection = Client(sys.argv[1])
    connection.send(world.rank)
    import torch

    torch.set_num_threads(1)
    communicators = {n: world.Split(world.rank // n) for n in SIZES}
    serve_calls(connection, lambda n: (communicators[n],))
