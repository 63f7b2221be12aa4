from __future__ import annotations

from pathlib import Path

import pytest

from commopt.cluster.output import Lines, Logs, Reader

ENDED = "E1122 01:31:37.886000 57 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: {code}) "
ENDED += "local_rank: {local} (pid: 60) of binary: /usr/bin/python\n"
REPORT = """Traceback (most recent call last):
  File "/x/torch/distributed/run.py", line 1032, in <module>
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
  rank      : 3 (local_rank: 1)
"""
TRACEBACK = """Traceback (most recent call last):
  File "train.py", line 3, in <module>
    raise ValueError("boom")
ValueError: boom
"""


def feed(reader: Reader, text: str, at_s: float = 0.0) -> list[str]:
    return reader.feed(text.encode(), at_s)


def test_lines_arrive_whole_whatever_the_reads_and_whoever_else_writes() -> None:
    lines = Lines()
    parts = [(b"step 1\nst", 1), (b"two", 2), (b"ep 2", 1), (b"\n", 2)]
    assert [lines.whole(data, writer) for data, writer in parts] == [b"step 1\n", b"", b"", b"two\n"]
    assert lines.last() == [(b"step 2\n", 1)]
    assert lines.whole(bytes(1 << 17), 1) == b"step 2" + bytes(1 << 17)  # not kept until memory is full


def test_torchruns_own_lines_are_left_out() -> None:
    reader = Reader()
    noise = "W1122 01:31:37.886000 57 site-packages/torch/distributed/run.py:792] ****\n"
    noise += "NOTE: Redirects are currently not supported\n"
    noise += "[W1122 01:51:41.53 socket.cpp:207] [c10d] The hostname of the client socket cannot be retrieved. err=-3\n"
    noise += "[W1122 01:59:00.66 TCPStore.cpp:138] [c10d] recvValueWithTimeout failed\n"
    noise += "Exception raised from recvBytes at x.hpp:787 (most recent call first):\nframe #0: c10::Error\n<omitting python frames>\n\n"
    assert feed(reader, noise + "step 1\n") == ["step 1"]


def test_a_failed_ranks_traceback_is_kept_and_the_agents_report_is_not_shown() -> None:
    reader = Reader()
    shown = feed(reader, "step 1\n" + TRACEBACK + ENDED.format(code=1, local=1) + REPORT)
    assert shown == ["step 1"]
    assert [(end.local_rank, end.exit_code) for end in reader.ended] == [(1, 1)]
    assert reader.rank_of_local == {1: 3}
    assert [block.text for block in reader.tracebacks] == [TRACEBACK.rstrip()]
    assert reader.release(1e9) == []


def test_tracebacks_of_two_ranks_are_told_apart() -> None:
    reader = Reader()
    both = [f"[rank{rank}]: {line}" for line in TRACEBACK.splitlines() for rank in (4, 5)]
    feed(reader, "\n".join(both) + "\n")
    assert {block.rank: block.text for block in reader.tracebacks} == dict.fromkeys((4, 5), TRACEBACK.rstrip())


def of_rank(rank: int, text: str) -> str:
    """As torch writes it, for exceptions that nothing caught."""
    return "".join(f"[rank{rank}]: {line}" if line.strip() else line for line in text.splitlines(keepends=True))


@pytest.mark.parametrize("rank", [None, 3])
def test_a_chained_traceback_is_one_with_its_empty_lines(rank: int | None) -> None:
    reader = Reader()
    chained = TRACEBACK + "\nDuring handling of the above exception, another exception occurred:\n\n" + TRACEBACK
    assert feed(reader, chained if rank is None else of_rank(rank, chained)) == []
    assert [(block.rank, block.text) for block in reader.tracebacks] == [(rank, chained.rstrip())]


def test_a_traceback_that_ended_nothing_is_shown_after_a_while() -> None:
    reader = Reader()
    assert feed(reader, TRACEBACK + "going on\n", at_s=1) == ["going on"]
    assert reader.release(2) == []
    assert reader.release(4) == TRACEBACK.splitlines()
    assert reader.release(5) == []
    assert reader.tracebacks == []


@pytest.mark.parametrize("text", [TRACEBACK, of_rank(0, TRACEBACK)], ids=["no process group", "torch's"])
def test_the_last_words_of_a_rank_that_takes_long_to_end_are_not_shown_as_those_of_one_that_goes_on(text: str) -> None:
    reader = Reader()
    assert feed(reader, text, at_s=1) == []
    assert reader.release(11) == []
    assert feed(reader, ENDED.format(code=1, local=0), at_s=12) == []
    assert reader.release(1e9) == []
    assert [(block.text, block.is_shown) for block in reader.tracebacks] == [(TRACEBACK.rstrip(), False)]


def test_a_traceback_after_which_nothing_happens_is_shown_whole_and_once_and_still_known_at_the_end() -> None:
    reader = Reader()
    *first, last = TRACEBACK.splitlines(keepends=True)
    assert feed(reader, "".join(first), at_s=1) == []
    assert reader.release(40) == "".join(first).splitlines()
    assert feed(reader, last, at_s=41) == [last.rstrip()]
    assert reader.release(80) == []
    feed(reader, ENDED.format(code=1, local=0), at_s=81)
    assert [(block.text, block.is_shown) for block in reader.tracebacks] == [(TRACEBACK.rstrip(), True)]


def test_logs_keep_the_last_of_a_long_output() -> None:
    logs = Logs(None, ["node0"])
    for number in range(300_000):
        logs.write("node0", f"line {number}\n".encode())
    assert logs.tail("node0", 2) == "line 299998\nline 299999"


def test_logs_are_a_file_of_each_node(tmp_path: Path) -> None:
    logs = Logs(tmp_path, ["node0", "node1"])
    logs.write("node0", b"one\n")
    logs.write("node0", b"two\n")
    logs.close()
    assert [(tmp_path / f"node{k}.log").read_text() for k in (0, 1)] == ["one\ntwo\n", ""]
    assert logs.tail("node0", 2) == "one\ntwo"
