"""Start launchers, and see what they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from typer.testing import CliRunner

LIMIT_S = 200.0  # for what takes seconds on a machine that does nothing else
ROOT = Path(__file__).parents[1]
PROGRAMS = ROOT / "tests" / "cluster"  # among them, programs for nodes


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


def commopt_here(*words: object) -> tuple[int, str, str]:
    """Exit code, output and errors of a command that starts nothing: in this process, which has torch already."""
    from commopt.cli.app import app

    done = CliRunner().invoke(app, list(map(str, words)))
    return done.exit_code, done.stdout, done.stderr


_started: list[subprocess.Popen[str]] = []


def start(
    words: Sequence[str], folder: Path, program: str = "python", cwd: str | Path | None = None, **variables: str
) -> subprocess.Popen[str]:
    """Start a program whose temporary files go to `folder`, with these variables besides."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("COMMOPT_")}
    ours = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]]), "TMPDIR": str(folder)}
    process = subprocess.Popen(
        [program, *words],
        env={**inherited, **ours, **variables},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _started.append(process)
    return process


def member(mark: str, *words: object) -> list[str]:
    """The command of one of member.py's programs."""
    return [sys.executable, str(PROGRAMS / "member.py"), mark, *map(str, words)]


def drive(
    cluster: Path, mode: str, mark: str, commands: Sequence[Sequence[str]], **options: Any
) -> subprocess.Popen[str]:
    """Start drive.py on the nodes' commands, with the folders `scratch` and `record` beside the cluster's file."""
    folder = cluster.parent
    for name in ("scratch", "record"):
        (folder / name).mkdir(exist_ok=True)
    text = json.dumps({"commands": commands, "record": str(folder / "record"), **options})
    words = [str(PROGRAMS / "drive.py"), str(cluster), mode, mark, text]
    return start(words, folder / "scratch", shutil.which("python") or sys.executable)  # a test may have an empty PATH


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a drive.py that ended well has printed."""
    code, output, errors = finish(process)
    assert code == 0, errors
    found: dict[str, Any] = json.loads(output)
    return found


def printed(found: dict[str, Any], *labels: str) -> list[str]:
    """The lines of some nodes."""
    return [line for name, line in found["lines"] if name in labels]


def all_have_ended(mark: str) -> None:
    """Fail if something of a test is alive after 10 s."""
    wait_until(lambda: not processes(mark), "the end of every process", timeout_s=10)


def end_all() -> None:
    """End the launchers that a failed test has left, so that the next test does not fail because of them."""
    while _started:
        with _started.pop() as process:
            _end(process)


def read_until(stream: IO[str] | None, text: str) -> str:
    """What a launcher writes to its output or errors, up to some text; `finish` returns the rest."""
    assert stream is not None
    found = b""
    while text.encode() not in found:
        data = os.read(stream.fileno(), 1 << 16)
        assert data, f"{text!r} was never written: {found.decode()}"
        found += data
    return found.decode()


def finish(process: subprocess.Popen[str], timeout_s: float = LIMIT_S) -> tuple[int, str, str]:
    """Exit code, output and errors of a launcher."""
    try:
        output, errors = process.communicate(timeout=timeout_s)
    finally:
        _end(process)
    return process.returncode, output, errors


def _end(process: subprocess.Popen[str]) -> None:
    """End what still runs of what a launcher has started in its own session."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_until(is_true: Callable[[], bool], what: str, timeout_s: float = LIMIT_S) -> None:
    """Poll until something holds; fail with what was waited for."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for: {what}"
        time.sleep(0.05)
