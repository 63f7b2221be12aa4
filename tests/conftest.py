"""Fixtures of all tests."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import warm
from pool import Pool

from commopt import kernels
from commopt.cluster.emulate import unshare_words
from commopt.errors import EmulationError

WAITING = "tests/cluster/"  # mostly waits for what it started; one after another, beside all others
WITH_TORCHRUN = tuple(
    f"{WAITING}test_{name}" for name in ("compare", "elastic", "launch", "outer")
)  # as long as the rest
SINGLE = "tests/test_testing.py"  # long, and shares nothing between its tests
PAGES = "tests/docs/test_pages.py"  # the same
OVER_MPI = ("tests/groups/test_mpi.py", "tests/groups/test_contract.py")  # share the ranks that mpiexec starts
PATIENCE_S = 400  # for tests of many processes, which may have to share the machine

torch.set_num_threads(1)
hypothesis.settings.register_profile("commopt", deadline=None, max_examples=60)
hypothesis.settings.load_profile("commopt")


def pytest_configure(config: pytest.Config) -> None:
    """Start what programs are forked from, once for all workers."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="commopt-tests-")
        process = warm.start(Path(folder.name))
        config.add_cleanup(folder.cleanup)
        config.add_cleanup(process.wait)
        config.add_cleanup(process.stdin.close)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One worker for each of up to four cores, and one that mostly waits."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 4) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With --dist loadfile: the emulated machines in two workers, from the start, and files in the others."""
    from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith(WAITING):
                return f"{WAITING} with torchrun" if nodeid.startswith(WITH_TORCHRUN) else WAITING
            if nodeid.startswith(OVER_MPI):
                return OVER_MPI[0]
            return nodeid if nodeid.startswith((SINGLE, PAGES)) else str(super()._split_scope(nodeid))

    if config.getvalue("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False  # else those with most tests come first, which are quick ones
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest."""
    items.sort(key=lambda item: (not item.nodeid.startswith(WAITING), not item.nodeid.startswith(PAGES)))
    for item in items:
        if item.nodeid.startswith(WAITING) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(PATIENCE_S))


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Five ranks with Gloo, started at the first use."""
    kernels.warm_up()
    ranks = Pool()
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def _namespaces() -> None:
    try:
        words = unshare_words()
    except EmulationError as error:
        pytest.skip(f"no network namespaces on this machine: {error}")
    place = os.path.realpath("/var/run")
    script = f"mount -t tmpfs none {place} && ip netns add try && ip netns exec try true"
    tried = subprocess.run([*words, "sh", "-c", script], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"no named network namespaces on this machine: {tried.stderr.strip()}")


@pytest.fixture
def namespaces(_namespaces: None) -> None:
    """Skip, with the reason, where network namespaces are not allowed."""


@pytest.fixture
def mark() -> Iterator[str]:
    """A word for the command line of a test's processes; those that are left at the end are ended."""
    from launchers import end_all, processes  # beside the cluster tests: importable when one of them is collected

    word = f"mark-{uuid.uuid4().hex}"
    yield word
    for pid in processes(word):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    end_all()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Write a YAML file of the given text, and return its path."""

    def write_yaml(text: str) -> Path:
        path = tmp_path / "cluster.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_yaml
