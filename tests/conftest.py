"""Fixtures of all tests."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from pool import Pool

from commopt import kernels
from commopt.cluster.emulate import unshare_words
from commopt.errors import EmulationError

torch.set_num_threads(1)
hypothesis.settings.register_profile("commopt", deadline=None, max_examples=60)
hypothesis.settings.load_profile("commopt")


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
    from launchers import processes  # beside the cluster tests: importable when one of them is collected

    word = f"mark-{uuid.uuid4().hex}"
    yield word
    for pid in processes(word):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Write a YAML file of the given text, and return its path."""

    def write_yaml(text: str) -> Path:
        path = tmp_path / "cluster.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_yaml
