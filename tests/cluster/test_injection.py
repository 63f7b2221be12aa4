"""Nodes that are killed, come back, hang, slow down or are cut off from each other, in jobs that go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launchers import all_have_ended, drive, finish, member, printed, result, wait_until

from commopt.cluster.emulate import preview
from commopt.cluster.faults import Fault
from commopt.cluster.injection import check_faults
from commopt.cluster.machine import Emulate
from commopt.cluster.network import address
from commopt.cluster.spec import ClusterSpec
from commopt.errors import ConfigError

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
Write = Callable[[str], Path]


def driven(cluster: Path, *args: Any, **options: Any) -> tuple[dict[str, Any], Path]:
    """What a launcher that ended well has printed, and the folder of its record."""
    return result(drive(cluster, *args, independent=True, **options)), cluster.parent / "record"


def recorded(record: Path, name: str = "faults") -> list[dict[str, Any]]:
    """The lines of a record; none where there is no file."""
    path = record / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps(record: Path, rank: int) -> list[float]:
    """When each step of a rank was recorded."""
    return [line["at_s"] for line in recorded(record, f"rank{rank}")]


def within(times: list[float], begin_s: float, end_s: float) -> list[float]:
    return [time_s for time_s in times if begin_s < time_s < end_s]


@pytest.mark.usefixtures("namespaces")
def test_a_killed_machine_falls_silent_and_comes_back_while_the_others_go_on(write: Write, mark: str) -> None:
    ask, plain = member(mark, "ask", 60, address(2)), member(mark, "steps", 60)
    faults = [{"at_step": 20, "kill": "node2"}, {"at_step": 40, "restart": "node2"}]
    cluster, commands = write("nodes: 3"), [ask, plain, member(mark, "listen", 60)]
    logs = cluster.with_name("log")
    found, record = driven(cluster, "netns", mark, commands, faults=faults, log_dir=str(logs))
    assert (found["ok"], found["failure"]) == (True, None)
    assert [len(steps(record, rank)) for rank in range(3)] == [60, 60, 60]
    first, second = printed(found, "node2")
    assert first == "from step 0"
    assert 0 < int(second.split()[-1]) <= 35
    assert (logs / "node2.log").read_text().splitlines() == [first, second]
    # a dying process closes its connections, a dying machine does not
    assert f"{address(2)} has hung up" not in printed(found, "node0")
    assert found["told"] == ["fault at step 20: node2 killed", "fault at step 40: node2 started again"]
    killed, ended, restarted = recorded(record)
    assert [(line["kind"], line["at_step"], line["phase"]) for line in (killed, ended, restarted)] == [
        ("kill", 20, "begin"),
        ("kill", 20, "end"),
        ("restart", 40, "begin"),
    ]
    assert {tuple(line["nodes"]) for line in (killed, ended, restarted)} == {("node2",)}
    assert not within(steps(record, 2), killed["epoch_s"] + 0.2, restarted["epoch_s"])
    assert found["tx_bytes"]["node2"] > 0


@pytest.mark.usefixtures("namespaces")
def test_a_cut_stalls_a_connection_that_goes_on_after_healing(write: Write, mark: str) -> None:
    listen = member(mark, "listen", 100)
    commands = [member(mark, "ask", 100, address(1), address(2)), listen, listen]
    faults = [{"at_step": 20, "cut": ["node1", "node0"], "for_s": 1.0}]
    found, record = driven(write("nodes: 3"), "netns", mark, commands, faults=faults)
    begin, end = recorded(record)
    assert (begin["kind"], begin["nodes"], begin["for_s"]) == ("cut", ["node1", "node0"], 1.0)
    assert (begin["phase"], end["phase"]) == ("begin", "end")
    times = json.loads(next(line for line in printed(found, "node0") if line.startswith("{")))
    cut = (begin["epoch_s"] + 0.3, end["epoch_s"])
    assert within(times[address(1)], 0, begin["epoch_s"])
    assert not within(times[address(1)], *cut)
    assert within(times[address(1)], end["epoch_s"], float("inf"))
    assert within(times[address(2)], *cut)
    assert found["told"][1] == "fault of step 20 is over: node1 and node0 reach each other again"


@pytest.mark.usefixtures("namespaces")
def test_a_restarted_machine_is_still_cut_off(write: Write, mark: str) -> None:
    dial = member(mark, "dial", 40, address(2))
    faults = [
        {"at_step": 5, "cut": ["here", "node2"]},
        {"at_step": 10, "kill": "node2"},
        {"at_step": 20, "restart": "node2"},
    ]
    cluster = write("nodes: 3\nsites: {here: [node0], there: [node1, node2]}")
    found, _ = driven(cluster, "netns", mark, [dial, dial, member(mark, "listen", 100)], faults=faults)
    assert [printed(found, name)[-1] for name in ("node0", "node1")] == ["no answer", "answered"]


@pytest.mark.usefixtures("namespaces")
def test_the_next_job_finds_a_whole_network(write: Write, mark: str) -> None:
    plain, receive = member(mark, "steps", 20), member(mark, "receive", 2)
    first, second = (member(mark, "send", address(1), nbytes) for nbytes in (1000, 2000))
    faults = [{"at_step": 3, "cut": ["node0", "node1"]}, {"at_step": 6, "kill": "node2"}]
    found, _ = driven(write("nodes: 3"), "netns", mark, [plain], faults=faults, then=[first, receive, second])
    assert found["ok"]
    assert [printed(found, name)[-1].split()[0] for name in ("node0", "node2")] == ["1000", "2000"]


@pytest.mark.alone
def test_a_slow_node_gets_its_share_of_the_time_and_so_do_its_new_processes(write: Write, mark: str) -> None:
    faults = [{"at_step": 2, "slow": "node1", "factor": 20}]
    found, record = driven(write("nodes: 2"), "none", mark, [member(mark, "spin", 10, 3)], faults=faults)
    free, slow = (int(printed(found, name)[-1]) for name in ("node0", "node1"))
    assert 0 < 3 * slow < free
    assert [line["phase"] for line in recorded(record)] == ["begin"]
    assert found["told"] == ["fault at step 2: node1 slowed 20x"]


def test_a_hung_node_stands_still_and_goes_on_and_a_fault_that_never_came_is_told(write: Write, mark: str) -> None:
    faults = [{"at_step": 10, "hang": "node1", "for_s": 2}, {"at_step": 500, "hang": "node1", "for_s": 2.5}]
    found, record = driven(write("nodes: 2"), "none", mark, [member(mark, "steps", 50)], faults=faults)
    assert found["ok"]
    assert found["notices"] == ["the fault at step 500 was not reached: node1 hung for 2.5 s"]
    begin, end = (line["epoch_s"] for line in recorded(record))
    assert not within(steps(record, 1), begin + 1, end)
    assert within(steps(record, 0), begin + 1, end)
    assert len(steps(record, 1)) == 50
    assert found["told"][1] == "fault of step 10 is over: node1 goes on"


def mounts() -> tuple[str, str]:
    """The network namespaces that have a name, and all that is mounted."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False)
    return listed.stdout, Path("/proc/mounts").read_text()


