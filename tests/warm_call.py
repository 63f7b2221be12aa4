"""The command that stands in for a program run by the warm process; it imports next to nothing. See `warm`."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
NAMESPACES = [f"/proc/self/ns/{kind}" for kind in ("user", "net", "mnt", "pid")]  # in the order of entering


def namespaces() -> list[str]:
    return [os.readlink(name) for name in NAMESPACES]


def is_open(number: int) -> bool:
    """Whether a descriptor is still open; that of the directory listing itself no longer is."""
    try:
        return os.fstat(number) is not None
    except OSError:
        return False


def call(address: str, python: str, words: list[str]) -> None:
    """Stand in for `python words`: forward the signals sent to it, and end as it ends."""
    is_simple = words and (not words[0].startswith("-") or words[0] in ("-m", "-c", "-u"))
    inherited = [number for number in map(int, os.listdir("/proc/self/fd")) if is_open(number)]
    connection = socket.socket(socket.AF_UNIX)
    try:
        if not is_simple:
            raise OSError
        connection.connect(address)
        own = {"words": words, "environment": dict(os.environ), "folder": os.getcwd(), "python": python}
        message = json.dumps({**own, "namespaces": namespaces(), "files": inherited}).encode()
        files = [*(os.open(name, os.O_RDONLY) for name in NAMESPACES), *inherited]
        socket.send_fds(connection, [len(message).to_bytes(8, "big")], files)
        connection.sendall(message)
        for number in FORWARDED:
            signal.signal(number, lambda number, _: connection.sendall(bytes([number])))
    except OSError:
        os.execv(sys.executable, [sys.executable, *words])
    answer = connection.recv(8)
    status = os.waitstatus_to_exitcode(int.from_bytes(answer, "big")) if answer else 70
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)
