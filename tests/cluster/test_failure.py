"""Which of several failures is named."""

from __future__ import annotations

import signal

import pytest

from commopt.cluster.failure import AgentEnd, first_failure
from commopt.cluster.output import Ended, Traceback


def end(node: int, code: int, at_s: float, *lines: str, rank: int | None = None) -> AgentEnd:
    """The end of a node with one rank, whose last traceback had these lines."""
    ended = AgentEnd(f"node{node}", node, 1, at_s + 0.1)
    ended.reader.ended = [Ended(at_s, 0, code)]
    if lines:
        ended.reader.tracebacks = [Traceback(at_s, node if rank is None else rank, list(lines))]
    return ended


def named(*ends: AgentEnd, is_one_job: bool = True) -> str:
    return str(first_failure(ends, is_one_job=is_one_job))


OWN, FOLLOWS = "ValueError: the data is gone", "RuntimeError: Connection closed by peer [10.77.0.2]"


@pytest.mark.parametrize("is_shown", [False, True])
@pytest.mark.parametrize(("line", "follows"), [(FOLLOWS, True), (OWN, False)])
def test_a_failure_knows_whether_its_cause_is_still_to_come_and_whether_its_traceback_was_shown(
    line: str, follows: bool, is_shown: bool
) -> None:
    failed = end(0, 1, 1.0, line)
    failed.reader.tracebacks[0].is_shown = is_shown
    failure = first_failure([failed], is_one_job=True)
    assert failure is not None
    assert (failure.message, failure.follows, failure.is_told) == (line, follows, is_shown)


@pytest.mark.parametrize(
    ("code", "lines", "text"),
    [
        (1, [OWN], f"failed: {OWN}"),  # comes before what follows from it
        (-signal.SIGABRT, [OWN], f"failed: {OWN}"),
        (-signal.SIGABRT, [], "was killed by SIGABRT"),
    ],
)
def test_the_cause_is_named_and_not_what_follows_from_it(code: int, lines: list[str], text: str) -> None:
    assert named(end(0, 1, 1.0, FOLLOWS), end(1, code, 1.2, *lines)) == f"rank 1 (node1) {text}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("RuntimeError: gone\n\nAt:\n  train.py(3): <module>", "RuntimeError: gone"),  # pybind11's
        ("RuntimeError: \n    the disk is full\n", "RuntimeError: the disk is full"),
        ("ValueError: one\nline more\n", "ValueError: one"),
        ("KeyboardInterrupt\n\n", "KeyboardInterrupt"),
    ],
)
def test_the_reason_is_what_follows_the_last_frame(words: str, said: str) -> None:
    head = 'Traceback (most recent call last):\n  File "train.py", line 3, in <module>\n    run()\n'
    chained = f"{head}KeyError: 1\n\nDuring handling of the above exception, another exception occurred:\n\n{head}"
    for before in (head, chained):
        assert named(end(0, 1, 1.0, *f"{before}{words}".splitlines())) == f"rank 0 (node0) failed: {said}"


def test_a_kill_from_outside_comes_first() -> None:
    ends = end(0, 1, 1.0, OWN), end(1, -signal.SIGABRT, 1.1), end(2, -signal.SIGKILL, 1.2)
    assert named(*ends) == "rank 2 (node2) was killed by SIGKILL"


def test_of_independent_nodes_the_earliest_is_named_with_its_own_traceback() -> None:
    """Their tracebacks carry the rank within the node."""
    ends = end(1, 1, 2.0, OWN, rank=0), end(2, -signal.SIGKILL, 3.0)
    assert named(*ends, is_one_job=False) == f"rank 1 (node1) failed: {OWN}"
    assert named(*ends) == "rank 2 (node2) was killed by SIGKILL"


def test_nobody_failed() -> None:
    by_the_launcher = AgentEnd("node0", 0, -15)
    for one in (AgentEnd("node0", 0, 0, 1.0), by_the_launcher):
        assert first_failure([one], is_one_job=True) is None
