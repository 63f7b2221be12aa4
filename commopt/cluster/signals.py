"""Handling of SIGINT, SIGTERM and SIGHUP in the launcher, at once or at the end of a block."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def on_signals(numbers: Iterable[signal.Signals], act: Callable[[int], object]) -> dict[signal.Signals, Any]:
    """Let these signals call `act`; return the previous handlers.

    A fork of this process has nothing to clean up and ends at once: pyroute2 forks to enter a namespace, and ends that by SIGTERM.
    """
    owner = os.getpid()

    def handler(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            os._exit(128 + number)
        act(number)

    return {number: signal.signal(number, handler) for number in numbers}


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Hold signals back until the block has ended; for pyroute2, whose event loop does not survive them."""
    if threading.current_thread() is not threading.main_thread():  # where Python delivers no signals
        yield
        return
    waiting: list[int] = []
    before = on_signals(SIGNALS, waiting.append)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in dict.fromkeys(waiting):
            signal.raise_signal(late)
