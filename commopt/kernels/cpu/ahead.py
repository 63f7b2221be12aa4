"""Compiles kernels before they are needed, in as many processes as there are cores."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

import numba
import numpy as np

from commopt.kernels.cpu.compiled import KERNELS, ONE_AT_A_TIME, Cached, Missing

Call = tuple[Any, tuple[Any, ...]]  # a kernel, and the types of its arguments
_TELL_S = 2.5


@contextmanager
def noted() -> Iterator[dict[Call, None]]:
    """Run kernels as plain Python, and note which ones are called; for arrays of a few elements."""
    found: dict[Call, None] = {}
    depth = 0

    def plain(kernel: Any) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            nonlocal depth
            if depth == 0:  # what a kernel calls is compiled with it
                found[kernel, tuple(map(numba.typeof, given))] = None
            depth += 1
            try:
                with np.errstate(all="ignore"):  # kernels count modulo 2^64
                    return kernel.py_func(*given)
            finally:
                depth -= 1

        return call

    modules = [vars(module) for name, module in sys.modules.items() if name.startswith(__package__ + ".")]
    known = {id(kernel) for kernel in KERNELS}
    places = [(names, name, x) for names in modules for name, x in names.items() if id(x) in known]
    for names, name, kernel in places:
        names[name] = plain(kernel)
    try:
        yield found
    finally:
        for names, name, kernel in places:
            names[name] = kernel


def load(calls: list[Call]) -> list[Call]:
    """Load kernels from the cache on disk; returns those that are not there."""
    missing = []
    Cached.only_load = True
    try:
        for kernel, types in calls:
            try:
                kernel.compile(types)
            except Missing:
                missing.append((kernel, types))
    finally:
        Cached.only_load = False
    return missing


def compile_all(calls: list[Call], tell: Callable[[str], object]) -> None:
    """Compile kernels into the cache on disk, and load them. tell: gets a line about each, and one a second at least.

    What fails here is left for its first use, which shows the error.
    """
    calls = [call for call in calls if isinstance(call[0]._cache, Cached)]  # else each process compiles for itself
    if not (missing := load(calls)):
        return
    ONE_AT_A_TIME.lock(missing[0][0]._cache.cache_path)
    try:
        _compile_all(load(missing), tell)
    finally:
        ONE_AT_A_TIME.unlock()
    load(missing)


def _compile_all(missing: list[Call], tell: Callable[[str], object]) -> None:
    context, total, began_s = multiprocessing.get_context("fork"), len(missing), time.monotonic()
    waiting, running, told_s = list(missing), dict[Any, tuple[Any, str]](), began_s
    tell(f"compiling {total} kernels, once on this machine")
    while waiting or running:
        while waiting and len(running) < len(os.sched_getaffinity(0)):
            kernel, types = waiting.pop(0)
            process = context.Process(target=_compile, args=(kernel, types), daemon=True)
            process.start()
            running[process.sentinel] = process, kernel._cache.name
        ended = wait(list(running), timeout=0.1)
        for sentinel in ended:
            running.pop(sentinel)[0].join()
        if ended or time.monotonic() > told_s + _TELL_S:
            told_s, done = time.monotonic(), total - len(waiting) - len(running)
            names = ", ".join(name for _, name in running.values())
            tell(f"compiled {done} of {total} kernels in {told_s - began_s:.0f} s{names and f'; now {names}'}")


def _compile(kernel: Any, types: tuple[Any, ...]) -> None:
    ONE_AT_A_TIME.is_parallel = True
    kernel.compile(types)
