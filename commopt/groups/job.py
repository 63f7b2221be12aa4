"""How a training program finds the other ranks of its job, whichever launcher started it."""

import os

from commopt.errors import ConfigError
from commopt.groups.base import Group, LocalGroup
from commopt.groups.torch import initialise

_OF_MPIRUN = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")


def connect(backend: str | None = None) -> Group | None:
    """Return the group of this job, for `attach(..., group=...)`; None if attach finds it by itself.

    Under mpirun it is an MPIGroup, or a World of machines with several ranks. Under torchrun, or any launcher that sets RANK, it is
    None, and torch.distributed is initialised with `backend` (Gloo if None). Under `commopt launch --independent` it is None, and
    torch.distributed is initialised for the ranks of one machine, if it has several. A program started by hand is one rank alone.
    backend: "gloo", "nccl", "mpi", or another one of torch.distributed; if None, COMMOPT_BACKEND, by which a launcher tells that of its
        cluster. Raises ConfigError for "mpi" under `commopt launch --independent`.
    """
    backend = backend or os.environ.get("COMMOPT_BACKEND")
    by_mpirun = "RANK" not in os.environ and any(key in os.environ for key in _OF_MPIRUN)
    if "COMMOPT_PEERS" in os.environ:
        if backend == "mpi":
            raise ConfigError("backend: 'mpi': commopt launch has started these ranks, not mpirun; leave it out")
        if os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
            initialise(backend or "gloo")
        return None
    if backend == "mpi" or (backend is None and by_mpirun):
        from commopt.groups.mpi import MPIGroup

        return MPIGroup().by_machine()
    if "RANK" not in os.environ:
        return LocalGroup()
    initialise(backend or "gloo")
    return None
