"""Finds the failure that ended a job, among those that followed from it."""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from commopt.cluster.output import Ended, Reader, Traceback, exception_in

_FOLLOWS = re.compile(
    r"closed by peer|reset by peer|Connection refused|Broken pipe|remote process exited|ncclRemoteError|ncclSystemError"
    r"|[Tt]imed out|Socket Timeout|DistNetworkError|DistStoreError|GroupError"
)


@dataclass(frozen=True)
class Failure:
    """What ended a job: the first rank that failed, or an agent (rank None)."""

    node: str
    rank: int | None
    exit_code: int  # minus the signal's number if one ended it
    message: str = ""  # that rank's last traceback
    killed_at_step: int | None = None  # when a fault of the run killed this node, and the job with it
    is_told: bool = False  # the user has seen the message

    @property
    def follows(self) -> bool:
        """Whether its message is that of a rank whose peer has ended."""
        return bool(_FOLLOWS.search(self.message))

    def __str__(self) -> str:
        if self.killed_at_step is not None:
            return f"{self.node} was killed at step {self.killed_at_step}, as the run's faults say"
        who = f"rank {self.rank} ({self.node})" if self.rank is not None else f"the torchrun agent of {self.node}"
        if self.rank is None and self.exit_code == -signal.SIGSTOP:
            return f"{self.node} stood still with a stopped process, and was ended"
        exception = exception_in(self.message.splitlines())
        if self.exit_code < 0 and not (self.rank is not None and exception):
            known = {one.value: one.name for one in signal.Signals}
            return f"{who} was killed by {known.get(-self.exit_code, f'signal {-self.exit_code}')}"
        return f"{who} failed: {exception}" if exception else f"{who} ended with exit code {self.exit_code}"


@dataclass
class AgentEnd:
    """How one node's agent ended."""

    node: str
    first_rank: int  # the lowest of its node
    exit_code: int | None = None
    at_s: float | None = None  # None while it runs, or if the launcher ended it
    reader: Reader = field(default_factory=Reader)  # of what it and its ranks print
    last_lines: str = ""  # of its log; they say what happened if there is no traceback


def first_failure(ends: Sequence[AgentEnd], *, is_one_job: bool) -> Failure | None:
    """The failure that caused the others; the earliest one if every node is a job of its own."""
    # an agent that ended well has restarted the ranks that died on its node
    found = [(end, ended) for end in ends if end.exit_code != 0 for ended in end.reader.ended]
    if found:
        end, ended = min(found, key=lambda pair: _order(*pair) if is_one_job else (0, pair[1].at_s))
        rank = end.first_rank + ended.local_rank
        if is_one_job:
            rank = end.reader.rank_of_local.get(ended.local_rank, rank)
        failure = Failure(end.node, rank, ended.exit_code)
        said_why = ended.exit_code > 0 or ended.exit_code == -signal.SIGABRT  # torch may abort after an exception
        traceback = _traceback(end, rank if is_one_job else ended.local_rank) if said_why else None
    else:
        bad = [(end.at_s, k) for k, end in enumerate(ends) if end.exit_code and end.at_s is not None]
        if not bad:
            return None
        end = ends[min(bad)[1]]
        failure = Failure(end.node, None, end.exit_code or 0, end.last_lines)
        traceback = end.reader.tracebacks[-1] if end.reader.tracebacks else None
    return failure if traceback is None else replace(failure, message=traceback.text, is_told=traceback.is_shown)


def _order(end: AgentEnd, ended: Ended) -> tuple[int, float]:
    """Sort key: killed from outside, then the rank's own errors, then consequences of another rank's end; then by time."""
    traceback = _traceback(end, end.first_rank + ended.local_rank)
    if ended.exit_code == -signal.SIGABRT and traceback is None:
        kind = 2
    elif ended.exit_code < 0 and ended.exit_code != -signal.SIGABRT:
        kind = 4 if ended.exit_code == -signal.SIGTERM else 0
    else:
        kind = 3 if traceback is not None and _FOLLOWS.search(traceback.text) else 1
    return kind, ended.at_s


def _traceback(end: AgentEnd, rank: int) -> Traceback | None:
    return next((block for block in reversed(end.reader.tracebacks) if block.rank in (rank, None)), None)
