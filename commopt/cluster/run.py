"""Run one job: an agent per node, its output sorted, its bytes counted, and all of it ended when a part of it ends."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import socket
import struct
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from commopt.cluster.commands import agent_environment, agent_words, program_words
from commopt.cluster.emulate import Emulation, end_with_parent
from commopt.cluster.output import Ended, Logs, Reader, Traceback
from commopt.cluster.spec import ClusterSpec, Emulate
from commopt.errors import LaunchError

_TICK_S = 0.2
_CREDENTIALS = struct.Struct("3i")  # process, user, group
_OTHERS_S = 1.5  # for the other nodes to report what they saw, before they are ended
_GRACE_S = 4.0  # between SIGTERM and SIGKILL
_FOLLOWS = re.compile(
    r"closed by peer|reset by peer|Connection refused|Broken pipe|remote process exited|ncclRemoteError|ncclSystemError"
    r"|[Tt]imed out|Socket Timeout|DistNetworkError|DistStoreError|GroupError"
)


@dataclass(frozen=True)
class Tick:
    """The state of a running job: seconds since its start, and the bytes each node has sent since then."""

    elapsed_s: float
    tx_bytes: Mapping[str, int]


@dataclass(frozen=True)
class Failure:
    """What ended a job: the first rank that failed, or an agent (rank None).

    exit_code is None where a signal ended it, and signal_name otherwise. message: that rank's last traceback, or "".
    """

    node: str
    rank: int | None
    exit_code: int | None
    signal_name: str | None
    message: str = ""

    def __str__(self) -> str:
        who = f"rank {self.rank} ({self.node})" if self.rank is not None else f"the torchrun agent of {self.node}"
        if self.signal_name is not None:
            return f"{who} was killed by {self.signal_name}"
        exception = next((line for line in reversed(self.message.splitlines()) if line and not line[0].isspace()), "")
        return f"{who} failed: {exception}" if exception else f"{who} ended with exit code {self.exit_code}"


@dataclass(frozen=True)
class JobResult:
    """How a job ended.

    tx_bytes is empty where nodes share an interface. log_dir holds `NODE.log`; None where none was asked for and the
    job ended well. notices concern the supervision itself.
    """

    ok: bool
    wall_s: float
    tx_bytes: Mapping[str, int]
    mode: Emulate
    log_dir: Path | None
    failure: Failure | None = None
    notices: tuple[str, ...] = ()


@dataclass
class _Agent:
    """One node's running agent."""

    node: int
    name: str
    process: subprocess.Popen[bytes]
    output: socket.socket
    reader: Reader = field(default_factory=Reader)
    is_open: bool = True
    ended_s: float | None = None


def run_job(
    cluster: ClusterSpec,
    argv: Sequence[str],
    *,
    emulation: Emulation,
    env: Mapping[str, str] | None = None,
    log_dir: Path | None = None,
    on_tick: Callable[[Tick], None] | None = None,
    on_line: Callable[[str, str], None] | None = None,
    agent: Callable[[int], Sequence[str]] | None = None,
) -> JobResult:
    """Run `argv` (a program and its arguments) on every rank, and return when all of it has ended.

    env: variables added to the ranks' environment. log_dir: made if needed; gets `NODE.log` with all that was printed.
    Without it the last of it is kept in memory, and written to a temporary folder if the job fails.
    on_tick: called about five times a second. on_line: called with a label ("node2") and a line of a rank's output.
    agent: the command to run on a node instead of torchrun. On Ctrl-C, SIGTERM or an error in a callback, every
    process is ended and the exception goes on. Raises LaunchError if nothing could be started.
    """
    emulation = emulation.fresh_port()
    job = _Job(cluster, emulation, log_dir, on_tick, on_line)
    words = program_words(argv[0], argv[1:]) if argv else []
    make = agent or (lambda node: agent_words(cluster, node, words, meeting=emulation.meeting))
    try:
        for node in emulation.nodes:
            job.start(node, make(node), env or {})
        job.watch()
    finally:
        job.end()
    return job.result()


