"""Fixtures of the transports' tests."""

from __future__ import annotations

from collections.abc import Iterator

import mpi_pool
import pytest

from commopt import kernels


@pytest.fixture(scope="session")
def mpi() -> Iterator[mpi_pool.MPIPool]:
    """Five ranks over MPI, started at the first use; skips, with the reason, where MPI is missing."""
    if why := mpi_pool.why_not():
        pytest.skip(why)
    kernels.warm_up()
    ranks = mpi_pool.MPIPool()
    yield ranks
    ranks.close()
