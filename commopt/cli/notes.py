"""What commands print about themselves, beside the output of the ranks."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

_QUIET_S = 2.5


def note(*messages: str) -> None:
    """Print lines about the run itself, beside the output of the ranks."""
    for message in messages:
        typer.secho(f"commopt: {message}", dim=True, err=True)


@contextmanager
def telling(what: str, *, first_s: float = 0.5) -> Iterator[Callable[[str], None]]:
    """Print what takes long, after `first_s` and then after 2.5 s without another line, until the block ends.

    After five minutes a 120th of the time may pass without a line; in a terminal, after 50 s a 20th.
    Gives a function to call when something else was printed, with what to print from then on: nothing if that is empty.
    """
    is_over, began_s, share = threading.Event(), time.monotonic(), 20 if sys.stderr.isatty() else 120
    doing, heard_s = what, began_s - _QUIET_S + first_s

    def heard(then: str) -> None:
        nonlocal doing, heard_s
        doing, heard_s = then, time.monotonic()

    def tell() -> None:
        left_s = first_s
        while not is_over.wait(left_s):
            took_s = time.monotonic() - began_s
            left_s = heard_s + max(_QUIET_S, took_s / share) - began_s - took_s
            if left_s <= 0:
                if doing:
                    note(f"{doing}, {took_s:.0f} s")
                heard(doing)
                left_s = _QUIET_S

    threading.Thread(target=tell, daemon=True).start()
    try:
        yield heard
    finally:
        is_over.set()
