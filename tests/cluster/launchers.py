"""Starting launchers and seeing what they leave behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def processes(word: str) -> list[int]:
    """Living processes that have `word` on their command line, in whatever namespace."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state not in "ZX" and word.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def environment(folder: Path) -> dict[str, str]:
    """This process's environment, with this tree importable and temporary files in `folder`."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("COMMOPT_")}
    return {**inherited, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]]), "TMPDIR": str(folder)}


def start(words: list[str], folder: Path) -> subprocess.Popen[str]:
    """Start a Python launcher whose temporary files go to `folder`."""
    return subprocess.Popen(
        [sys.executable, *words],
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 60) -> tuple[int, str, str]:
    """Exit code, output and errors of a launcher."""
    try:
        output, errors = process.communicate(timeout=timeout_s)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    return process.returncode, output, errors


def wait_until(is_true: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    """Poll until something holds; fail with what was waited for."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for: {what}"
        time.sleep(0.05)
