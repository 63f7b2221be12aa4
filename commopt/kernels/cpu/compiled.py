"""What all numba kernels have in common: how they are compiled, and the types of their arrays.

A kernel, what it calls and its constants stay in one file: numba's cache does not notice changes in another one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I8 = NDArray[np.int8]
I32 = NDArray[np.int32]
U8 = NDArray[np.uint8]
Bool = NDArray[np.bool_]
Places = tuple[NDArray[np.int64], ...]  # where blocks begin in several arrays, and their lengths
_F = TypeVar("_F", bound=Callable[..., Any])
_log = logging.getLogger(__name__)


def exact(function: _F, fastmath: set[str] | bool = False) -> _F:
    """njit without the GIL, with a cache on disk if there is a writable place for one."""
    options: dict[str, Any] = {"nogil": True, "fastmath": fastmath, "boundscheck": False, "error_model": "numpy"}
    try:
        return numba.njit(function, cache=True, **options)  # type: ignore[no-any-return]
    except RuntimeError as error:  # numba's word for: neither the package's folder nor a home is writable
        if not os.environ.get("COMMOPT_QUIET_CACHE"):
            _log.warning(
                "kernels are compiled anew in every process (%s); set NUMBA_CACHE_DIR to a writable folder", error
            )
            os.environ["COMMOPT_QUIET_CACHE"] = "1"
        return numba.njit(function, **options)  # type: ignore[no-any-return]


def fast(function: _F) -> _F:
    """`exact` with fast-math, but for nnan and ninf: with them a test for finiteness would be deleted."""
    return exact(function, {"reassoc", "contract", "arcp", "nsz"})
