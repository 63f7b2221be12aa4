"""Runs one job: an agent per node, with sorted output and counted bytes; if one fails, ends all but independent nodes."""

import math
import os
import selectors
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path

from commopt.cluster.commands import agent_environment, agent_words, peers_json, secret_of
from commopt.cluster.emulate import Emulation, end_with_parent, signals_wait
from commopt.cluster.failure import AgentEnd, Failure, first_failure
from commopt.cluster.injection import Injection
from commopt.cluster.machine import free_ports
from commopt.cluster.output import Lines, Logs, output_pair, read_from
from commopt.cluster.processes import kill_all, marked
from commopt.errors import LaunchError

_TICK_S = 0.2
_FAULTS_S = 0.05  # how often due faults are looked for: small models do many steps between two ticks
_STOPPED_S, _STOPPED_END_S = 10.0, 300.0  # until a node with a stopped process is reported, and ended
_OTHERS_S = 1.5  # for the other nodes to report what they saw, before they are ended
_CAUSE_S = 15.0  # the same, if all known failures follow from another one, which a busy machine reports later
_LAST_WORDS_S = 0.4  # for the output of an agent that ended to be read
_GRACE_S = 4.0  # between SIGTERM and SIGKILL


@dataclass(frozen=True)
class JobResult:
    """How a job ended."""

    wall_s: float
    tx_bytes: Mapping[str, int]  # empty if nodes share an interface
    log_dir: Path | None  # holds `NODE.log`; None if none was asked for and the job ended well
    failure: Failure | None = None
    notices: tuple[str, ...] = ()  # about faults that were not reached, and logs that could not be written


@dataclass(kw_only=True)
class _Agent(AgentEnd):
    """One start of a node's agent. is_killed: a fault ended it. is_told: its failure has been reported."""

    process: subprocess.Popen[bytes]
    output: socket.socket
    lines: Lines = field(default_factory=Lines)
    is_killed: bool = False
    stopped_s: float | None = None  # since when one of its processes has been stopped
    is_told_stopped: bool = False
    is_told: bool = False


