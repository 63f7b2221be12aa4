"""Fixtures of all tests."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import warm
from launchers import end_all, processes
from pool import Pool

from commopt.cluster.doctor import named_namespace
from commopt.cluster.emulate import unshare_words
from commopt.errors import EmulationError
from commopt.run.prepare import prepare_all

WAITING = "tests/cluster/"  # mostly waits for what it started; one after another, beside all others
SINGLE = "tests/test_testing.py"  # long, and shares nothing between its tests
PAGES = "tests/docs/test_pages.py"  # the same
SHARING = (  # files of which each kind shares its ranks: what mpiexec starts, or what has a framework imported
    ("tests/groups/test_mpi.py", "tests/groups/test_contract.py"),
    ("tests/frameworks/test_deepspeed",),
    ("tests/frameworks/test_fsdp", "tests/frameworks/test_machine_replicas"),
    ("tests/frameworks/test_accelerate.py", "tests/frameworks/test_transformers.py"),
)
PATIENCE_S = 400  # for tests of many processes, which may have to share the machine

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: its kernels then run on the CPU
torch.set_num_threads(1)
hypothesis.settings.register_profile("commopt", deadline=None, max_examples=25)
hypothesis.settings.load_profile("commopt")


def pytest_configure(config: pytest.Config) -> None:
    """Start the process that programs are forked from, once for all workers."""
    config.addinivalue_line("markers", "ranks(kind, n): the test runs on n ranks with a framework, by `kind`_ranks")
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="commopt-tests-")
        config.add_cleanup(folder.cleanup)
        config.add_cleanup(warm.start(Path(folder.name)))
        os.environ["COMMOPT_TESTS"] = folder.name
        config.option.tx = [f"{spec}//python={folder.name}/bin/python" for spec in getattr(config.option, "tx", [])]
    else:
        sys.executable = config.workerinput["python"]


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Workers are such programs too; what they call by `sys.executable` is not."""
    node.workerinput["python"] = sys.executable


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One worker for each of up to four cores, and one that mostly waits."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 4) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With --dist loadfile: one worker runs the emulated machines, from the start, and the others run files."""
    from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith(WAITING):
                return WAITING
            for files in SHARING:
                if nodeid.startswith(files):
                    return files[0]
            return nodeid if nodeid.startswith((SINGLE, PAGES)) else str(super()._split_scope(nodeid))

    if config.getvalue("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False  # else those with most tests come first, which are quick ones
    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Wait for tests that measure: they come first, in one worker, and the others leave the machine to them."""
    if is_alone(item.session.items[0]) and not is_alone(item) and hasattr(item.config, "workerinput"):
        deadline = time.monotonic() + 100
        while not _measured().exists() and time.monotonic() < deadline:
            time.sleep(0.1)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if is_alone(item) and not (nextitem and is_alone(nextitem)):
        _measured().touch()


def is_alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None


def _measured() -> Path:
    return Path(os.environ["COMMOPT_TESTS"], "measured")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest."""
    begin = (WAITING, PAGES)
    items.sort(key=lambda item: (not is_alone(item), *(not item.nodeid.startswith(files) for files in begin)))
    for item in items:
        is_long = item.nodeid.startswith(WAITING) or item.get_closest_marker("ranks") is not None
        if is_long and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(PATIENCE_S))


def pytest_collection_finish() -> None:
    """Make triton's interpreter quicker, if any test has imported it."""
    if "triton.runtime.interpreter" in sys.modules:
        import triton_interpreter  # noqa: F401


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test on ranks, if it is marked so; it fails if it fails on any."""
    marker = pyfuncitem.get_closest_marker("ranks")
    if marker is None:
        return None
    kind, n = marker.args
    ranks: Pool = pyfuncitem._request.getfixturevalue(f"{kind}_ranks")
    arguments = [pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames]
    ranks.run(n, pyfuncitem.obj, *arguments, timeout_s=PATIENCE_S - 100)  # imports take long on a busy machine
    return True


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Five ranks with Gloo, started at the first use."""
    prepare_all(lambda _: None)
    ranks = Pool()
    yield ranks
    ranks.close()


def _warm_ranks(kind: str) -> Any:
    """A fixture: ranks with a framework, started at the first use."""

    @pytest.fixture(scope="session", name=f"{kind.lower()}_ranks")
    def started() -> Iterator[Pool]:
        import framework_ranks  # beside the tests of the frameworks: importable when one of them is collected

        ranks = getattr(framework_ranks, f"{kind}Ranks")()
        yield ranks
        ranks.close()

    return started


fsdp_ranks, deepspeed_ranks, huggingface_ranks, lightning_ranks = map(
    _warm_ranks, ("FSDP", "DeepSpeed", "HuggingFace", "Lightning")
)


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Skip, with the reason, if network namespaces are not allowed."""
    try:
        named = named_namespace(unshare_words())
    except EmulationError as error:
        pytest.skip(f"no network namespaces on this machine: {error}")
    if named.state != "ok":
        pytest.skip(f"no named network namespaces on this machine: {named.found}")


@pytest.fixture
def mark() -> Iterator[str]:
    """A word for the command line of a test's processes; those left at the end are killed."""
    word = f"mark-{uuid.uuid4().hex}"
    yield word
    for pid in processes(word):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    end_all()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Write a YAML file, and return its path."""

    def write_yaml(text: str) -> Path:
        path = tmp_path / "cluster.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_yaml