@pytest.mark.parametrize(
    ("mode", "number", "code"),
    [
        ("netns", signal.SIGINT, 130),
        ("none", signal.SIGTERM, 143),
        ("netns", signal.SIGKILL, -9),
        ("none", signal.SIGKILL, -9),
    ],
)
def test_a_launcher_that_ends_in_the_middle_of_a_fault_leaves_nothing(
    mode: str, number: signal.Signals, code: int, write: Write, mark: str, request: pytest.FixtureRequest
) -> None:
    if mode == "netns":
        request.getfixturevalue("namespaces")
    faults = [{"at_step": 2, "hang": "node1", "for_s": 100}, {"at_step": 3, "slow": "node0", "factor": 5}]
    before = mounts()
    cluster = write("nodes: 3")
    process = drive(cluster, mode, mark, [member(mark, "steps", 6000)], faults=faults, independent=True)
    record = cluster.with_name("record")
    wait_until(lambda: len(recorded(record)) == 2, "two faults")
    process.send_signal(number)
    started = time.monotonic()
    assert finish(process)[0] == code
    assert time.monotonic() - started < 10
    all_have_ended(mark)
    assert mounts() == before
    assert os.listdir(record.parent / "scratch") == []


def test_a_node_that_ends_badly_is_told_at_once_and_fails_the_job_when_the_others_are_done(
    write: Write, mark: str
) -> None:
    fails = ["sh", "-c", f"sleep 0.3; echo gone; exit 3 # {mark}"]
    faults, plain = [{"at_step": 10, "kill": "node2"}], member(mark, "steps", 60)
    found, record = driven(write("nodes: 3"), "none", mark, [plain, fails, plain], faults=faults)
    failure = "the torchrun agent of node1 failed: gone"
    assert (found["ok"], found["failure"]) == (False, failure)
    assert f"{failure}; the other nodes go on" in found["told"]
    assert len(steps(record, 0)) == 60
    assert len(steps(record, 2)) < 60


def test_a_cut_without_emulated_links_is_refused() -> None:
    faults = [{"at_step": 1, "hang": "node1", "for_s": 1}, {"at_step": 2, "cut": ["node0", "node1"]}]
    emulation = preview(ClusterSpec.model_validate({"nodes": 2}), Emulate.PACED)
    said = r"^run\.yaml: faults\.1\.cut: needs links that .* \(--emulate paced\); add --emul"
    with pytest.raises(ConfigError, match=said):
        check_faults([Fault.model_validate(fault) for fault in faults], emulation, "run.yaml")


def test_real_machines_get_no_faults() -> None:
    cluster = ClusterSpec.model_validate({"nodes": [{"name": "a", "host": "127.0.0.1"}, {"name": "b", "host": "::2"}]})
    faults = [Fault.model_validate({"at_step": 5, "kill": "b"})]
    with pytest.raises(ConfigError, match=r"r\.yaml: faults: real machines get none; add --emulate netns, or leave"):
        check_faults(faults, preview(cluster, node="a"), "r.yaml")
    check_faults([], preview(cluster, node="a"), "r.yaml")