@dataclass
class Job:
    """Runs `argv` (a program and its arguments) on every rank; `run` returns when all of it has ended.

    Without a log_dir the last MiB of each node is kept in memory, and written to a temporary folder if the job fails.
    """

    argv: Sequence[str]
    _: KW_ONLY
    emulation: Emulation
    env: Mapping[str, str] = field(default_factory=dict)  # added to the ranks' environment
    log_dir: Path | None = None  # made if needed; gets `NODE.log` with all that was printed
    on_tick: Callable[[float], object] | None = None  # about five times a second; gets the seconds since the start
    on_line: Callable[[str, str], None] | None = None  # gets a label ("node2") and a line of a rank's output
    on_note: Callable[[str], None] | None = None  # gets what a user should know now
    agent: Callable[[int], Sequence[str]] | None = None  # the command to run on a node instead of torchrun
    independent: bool = False  # every node is a torchrun job of its own, and finds the others by `COMMOPT_PEERS`
    label: str = ""  # distinguishes successive independent jobs on real machines
    faults: Injection | None = None  # a node that they kill has failed only if the others need it

    def __post_init__(self) -> None:
        if self.emulation.shares_loopback:  # the file's port is for nodes with addresses of their own
            self.emulation = replace(self.emulation, port=free_ports(1)[0])
        self.mark = uuid.uuid4().hex
        self._cluster = self.emulation.cluster
        mark = None if self.emulation.is_elsewhere else self.mark
        self._peers = peers_json(self.emulation, self.label, mark) if self.independent else None
        self._secret = secret_of(self.emulation) if self.independent else {}
        self._planned: Failure | None = None
        self._agents: list[_Agent] = []
        self._next_look_s = _STOPPED_S / 2
        self._selector = selectors.DefaultSelector()
        self._logs = Logs(self.log_dir, [self._cluster.names[node] for node in self.emulation.nodes])
        self._sent_before = self.emulation.tx_bytes()
        self._started_s = time.monotonic()

    def run(self) -> JobResult:
        """Start every node, and return when all have ended. On Ctrl-C, SIGTERM or an error in a callback, end them and raise it again.

        Raises LaunchError if an agent cannot be started.
        """
        try:
            for node in self.emulation.nodes:
                self.start(node)
            self.watch()
        finally:
            self.end()
        if self.faults is not None:
            self.faults.restore()
        notices = [] if self._logs.problem is None else [self._logs.problem]
        if self.faults is not None and self._planned is None:
            notices += self.faults.unreached
        survived = [agent for agent in self._agents if not agent.is_killed and self._survived(agent)]
        notices += [f"{self._failure([agent])}; the others finished without it" for agent in survived]
        failed = [agent for agent in self._agents if not agent.is_killed and agent not in survived]
        failure = self._planned or self._failure(failed)
        if failure is None:
            for agent in self._agents:
                self._show(agent, agent.reader.release(float("inf")))
        elif self.log_dir is None:
            self.log_dir = Path(tempfile.mkdtemp(prefix="commopt-"))
            self._logs.keep(self.log_dir)
        return JobResult(self._wall_s, self._sent, self.log_dir, failure, tuple(notices))

    def start(self, node: int, *, returns: bool = False) -> None:
        """Start a node's agent. returns: in a job that is under way, as its ranks are told, so that they don't start a new one."""
        emulation, name = self.emulation, self._cluster.names[node]
        ranks_here = len(emulation.nodes) * self._cluster.slots
        environment = {
            **os.environ,
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3",
            **agent_environment(emulation, node, ranks_here=ranks_here, peers=self._peers),
            **self.env,
            **self._secret,
            "COMMOPT_JOB": self.mark,
            **({"COMMOPT_RETURNS": "1"} if returns else {}),
        }
        argv = self.agent(node) if self.agent else agent_words(emulation, node, self.argv, independent=self.independent)
        command = [*emulation.prefix(name), *argv]
        output, inherited = output_pair()
        try:
            with signals_wait():
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=inherited.fileno(),
                    stderr=inherited.fileno(),
                    start_new_session=True,  # a terminal's Ctrl-C reaches the launcher only, which ends them in order
                    preexec_fn=end_with_parent(signal.SIGTERM),  # torchrun ends its ranks on SIGTERM
                )
                self._agents.append(_Agent(name, node * self._cluster.slots, process=process, output=output))
                self._selector.register(output, selectors.EVENT_READ, self._agents[-1])
        except OSError as error:
            output.close()
            raise LaunchError(f"{command[0]}: cannot be started: {(error.strerror or str(error)).lower()}") from None
        finally:
            inherited.close()

    def kill(self, name: str, at_step: int) -> None:
        """End every process of a node at once, for a fault."""
        agent = next(agent for agent in reversed(self._agents) if agent.node == name)
        kill_all(self.mark, name)
        if agent.at_s is None and agent.process.poll() in (None, -signal.SIGKILL):
            self._end_node(agent, Failure(name, None, -signal.SIGKILL, killed_at_step=at_step))

    def watch(self) -> None:
        """Return when every agent has ended, or if they need each other, a while after the first one failed."""
        next_tick_s, next_faults_s, failed_s = 0.0, 0.0 if self.faults else math.inf, None
        while self._planned is None and (running := [agent for agent in self._agents if agent.at_s is None]):
            now_s = self._elapsed()
            if failed_s is None and not self.independent and any(a.process.returncode for a in self._agents):
                failed_s = now_s
            if failed_s is not None and now_s - failed_s > _OTHERS_S:
                known = self._failure(self._agents)
                if known is None or not known.follows or now_s - failed_s > _CAUSE_S:
                    return
            until_s = min(next_tick_s, next_faults_s)
            self._read(timeout_s=0.05 if len(running) < len(self._agents) else max(0.0, until_s - now_s))
            for agent in running:
                if agent.process.poll() is not None:
                    agent.at_s = self._elapsed()
            if self.faults is not None and self._elapsed() >= next_faults_s:
                next_faults_s = self._elapsed() + _FAULTS_S
                self.faults.tick(self)
            if self._elapsed() >= next_tick_s:
                next_tick_s = self._elapsed() + _TICK_S
                for agent in self._agents:
                    self._show(agent, agent.reader.release(self._elapsed()))
                if self.independent:
                    self._tell_bad_ends()
                self._end_stopped()
                if self.on_tick is not None:
                    self.on_tick(self._elapsed())

    def end(self) -> None:
        """End what still runs, also ranks that lost their agent: SIGTERM, and SIGKILL after a grace period."""
        if self.faults is not None:
            self.faults.release()
        deadline_s = self._elapsed() + _GRACE_S
        for agent in self._agents:
            agent.process.terminate()
        while self._elapsed() < deadline_s and any(agent.process.poll() is None for agent in self._agents):
            self._read(timeout_s=0.05)
        for agent in self._agents:
            agent.process.kill()
            agent.process.wait()
        kill_all(self.mark)
        self._wall_s = self._elapsed()
        sent = self.emulation.tx_bytes()
        self._sent = {name: count - self._sent_before.get(name, 0) for name, count in sent.items()}
        drained_s = self._elapsed() + 0.5  # a socket that another process holds open never ends
        while self._selector.get_map() and self._elapsed() < drained_s:
            self._read(timeout_s=0.05)
        for agent in self._agents:
            for line, writer in agent.lines.last():
                self._take(agent, line, writer)
            agent.output.close()
        self._logs.close()
        self._selector.close()

    def _elapsed(self) -> float:
        return time.monotonic() - self._started_s

    def _read(self, *, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s):
            agent: _Agent = key.data
            try:
                data, writer = read_from(agent.output)
            except BlockingIOError:
                continue
            if data:
                self._take(agent, agent.lines.whole(data, writer), writer)
            else:
                self._selector.unregister(agent.output)

    def _take(self, agent: _Agent, lines: bytes, writer: int) -> None:
        self._logs.write(agent.node, lines)
        self._show(agent, agent.reader.feed(lines, self._elapsed(), writer))

    def _show(self, agent: _Agent, lines: Sequence[str]) -> None:
        if self.on_line is not None:
            for line in lines:
                self.on_line(agent.node, line)

    def _tell_bad_ends(self) -> None:
        """Report nodes that have failed while others go on."""
        if all(agent.at_s is not None for agent in self._agents):  # then the result has the failure, in full
            return
        for agent in self._agents:
            is_ended = agent.at_s is not None and self._elapsed() - agent.at_s > _LAST_WORDS_S
            if is_ended and not agent.is_told and not agent.is_killed:
                agent.is_told = True
                failure = self._failure([agent])
                if failure is not None and self.on_note is not None:
                    self.on_note(f"{failure}; the other nodes go on")

    def _end_stopped(self) -> None:
        """Report nodes with a stopped process, for which the others would wait for ever, and end them after a while."""
        now_s = self._elapsed()
        if now_s < self._next_look_s or (self.faults is not None and self.faults.is_stopping):
            return
        self._next_look_s = now_s + _STOPPED_S / 2
        for agent in [agent for agent in self._agents if agent.at_s is None]:
            found = list(marked(self.mark, agent.node, "T"))
            agent.stopped_s = (now_s if agent.stopped_s is None else agent.stopped_s) if found else None
            for_s = 0.0 if agent.stopped_s is None else now_s - agent.stopped_s
            if for_s >= _STOPPED_END_S:
                kill_all(self.mark, agent.node)
                self._end_node(agent, Failure(agent.node, None, -signal.SIGSTOP))
            elif for_s >= _STOPPED_S and not agent.is_told_stopped and self.on_note is not None:
                agent.is_told_stopped = True
                which = f"{agent.node}: process {', '.join(map(str, found[:8]))} is stopped, as by SIGSTOP"
                self.on_note(f"{which}; resume it with SIGCONT, or the node is ended after {_STOPPED_END_S:.0f} s")

    def _end_node(self, agent: _Agent, failure: Failure) -> None:
        """End an agent at once, and with this failure the whole job if its nodes need each other."""
        agent.process.kill()
        agent.process.wait()
        agent.at_s, agent.is_killed = self._elapsed(), True
        if not self.independent:
            self._planned = failure

    def _survived(self, agent: _Agent) -> bool:
        """Whether an independent node was killed and others finished without it."""
        failure = self._failure([agent]) if self.independent else None
        is_killed = failure is not None and failure.exit_code == -signal.SIGKILL
        return is_killed and any(other.process.returncode == 0 for other in self._agents)

    def _failure(self, agents: Sequence[_Agent]) -> Failure | None:
        for agent in agents:
            agent.exit_code, agent.last_lines = agent.process.returncode, self._logs.tail(agent.node, 10)
        return first_failure(agents, is_one_job=not self.independent)
