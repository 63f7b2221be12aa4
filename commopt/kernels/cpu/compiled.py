"""What all numba kernels have in common: how they are compiled, and the types of their arrays.

A kernel, what it calls and its constants stay in one file: numba's cache does not notice changes in another one.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numba import extending, types
from numba.core.caching import FunctionCache
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


KERNELS: list[Any] = []  # all of this process
_TELL_S, _PATIENCE_S = 2.5, 300.0  # between two lines about a compilation; for that of another process


class _OneAtATime:
    """Which kernels this process compiles, one within the other; a file is locked meanwhile, and other processes wait."""

    def __init__(self) -> None:
        self._open: list[tuple[object, object]] = []
        self._file, self._told_s = -1, -_TELL_S
        self.is_parallel = False  # some processes of one program share the work, and it holds the lock

    def begin(self, cache: Cached, signature: object) -> bool:
        """Whether another process may have compiled it meanwhile."""
        is_first = not self._open and not self.is_parallel
        if is_first:
            self.lock(cache.cache_path)
        self._open.append((cache, signature))
        self._name = cache.name
        if is_first:
            threading.Thread(target=self._tell_on, args=(time.monotonic(),), daemon=True).start()
        return is_first

    def end(self, cache: Cached, signature: object) -> None:
        if (cache, signature) in self._open:  # without those within it that have failed
            del self._open[self._open.index((cache, signature)) :]
        if not self._open and not self.is_parallel:
            self.unlock()

    def lock(self, folder: str) -> None:
        """Wait for other processes that compile kernels into this folder, and have others wait."""
        try:
            os.makedirs(folder, exist_ok=True)
            self._file = os.open(os.path.join(folder, "compiling.lock"), os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:  # nor can kernels be written there
            return
        began_s = time.monotonic()
        while time.monotonic() < began_s + _PATIENCE_S:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            if os.environ.get("LOCAL_RANK", "0") == "0":  # the others of a machine say the same
                self._tell("waiting for another process that compiles kernels", began_s)
            time.sleep(0.05)

    def unlock(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _tell_on(self, began_s: float) -> None:
        mine = self._open[:1]
        while self._open[:1] == mine and time.monotonic() < began_s + _PATIENCE_S:
            self._tell(f"compiling kernels, once on this machine: {self._name}", began_s)
            time.sleep(0.05)

    def _tell(self, text: str, began_s: float) -> None:
        if (now_s := time.monotonic()) >= max(self._told_s + _TELL_S, began_s + 0.1):
            self._told_s = now_s
            _log.warning("%s (%.0f s)", text, now_s - began_s)


ONE_AT_A_TIME = _OneAtATime()


class Missing(LookupError):
    """A kernel is not in the cache."""


class Cached(FunctionCache):  # type: ignore[misc]
    """numba's cache of one kernel on disk: what one process of a machine compiles, the others load."""

    only_load = False  # raise Missing instead of compiling

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self.name = f"{function.__module__.rpartition('.')[2]}.{function.__name__.lstrip('_')}"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        found = super().load_overload(sig, target_context)
        if found is None and Cached.only_load:
            raise Missing(self.name)
        if found is None and ONE_AT_A_TIME.begin(self, sig):
            found = super().load_overload(sig, target_context)
            if found is not None:
                ONE_AT_A_TIME.end(self, sig)
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        finally:
            ONE_AT_A_TIME.end(self, sig)


def exact(function: _F, fastmath: set[str] | bool = False) -> _F:
    """njit without the GIL, with a cache on disk if there is a writable place for one."""
    options: dict[str, Any] = {"nogil": True, "fastmath": fastmath, "boundscheck": False, "error_model": "numpy"}
    kernel: Any = numba.njit(function, **options)
    KERNELS.append(kernel)
    try:
        kernel._cache = Cached(function)
    except RuntimeError as error:  # numba's word for: neither the package's folder nor a home is writable
        if not os.environ.get("COMMOPT_QUIET_CACHE"):
            _log.warning(
                "kernels are compiled anew in every process (%s); set NUMBA_CACHE_DIR to a writable folder", error
            )
            os.environ["COMMOPT_QUIET_CACHE"] = "1"
    return kernel  # type: ignore[no-any-return]


def fast(function: _F) -> _F:
    """`exact` with fast-math, but for nnan and ninf: with them a test for finiteness would be deleted."""
    return exact(function, {"reassoc", "contract", "arcp", "nsz"})


def fma(a: Any, b: Any, c: Any) -> Any:
    """a b + c in float32, rounded once, as `torch.lerp` does it; for kernels, whose cache need not notice it: it does not change."""
    return np.float32(np.float64(a) * np.float64(b) + np.float64(c))


@extending.intrinsic
def _fused(context: Any, a: Any, b: Any, c: Any) -> Any:
    return types.float32(types.float32, types.float32, types.float32), lambda _, builder, __, given: builder.fma(*given)


@extending.overload(fma, strict=False)
def _fma_overload(a: Any, b: Any, c: Any) -> Any:
    return lambda a, b, c: _fused(a, b, c)


def from_nearer(weight: float) -> tuple[np.float32, np.float32]:
    """A weight of y in x + weight (y - x), and what to weigh y - x by: weight, or from 1/2 on weight - 1, as y is nearer then."""
    single = np.float32(weight)
    return single, single if abs(single) < np.float32(0.5) else np.float32(single - np.float32(1.0))
