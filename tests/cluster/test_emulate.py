"""The emulated network does what its file says, and nothing of it is left behind."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from launchers import all_have_ended, drive, finish, member, printed, result

from commopt.cluster import run
from commopt.cluster.emulate import on_loopback
from commopt.cluster.network import address, burst_bytes, queue_bytes, segments_at_once
from commopt.cluster.run import Job, JobResult
from commopt.cluster.spec import ClusterSpec, Link
from commopt.errors import LaunchError
from commopt.plan.links import wire_bytes

Write = Callable[[str], Path]


def seconds(found: dict[str, Any], label: str) -> list[tuple[int, float]]:
    """What a sender printed: (bytes, seconds) pairs."""
    lines = map(str.split, printed(found, label))
    return [(int(nbytes), float(duration)) for nbytes, duration, _ in lines]


@pytest.mark.usefixtures("namespaces")
@pytest.mark.alone
def test_a_link_is_as_fast_as_the_file_says_and_no_faster_and_the_counters_see_what_crosses_it(
    write: Write, mark: str
) -> None:
    cluster, rate = write("nodes: 2\nlinks: {rate: 50mbit}"), 6.25e6
    headers = 66 / 1448  # of each segment, though the kernel cuts them late
    sizes = [200_000, 200_000, 200_000, 4_000_000]
    send = member(mark, "send", address(1), *sizes)
    found = result(drive(cluster, "netns", mark, [send, member(mark, "receive", 1)]))
    assert found["mode"] == "netns"
    *short, (long_bytes, long_s) = seconds(found, "node0")
    assert [nbytes for nbytes, _ in short] == sizes[:-1]
    for nbytes, duration_s in short:  # after 100 ms of idle
        assert duration_s >= (nbytes - burst_bytes(rate)) / rate
    assert long_bytes / rate <= long_s <= 1.1 * wire_bytes(long_bytes) / rate
    assert (1 + headers) * sum(sizes) < found["tx_bytes"]["node0"] < 1.02 * wire_bytes(sum(sizes))
    assert sum(found["tx_bytes"].values()) < 1.05 * wire_bytes(sum(sizes))


@pytest.mark.usefixtures("namespaces")
@pytest.mark.alone
def test_sites_share_one_pipe(write: Write, mark: str) -> None:
    """node0 and node1 send to the other site at once, then node0 to node1 alone."""
    cluster = write(
        "nodes: 4\nsites: {east: [node0, node1], west: [node2, node3]}\nlinks: {rate: 800mbit, between: {rate: 40mbit}}"
    )
    nbytes = 1_000_000
    send = [member(mark, "send", address(node + 2), nbytes) for node in (0, 1)]
    found = result(drive(cluster, "netns", mark, [*send, member(mark, "receive", 1), member(mark, "receive", 1)]))
    last_s = max(duration for label in ("node0", "node1") for _, duration in seconds(found, label))
    assert last_s <= 1.25 * wire_bytes(2 * nbytes) / 5e6
    took = [[float(word) for word in line.split()[1:]] for line in printed(found, "node0", "node1")]
    span_s = max(began + seconds for seconds, began in took) - min(began for _, began in took)
    assert span_s >= 0.9 * 2 * nbytes / 5e6  # one may begin when the other has sent a part
    inside = [member(mark, "send", address(1), nbytes), member(mark, "receive", 1), ["true"], ["true"]]
    [(_, duration_s)] = seconds(result(drive(cluster, "netns", mark, inside)), "node0")
    assert duration_s < 0.5 * nbytes / 5e6


@pytest.mark.usefixtures("namespaces")
def test_two_runs_at_once_do_not_meet(write: Write, mark: str) -> None:
    cluster = write("nodes: 2\nlinks: {rate: 100mbit, mtu: 1000}")
    commands = [member(mark, "send", address(1), "1000000"), member(mark, "receive", 1)]
    runs = [drive(cluster, "netns", mark, commands) for _ in range(2)]
    for found in map(result, runs):
        [(_, duration_s)] = seconds(found, "node0")
        assert duration_s >= 0.9 * 1_000_000 / 12.5e6


def job(*commands: Sequence[str] | str, **options: Any) -> JobResult:
    """The end of a job of this process, with a node for each command; a text is one of the shell. options: of `Job`."""
    words = [["sh", "-c", command] if isinstance(command, str) else command for command in commands]
    emulation = on_loopback(ClusterSpec.model_validate({"nodes": len(words)}))
    return Job([], emulation=emulation, agent=words.__getitem__, **options).run()


def test_a_node_that_ignores_sigterm_is_killed(mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_GRACE_S", 0.5)
    monkeypatch.setattr(run, "_OTHERS_S", 0.3)
    ended = job(f"trap '' TERM; sh -c 'sleep 300; : {mark}'", "sleep 0.5; exit 3")
    assert str(ended.failure) == "the torchrun agent of node1 ended with exit code 3"
    all_have_ended(mark)


def test_the_cause_is_named_where_its_agent_reports_after_that_of_a_rank_that_follows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As agents do on a busy machine, here in the words of torchrun."""
    monkeypatch.setattr(run, "_OTHERS_S", 0.3)
    report = "E1122 01:31:37.886000 57 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1) "
    report += "local_rank: 0 (pid: 60) of binary: python"

    def fails(rank: int, error: str) -> str:
        return f"printf '[rank{rank}]: %s\\n' 'Traceback (most recent call last):' '{error}'; echo '{report}'; exit 1"

    ended = job(
        fails(0, "RuntimeError: Connection closed by peer"), f"sleep 1; {fails(1, 'ValueError: the data is gone')}"
    )
    assert str(ended.failure) == "rank 1 (node1) failed: ValueError: the data is gone"


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_a_stopped_process_is_reported_and_its_node_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_STOPPED_S", 0.2)
    monkeypatch.setattr(run, "_STOPPED_END_S", 0.8)
    told: list[str] = []
    ended = job("kill -STOP $$", "sleep 100", on_note=told.append)
    assert str(ended.failure) == "node0 stood still with a stopped process, and was ended"
    assert re.fullmatch(
        r"node0: process \d+ is stopped, as by SIGSTOP; resume it with SIGCONT, or the node .*", told.pop()
    )
    assert not told
    assert ended.wall_s < 20


