"""Signals that wait until something is whole again."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Deliver SIGINT, SIGTERM and SIGHUP when the block has ended; for pyroute2, whose event loop does not survive them.

    A fork that ends within the block, as pyroute2 makes and ends by SIGTERM, ends at once.
    """
    if threading.current_thread() is not threading.main_thread():  # where Python delivers no signals
        yield
        return
    owner = os.getpid()
    waiting: list[int] = []

    def keep(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            os._exit(128 + number)
        waiting.append(number)

    before = {number: signal.signal(number, keep) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in dict.fromkeys(waiting):
            signal.raise_signal(late)
