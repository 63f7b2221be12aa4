"""`commopt launch` with real torchrun agents and Gloo."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launchers import PROGRAMS, all_have_ended, finish, processes, read_until, start, wait_until

from commopt.cluster.machine import free_ports

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for ranks in /proc")
RANKS = str(PROGRAMS / "ranks.py")


def launch(cluster: Path, *words: str) -> tuple[list[str], Path]:
    scratch = cluster.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    return ["-m", "commopt", "launch", str(cluster), *words], scratch


def rank_processes(mark: str) -> dict[int, int]:
    """Process by rank, of the ranks of one job."""
    found = {}
    for pid in processes(mark):
        with contextlib.suppress(OSError):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found.update({int(item[5:]): pid for item in variables if item.startswith(b"RANK=")})
    return found


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_every_rank_takes_part(rendezvous: str, write: Callable[[str], Path], mark: str, tmp_path: Path) -> None:
    text = f"nodes: 2\nslots: 2\nlinks: {{rate: 200mbit}}\nrendezvous: {{backend: {rendezvous}}}"
    trains_s = "3" if rendezvous == "static" else "0.1"
    words, scratch = launch(write(text), "--log-dir", str(tmp_path / "logs"), "--", RANKS, mark, trains_s)
    code, output, errors = finish(start(words, scratch))
    assert code == 0, errors
    assert (sorted(os.listdir(tmp_path / "logs")), os.listdir(scratch)) == (["node0.log", "node1.log"], [])
    ranks = sorted(re.findall(r"^\[node(\d)\] rank (\d) of 4: 4$", output, re.MULTILINE))
    assert len(ranks) == 4
    if rendezvous == "static":
        assert ranks == [("0", "0"), ("0", "1"), ("1", "2"), ("1", "3")]
        assert re.search(r"^commopt: running, \d+ s$", errors, re.MULTILINE), "a program without output is silent"
    assert len(output.splitlines()) == 4, output
    said = errors.splitlines()
    notice = next(k for k, line in enumerate(said) if not re.fullmatch(r"commopt: building the network, \d+ s", line))
    assert said[notice].startswith("commopt: links are ")
    assert "building the network" not in "".join(said[notice:])
    last = said[-1]
    assert re.fullmatch(r"commopt: done in [\d.]+ s(; sent node0 [\d.]+ [kM]?B, node1 [\d.]+ [kM]?B)?", last)


def test_a_killed_rank_ends_the_job_and_is_named(write: Callable[[str], Path], mark: str) -> None:
    words, scratch = launch(write("nodes: 3\nlinks: {rate: 100mbit}"), "--", RANKS, mark, "300")
    process = start(words, scratch)
    read_until(process.stdout, "rank 2 of 3: 3\n")  # most likely in the middle of an exchange; all say the same if not
    os.kill(rank_processes(mark)[2], signal.SIGKILL)
    started = time.monotonic()
    code, output, errors = finish(process)
    assert time.monotonic() - started < 20
    assert code == 1
    last = errors.splitlines()[-1]
    assert last.startswith("commopt: rank 2 (node2) was killed by SIGKILL; all output is in ")
    assert not re.search("Traceback|closed by peer|ChildFailedError", output + errors)
    logs = Path(last.rpartition(" ")[2])
    assert sorted(path.name for path in logs.iterdir()) == ["node0.log", "node1.log", "node2.log"]
    assert "SIGKILL" in (logs / "node2.log").read_text()
    all_have_ended(mark)
    assert os.listdir(scratch) == [logs.name]


def test_each_real_machine_starts_its_own_node(write: Callable[[str], Path], mark: str) -> None:
    (port,) = free_ports(1)
    hosts = "[{name: a, host: 127.0.0.1}, {name: b, host: 127.0.0.2}]"
    cluster = write(f"nodes: {hosts}\nrendezvous: {{port: {port}}}")
    started = [start(*launch(cluster, "--node", name, "--", RANKS, mark, "0.1")) for name in "ab"]
    for rank, process in enumerate(started):
        code, output, errors = finish(process)
        assert (code, output) == (0, f"rank {rank} of 2: 2\n"), errors


ALONE = """
import json, os, pathlib, sys, time
peers, here = json.loads(os.environ["COMMOPT_PEERS"]), pathlib.Path(__file__).parent
mine = int(os.environ["COMMOPT_NODE_RANK"]) * int(os.environ["LOCAL_WORLD_SIZE"]) + int(os.environ["LOCAL_RANK"])
print(mine, os.environ["RANK"], os.environ["WORLD_SIZE"], len(peers["members"]), flush=True)
here.joinpath(f"up{mine}").touch()
if mine == 2:
    while not here.joinpath("up3").exists():  # or its agent would end it before it is there
        time.sleep(0.05)
    raise ValueError("the disk is gone")
if mine != 3:
    while not here.joinpath("go").exists():
        time.sleep(0.05)
    print("done", flush=True)
"""


@pytest.mark.parametrize("mode", ["netns", "none"])
def test_an_independent_node_that_fails_leaves_the_others_alone(
    mode: str, write: Callable[[str], Path], mark: str, request: pytest.FixtureRequest
) -> None:
    if mode == "netns":
        request.getfixturevalue("namespaces")
    cluster = write("nodes: 2\nslots: 2")
    program = cluster.with_name("alone.py")
    program.write_text(ALONE)
    words, _ = launch(cluster, "--independent", "--emulate", mode, "--", str(program), mark)
    process = start(words, cluster.parent / "scratch")
    wait_until(lambda: all(cluster.with_name(f"up{rank}").exists() for rank in range(4)), "four ranks")
    told = read_until(process.stderr, "the other nodes go on\n")
    cluster.with_name("go").touch()
    code, output, errors = finish(process)
    errors = told + errors
    assert code == 1
    said = sorted(line for line in output.splitlines() if line[8].isdecimal())
    assert said == [f"[node{rank // 2}] {rank} {rank % 2} 2 4" for rank in range(4)]
    assert output.count("[node0] done") == 2
    failure = "rank 2 (node1) failed: ValueError: the disk is gone"
    assert f"commopt: {failure}; the other nodes go on" in errors.splitlines()
    assert errors.splitlines()[-1].startswith(f"commopt: {failure}; all output is in ")
    assert errors.count("Traceback (most recent call last)") == 1
    assert 'raise ValueError("the disk is gone")\n' in errors