def test_independent_nodes_that_finish_without_one_that_was_killed_are_a_success() -> None:
    ended = job("kill -9 $$", "sleep 0.3", independent=True)
    killed = "the torchrun agent of node0 was killed by SIGKILL"
    assert (ended.failure, ended.notices) == (None, (f"{killed}; the others finished without it",))
    assert str(job("kill -9 $$", "exit 3", independent=True).failure) == killed
    failed = job("exit 3", "true", independent=True)
    assert str(failed.failure) == "the torchrun agent of node0 ended with exit code 3"


def test_a_rank_that_lost_its_agent_is_ended(mark: str) -> None:
    ended = job(f"sh -c 'sleep 300; : {mark}' & sleep 0.3; kill -9 $$")
    assert str(ended.failure) == "the torchrun agent of node0 was killed by SIGKILL"
    all_have_ended(mark)


def test_a_full_disk_does_not_stop_a_job(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this machine")
    lines: list[tuple[str, str]] = []
    (tmp_path / "node0.log").symlink_to("/dev/full")
    ended = job("echo hello", log_dir=tmp_path, on_line=lambda *line: lines.append(line))
    assert (ended.failure, lines) == (None, [("node0", "hello")])
    assert ended.notices == (f"{tmp_path}: the logs are incomplete: no space left on device",)


def test_lines_of_processes_that_print_at_once_stay_whole() -> None:
    """As `python -u` does, each line and its line feed are written separately."""
    writer = "import os\nfor k in range(300): os.write(1, b'%s %d' % (os.fsencode(NAME), k)); os.write(1, b'\\n')"
    program = f"import os\nNAME = 'ab'[os.fork() == 0]\n{writer}\nif NAME == 'a': os.wait()"
    lines: list[str] = []
    job([sys.executable, "-c", program], on_line=lambda _, line: lines.append(line))
    assert sorted(lines) == sorted(f"{name} {k}" for name in "ab" for k in range(300))


def test_a_program_that_cannot_be_started_is_named() -> None:
    with pytest.raises(LaunchError, match=r"^/nonexistent/program: cannot be started: no such file or directory$"):
        job("sleep 100", ["/nonexistent/program"])


def test_without_unshare_links_are_paced(write: Write, mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    found = result(drive(write("nodes: 2\nlinks: {rate: 8mbit, delay: 1ms}"), "auto", mark, [["/bin/true"]]))
    assert found["mode"] == "paced"
    assert json.loads(found["links"])["bytes_per_s"] == [1e6, 1e6]
    assert "no 'unshare' command; install util-linux" in found["notices"][0]
    assert "plain DDP does, is not delayed" in found["notices"][1]
    code, _, errors = finish(drive(write("nodes: 2"), "netns", mark, [["/bin/true"]]))
    assert code == 1
    assert "EmulationError" in errors
    assert "no 'unshare' command" in errors


@pytest.mark.parametrize(("rate", "burst"), [(1e3, 16_384), (6.25e6, 16_384), (125e6, 250_000)])
def test_the_burst_is_never_a_steps_payload(rate: float, burst: int) -> None:
    assert burst_bytes(rate) == burst
    assert burst_bytes(rate, 65_535) >= 65_535 + 14
    assert queue_bytes(rate) > burst


@pytest.mark.parametrize(
    ("link", "mtu", "segments"),
    [
        (Link(rate="200mbit"), 1500, 1),  # of 1,514 bytes, in 0.12 ms
        (Link(rate="1gbit"), 1500, 9),
        (Link(), 1500, 43),  # in the kernel's largest packet
        (Link(), 65_535, 1),
        (Link(rate="1gbit", loss="0.1%"), 1500, 1),
    ],
)
def test_a_packet_of_several_segments_is_short_and_not_lost_as_a_whole(link: Link, mtu: int, segments: int) -> None:
    assert segments_at_once(link, mtu) == segments
