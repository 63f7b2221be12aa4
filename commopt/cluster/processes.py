"""Finds the processes of a job by the mark in their environment; run as a program, slows nodes down or stops them.

`python -I -S processes.py MARK` reads a JSON line for each change: {"node3": 0.2, "node1": 0} are the shares of the time
that these nodes may run. When the launcher ends, however it ends, so does the input; then the program resumes every
process and ends. It is not part of the launcher, because a killed launcher could not resume the processes that it had
stopped, and a stopped process does not end on SIGTERM. Imports nothing of commopt.
"""

import contextlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

_PERIOD_S = 0.08
_LOOK_S = 0.4  # how often new processes of a node are looked for


def marked(mark: str, node: str | None = None, states: str = "") -> Iterator[int]:
    """Processes whose environment has this job's mark (and this node's name), whatever their parent is now.

    states: only those in one of these, such as T, stopped by a signal.
    """
    wanted = [f"COMMOPT_JOB={mark}".encode(), *([f"COMMOPT_NODE={node}".encode()] if node is not None else [])]
    try:
        own_namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # no /proc
        return
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = (entry / "environ").read_bytes().split(b"\0")
            if not all(word in variables for word in wanted):
                continue
            is_so = not states or (entry / "stat").read_text().rpartition(")")[2].split()[0] in states
            if is_so and os.readlink(entry / "ns/pid") == own_namespace:
                pid = _pid_here(entry)
                if pid != os.getpid():
                    yield pid


def _pid_here(entry: Path) -> int:
    """The id of a process in its own PID namespace: a container may show the /proc of another one."""
    for line in (entry / "status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    return int(entry.name)


def kill_all(mark: str, node: str | None = None) -> None:
    """Send SIGKILL to every process of a job, or of one of its nodes, until none is left; at most for 5 s."""
    deadline_s = time.monotonic() + 5
    while (found := list(marked(mark, node))) and time.monotonic() < deadline_s:  # one may just have started another
        _signal(found, signal.SIGKILL)
        time.sleep(0.01)


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


class Throttle:
    """Lets the processes of some nodes run for only a share of the time. `close` resumes all of them."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._program: subprocess.Popen[bytes] | None = None
        self._shares: dict[str, float] = {}

    def set(self, shares: Mapping[str, float]) -> None:
        """From now on these nodes run for these shares of the time (0 stops them), and all others freely."""
        if dict(shares) == self._shares:
            return
        self._shares = dict(shares)
        if self._program is None:
            words = [sys.executable, "-I", "-S", __file__, self._mark]
            self._program = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
            )
        assert self._program.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it was killed: `close` resumes what it has stopped
            self._program.stdin.write(json.dumps(self._shares).encode() + b"\n")
            self._program.stdin.flush()

    def close(self) -> None:
        """Resume every process, and return when that is done."""
        if self._program is None:
            return
        assert self._program.stdin is not None
        with contextlib.suppress(OSError):
            self._program.stdin.close()
        if self._program.wait() != 0:  # it was killed, and may have left them stopped
            _signal(list(marked(self._mark)), signal.SIGCONT)
        self._program, self._shares = None, {}


class _Cycle:
    """The nodes' duty cycle, on one clock."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._shares: dict[str, float] = {}
        self._found: dict[str, list[int]] = {}
        self._is_stopped: dict[str, bool] = {}
        self._looked_s = -_LOOK_S

    def change(self, shares: dict[str, float]) -> None:
        for node in set(self._shares) - set(shares):
            _signal(list(marked(self._mark, node)), signal.SIGCONT)
        self._shares, self._looked_s = shares, -_LOOK_S

    def advance(self) -> float | None:
        """Stop and resume the nodes that are due; return the seconds until the next change, if there is one."""
        if not self._shares:
            return None
        now_s = time.monotonic()
        if now_s - self._looked_s >= _LOOK_S:
            self._looked_s, self._is_stopped = now_s, {}  # so that processes started since get their signal too
            self._found = {node: list(marked(self._mark, node)) for node in self._shares}
        phase_s = now_s % _PERIOD_S
        for node, share in self._shares.items():
            is_to_stop = phase_s >= share * _PERIOD_S
            if is_to_stop is not self._is_stopped.get(node):
                _signal(self._found[node], signal.SIGSTOP if is_to_stop else signal.SIGCONT)
                self._is_stopped[node] = is_to_stop
        edges_s = [share * _PERIOD_S for share in self._shares.values() if share * _PERIOD_S > phase_s]
        return max(0.001, min([*edges_s, _PERIOD_S]) - phase_s)


def main() -> None:
    """Follow the standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cycle, changes = _Cycle(sys.argv[1]), io.FileIO(0)  # unbuffered, or `select` would not see a second line
    wait_s: float | None = None
    while True:
        if select.select([changes], [], [], wait_s)[0]:
            line = changes.readline()
            if not line.endswith(b"\n"):  # the launcher has ended
                break
            cycle.change(json.loads(line))
        wait_s = cycle.advance()
    cycle.change({})


if __name__ == "__main__":
    main()