class _Job:
    def __init__(
        self,
        cluster: ClusterSpec,
        emulation: Emulation,
        log_dir: Path | None,
        on_tick: Callable[[Tick], None] | None,
        on_line: Callable[[str, str], None] | None,
    ) -> None:
        self._cluster, self._emulation, self._log_dir = cluster, emulation, log_dir
        self._on_tick, self._on_line = on_tick, on_line
        self._mark = uuid.uuid4().hex
        self._agents: list[_Agent] = []
        self._selector = selectors.DefaultSelector()
        self._logs = Logs(log_dir, [cluster.nodes[node].name for node in emulation.nodes])
        self._sent_before = emulation.tx_bytes()
        self._started_s = time.monotonic()
        self._wall_s = 0.0
        self._sent: dict[str, int] = {}

    def start(self, node: int, words: Sequence[str], env: Mapping[str, str]) -> None:
        emulation, name = self._emulation, self._cluster.nodes[node].name
        environment = {
            **os.environ,
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3",
            **agent_environment(
                self._cluster,
                node,
                interface=emulation.interfaces[node],
                ranks_here=len(emulation.nodes) * self._cluster.slots,
                links=emulation.links,
            ),
            **env,
            "COMMOPT_JOB": self._mark,
        }
        command = [*emulation.prefix(name), *words]
        output, inherited = _output_pair()
        try:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=inherited.fileno(),
                stderr=inherited.fileno(),
                start_new_session=True,  # a terminal's Ctrl-C reaches the launcher only, which ends them in order
                preexec_fn=end_with_parent(signal.SIGTERM),  # torchrun ends its ranks on SIGTERM
            )
        except OSError as error:
            output.close()
            raise LaunchError(f"{command[0]}: cannot be started: {(error.strerror or str(error)).lower()}") from None
        finally:
            inherited.close()
        agent = _Agent(node, name, process, output)
        self._agents.append(agent)
        self._selector.register(agent.output, selectors.EVENT_READ, agent)

    def watch(self) -> None:
        """Return when every agent has ended, or a while after the first that ended badly."""
        next_tick_s, failed_s = 0.0, None
        while True:
            running = [agent for agent in self._agents if agent.ended_s is None]
            if not running:
                return
            now_s = self._elapsed()
            if failed_s is None and any(agent.process.returncode for agent in self._agents):
                failed_s = now_s
            if failed_s is not None and now_s - failed_s > _OTHERS_S:
                return
            self._read(timeout_s=0.05 if len(running) < len(self._agents) else max(0.0, next_tick_s - now_s))
            for agent in running:
                if agent.process.poll() is not None:
                    agent.ended_s = self._elapsed()
            if self._elapsed() >= next_tick_s:
                next_tick_s = self._elapsed() + _TICK_S
                self._tick()

    def end(self) -> None:
        """End what still runs: SIGTERM, then SIGKILL after a grace; also ranks that lost their agent."""
        deadline_s = self._elapsed() + _GRACE_S
        for agent in self._agents:
            if agent.process.poll() is None:
                agent.process.terminate()
        while self._elapsed() < deadline_s and any(agent.process.poll() is None for agent in self._agents):
            self._read(timeout_s=0.05)
        for agent in self._agents:
            if agent.process.poll() is None:
                agent.process.kill()
            agent.process.wait()
        for pid in _marked(self._mark):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        self._wall_s = self._elapsed()
        after = self._emulation.tx_bytes()
        self._sent = {name: count - self._sent_before.get(name, 0) for name, count in after.items()}
        drained_s = self._elapsed() + 0.5  # a pipe that something else holds open never ends
        while any(agent.is_open for agent in self._agents) and self._elapsed() < drained_s:
            self._read(timeout_s=0.05)
        for agent in self._agents:
            self._show(agent, agent.reader.close(self._elapsed()))
            agent.output.close()
        self._logs.close()
        self._selector.close()

    def result(self) -> JobResult:
        failure = self._failure()
        if failure is None:
            for agent in self._agents:
                self._show(agent, agent.reader.release(float("inf")))
        elif self._log_dir is None:
            self._log_dir = Path(tempfile.mkdtemp(prefix="commopt-"))
            self._logs.keep(self._log_dir)
        return JobResult(
            ok=failure is None,
            wall_s=self._wall_s,
            tx_bytes=self._sent,
            mode=self._emulation.mode,
            log_dir=self._log_dir,
            failure=failure,
            notices=() if self._logs.problem is None else (self._logs.problem,),
        )

    def _elapsed(self) -> float:
        return time.monotonic() - self._started_s

    def _tick(self) -> None:
        for agent in self._agents:
            self._show(agent, agent.reader.release(self._elapsed()))
        if self._on_tick is not None:
            now = self._emulation.tx_bytes()
            sent = {name: count - self._sent_before.get(name, 0) for name, count in now.items()}
            self._on_tick(Tick(self._elapsed(), sent))

    def _read(self, *, timeout_s: float) -> None:
        if not self._selector.get_map():
            time.sleep(timeout_s)
            return
        for key, _ in self._selector.select(timeout_s):
            agent: _Agent = key.data
            try:
                data, writer = _read_from(agent.output)
            except BlockingIOError:
                continue
            if not data:
                self._selector.unregister(agent.output)
                agent.is_open = False
                continue
            self._logs.write(agent.name, data, writer)
            self._show(agent, agent.reader.feed(data, self._elapsed(), writer))

    def _show(self, agent: _Agent, lines: Sequence[str]) -> None:
        if self._on_line is not None:
            for line in lines:
                self._on_line(agent.name, line)

    def _failure(self) -> Failure | None:
        """The failure that the others follow from."""
        found = [(agent, ended) for agent in self._agents for ended in agent.reader.ended]
        if found:
            agent, ended = min(found, key=lambda pair: self._order(*pair))
            rank = agent.reader.rank_of_local.get(ended.local_rank, agent.node * self._cluster.slots + ended.local_rank)
            traceback = self._traceback(agent, rank)
            message = traceback.text if traceback is not None and ended.exit_code > 0 else ""
            return _described(agent.name, rank, ended.exit_code, message)
        bad = [agent for agent in self._agents if agent.process.returncode and agent.ended_s is not None]
        if not bad:
            return None
        agent = min(bad, key=lambda one: one.ended_s or 0.0)
        blocks = agent.reader.tracebacks
        message = blocks[-1].text if blocks else self._logs.tail(agent.name, 10)
        return _described(agent.name, None, agent.process.returncode, message)

    def _order(self, agent: _Agent, ended: Ended) -> tuple[int, float]:
        """Killed from outside first, then errors of its own, then what follows from another's end; then by time."""
        if ended.exit_code < 0:
            kind = {-signal.SIGABRT: 2, -signal.SIGTERM: 4}.get(ended.exit_code, 0)
        else:
            rank = agent.node * self._cluster.slots + ended.local_rank
            traceback = self._traceback(agent, rank)
            kind = 3 if traceback is not None and _FOLLOWS.search(traceback.text) else 1
        return kind, ended.at_s

    def _traceback(self, agent: _Agent, rank: int) -> Traceback | None:
        own = [block for block in agent.reader.tracebacks if block.rank in (rank, None)]
        return own[-1] if own else None


def _output_pair() -> tuple[socket.socket, socket.socket]:
    """Where to read what a node prints, and what its processes inherit.

    A pipe would glue lines together: `python -u` writes a line and its line feed separately, and ranks of one node
    print at the same time. A socket names the process that wrote.
    """
    output, inherited = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    output.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    output.setblocking(False)
    return output, inherited


def _read_from(output: socket.socket) -> tuple[bytes, int]:
    """What one process wrote, and which."""
    data, ancillary, _, _ = output.recvmsg(1 << 16, socket.CMSG_SPACE(_CREDENTIALS.size))
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            return data, _CREDENTIALS.unpack(content[: _CREDENTIALS.size])[0]
    return data, 0


def _described(node: str, rank: int | None, code: int, message: str) -> Failure:
    if code >= 0:
        return Failure(node, rank, code, None, message)
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return Failure(node, rank, None, name, message)


def _marked(mark: str) -> Iterator[int]:
    """Processes whose environment has this job's mark, whoever their parent is now."""
    if os.path.realpath("/proc/self") != f"/proc/{os.getpid()}":  # the /proc of another PID namespace
        return
    wanted = f"COMMOPT_JOB={mark}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    yield int(entry.name)
