"""Processes are found by their mark, stopped, and let go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launchers import ROOT, wait_until

from commopt.cluster.emulate import unshare_words
from commopt.cluster.processes import Throttle, kill_all, marked

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")


def started(mark: str, node: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-c", "import time; time.sleep(100)", mark]
    return subprocess.Popen(words, env={**os.environ, "COMMOPT_JOB": mark, "COMMOPT_NODE": node})


def state(process: subprocess.Popen[bytes]) -> str:
    """R running, S asleep, T stopped."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.fixture
def nodes(mark: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    both = [started(mark, "node0"), started(mark, "node1")]
    wait_until(lambda: len(list(marked(mark))) == 2, "the environment of two processes")
    yield both
    for process in both:
        process.kill()
        process.wait()


@pytest.fixture
def throttle(mark: str) -> Iterator[Throttle]:
    made = Throttle(mark)
    yield made
    made.close()


def test_only_the_node_that_is_named_is_ended(nodes: list[subprocess.Popen[bytes]], mark: str) -> None:
    assert list(marked(mark, "node1")) == [nodes[1].pid]
    assert sorted(marked(mark)) == sorted(process.pid for process in nodes)
    kill_all(mark, "node1")
    assert nodes[1].wait() == -signal.SIGKILL
    assert nodes[0].poll() is None
    assert list(marked(mark)) == [nodes[0].pid]


def test_only_the_node_that_is_named_stands_still_and_so_do_its_new_processes(
    nodes: list[subprocess.Popen[bytes]], throttle: Throttle, mark: str
) -> None:
    throttle.set({"node1": 0.0})
    wait_until(lambda: state(nodes[1]) == "T", "a stopped process")
    assert state(nodes[0]) != "T"
    throttle.set({"node0": 0.0})
    wait_until(lambda: state(nodes[0]) == "T" != state(nodes[1]), "the other one, stopped instead")
    nodes.append(started(mark, "node0"))
    wait_until(lambda: state(nodes[-1]) == "T", "the new process, stopped too")
    throttle.close()
    assert "T" not in [state(process) for process in nodes]


def test_everything_goes_on_where_the_program_that_stopped_it_was_killed(
    nodes: list[subprocess.Popen[bytes]], throttle: Throttle
) -> None:
    throttle.set({"node1": 0.0})
    wait_until(lambda: state(nodes[1]) == "T", "a stopped process")
    assert throttle._program is not None
    throttle._program.kill()
    throttle._program.wait()
    throttle.set({})
    throttle.close()
    assert state(nodes[1]) != "T"


@pytest.mark.usefixtures("namespaces")
def test_processes_are_found_in_the_proc_of_another_namespace(mark: str) -> None:
    """A container may refuse to mount a new /proc, and show process numbers of outside."""
    code = (
        "import os, subprocess, time\n"
        "from commopt.cluster.processes import kill_all, marked\n"
        f"one = subprocess.Popen(['sleep', '100'], env={{**os.environ, 'COMMOPT_JOB': '{mark}', 'COMMOPT_NODE': 'a'}})\n"
        "time.sleep(0.2)\n"
        f"print(os.path.realpath('/proc/self') != f'/proc/{{os.getpid()}}', list(marked('{mark}')) == [one.pid])\n"
        f"kill_all('{mark}', 'a')\n"
        "print(one.wait())\n"
    )
    words = [word for word in unshare_words() if word != "--mount-proc"]
    done = subprocess.run(
        [*words, sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, cwd=ROOT
    )
    assert done.stdout == "True True\n-9\n"


def test_ctrl_c_while_a_process_is_forked_is_not_lost() -> None:
    code = (
        "import os, signal, subprocess\n"
        "from commopt.cluster.emulate import end_on_signals, signals_wait\n"
        "end_on_signals()\n"
        "os.register_at_fork(before=lambda: os.kill(os.getpid(), signal.SIGINT))  # Python drops what a hook raises\n"
        "try:\n"
        "    with signals_wait():\n"
        "        subprocess.Popen(['true'], preexec_fn=lambda: None).wait()\n"
        "    print('lost')\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, cwd=ROOT
    )
    assert (done.stdout, done.stderr) == ("interrupted\n", "")
