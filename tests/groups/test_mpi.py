"""What MPIGroup promises beyond the contract of every transport."""

from __future__ import annotations

import io
import os
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mpi_pool
import pretend
import pytest
import torch
from exchanges import every_operation, expected
from mpi_pool import MPIPool
from rig import run_plain
from transports import on_mpi

from commopt.errors import ConfigError, GroupError
from commopt.groups import SimWorld

pytestmark = [
    pytest.mark.timeout(400),  # mpiexec's ranks import torch each, on a machine that may be busy
    pytest.mark.skipif(mpi_pool.why_not() != "", reason=mpi_pool.why_not() or "none"),
]
ROOT = Path(__file__).parent.parent.parent
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64]


@pytest.fixture
def mpi() -> MPIPool:
    return mpi_pool.shared()


def sums(group: Any) -> list[torch.Tensor]:
    """Sums that show rounding, order and layout: 1,001 elements of each dtype, none, one, and a transposed matrix."""
    generator = torch.Generator().manual_seed(group.rank)
    wide = torch.randn(1001, generator=generator) * 10 ** torch.randint(-6, 2, (1001,), generator=generator)
    every = [(1000 * wide).to(dtype) for dtype in DTYPES]
    every += [torch.empty(0), torch.tensor(0.1 + group.rank), wide[:1000].view(25, 40).T]
    for x in every:
        group.all_reduce(x)
    assert not every[-1].is_contiguous()
    return every


def in_a_thread(group: Any) -> list[torch.Tensor]:
    """As those of DDP are."""
    with ThreadPoolExecutor(1) as lane:
        return lane.submit(sums, group).result()


@pytest.mark.parametrize("n", [2, 3, 5])
def test_sums_in_a_thread_are_bit_for_bit_those_of_simulated_ranks(mpi: MPIPool, n: int) -> None:
    simulated = SimWorld[Any](n).run(sums)[0]
    for rank in mpi.run(n, on_mpi, in_a_thread):
        for ours, theirs in zip(rank, simulated, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", ["onebit_adam l2", "dgc", "distributed_lion"])
def test_training_on_mpi_ends_bit_for_bit_as_over_simulated_ranks(mpi: MPIPool, case: str) -> None:
    simulated = SimWorld[torch.Tensor](3).run(lambda group: run_plain(group, case, 8))
    assert all(torch.equal(rank, simulated[0]) for rank in mpi.run(3, on_mpi, run_plain, case, 8))


def on_device(group: Any, device: torch.device) -> dict[str, Any]:
    with pretend.working_on(device):
        return every_operation(group, device)


@pytest.mark.parametrize("device", pretend.DEVICES)
def test_what_is_on_another_device_travels_through_the_host_and_back(mpi: MPIPool, device: torch.device) -> None:
    assert mpi.run(2, on_mpi, on_device, device) == [expected(rank, 2) for rank in range(2)]


def mpirun(n: int, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(mpi_pool.mpiexec()), "-n", str(n), "python", *words]
    environment = {key: x for key, x in mpi_pool.environment().items() if key not in ("RANK", "COMMOPT_PEERS")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def fail(folder: str) -> None:
    """One of two ranks: they disagree on a length, then rank 1 stays away, and in the end it raises.

    Each rank's errors go to its own file, since mpiexec may merge two ranks' lines into one.
    """
    from mpi4py import MPI

    from commopt.groups import MPIGroup

    uneven, lonely, last = MPIGroup(), MPIGroup(timeout_s=0.2), MPIGroup()
    rank = uneven.rank

    def note(call: Callable[[], Any]) -> None:
        try:
            call()
        except GroupError as error:
            with Path(folder, f"rank {rank}").open("a", encoding="utf-8") as heard:
                heard.write(" ".join(str(error).split()) + "\n")

    note(lambda: uneven.broadcast(torch.zeros(10 + 10 * rank), 1))
    if rank == 0:
        note(lonely.barrier)
        note(lambda: lonely.tell("is anybody there?"))
    MPI.COMM_WORLD.Barrier()
    if rank == 1:
        raise ValueError("enough")
    last.barrier()  # waits half an hour


def test_an_exchange_that_fails_says_why_and_ends_its_group_and_an_exception_ends_the_job(tmp_path: Path) -> None:
    done = mpirun(2, "-c", "import sys, test_mpi; test_mpi.fail(sys.argv[1])", str(tmp_path))
    assert done.returncode != 0
    assert "ValueError: enough" in done.stderr
    uneven, lonely, again = Path(tmp_path, "rank 0").read_text(encoding="utf-8").splitlines()
    assert "broadcast failed on rank 0 of 2: " in uneven
    assert "all_reduce failed on rank 0 of 2: not every rank has joined and ended it within 0.2 s" in lonely
    assert "the group is of no use since all_reduce failed" in again


def test_the_last_words_of_a_rank_are_read_before_it_ends_the_job() -> None:
    """mpiexec drops what it has not read by then, on a busy machine the traceback."""
    from commopt.groups.mpi import _wait_until_read

    here, there = os.pipe()
    with os.fdopen(there, "w") as stream, os.fdopen(here, "rb", buffering=0) as reader, ThreadPoolExecutor(1) as lane:
        stream.write("ValueError: enough\n")
        stream.flush()
        waiting = lane.submit(_wait_until_read, stream, 60.0)
        time.sleep(0.1)
        assert not waiting.done()
        reader.read(100)
        waiting.result(30)
        stream.write("nobody reads this")
        stream.flush()
        _wait_until_read(stream, 0.01)  # returns


def test_output_that_goes_to_no_pipe_is_not_waited_for(tmp_path: Path) -> None:
    from commopt.groups.mpi import _wait_until_read

    with (tmp_path / "log").open("w") as file:
        file.write("to a file")
        file.flush()
        for stream in (file, io.StringIO("to nowhere")):
            begin_s = time.monotonic()
            _wait_until_read(stream, 60.0)
            assert time.monotonic() - begin_s < 30


def test_the_training_program_knows_that_mpirun_started_it() -> None:
    sizes = {"steps": 3, "layers": 1, "heads": 1, "width": 8, "context": 8, "validation-batches": 1, "batch": 1}
    corpus = str(ROOT / "commopt")
    options = ["--method", "ef_sign", "--optimizer", '{"name": "sgd", "lr": 0.1, "momentum": 0.0}', "--corpus", corpus]
    words = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    done = mpirun(2, str(ROOT / "launch" / "train.py"), *words, *options)
    assert done.returncode == 0, done.stderr
    assert "2 ranks" in done.stdout.splitlines()[0]
    assert sum("validation after step 3" in line for line in done.stdout.splitlines()) == 1


def test_a_timeout_that_is_none_is_refused() -> None:
    from commopt.groups import MPIGroup

    with pytest.raises(ConfigError, match=r"timeout_s: 0\.0 is out of range; write a number of seconds above 0"):
        MPIGroup(timeout_s=0.0)


def test_machines_are_ranks_that_share_memory(mpi: MPIPool) -> None:
    *told, fifth = mpi.run(5, levels)
    assert told == [("MPIGroup", 1, "World", 2, [4.0] * 3, rank) for rank in range(4)]
    assert fifth is None


def levels(communicator: Any) -> tuple[str, int, str, int, list[float], int] | None:
    """What is found on one machine, and on two of two ranks each, as the communicator is made to say."""
    from commopt.groups import MPIGroup

    four = communicator.Split(communicator.rank // 4)
    if four.size == 1:
        return None
    group = MPIGroup(four)
    one = group.by_machine()
    whole, group.comm = group.comm, SimpleNamespace()
    group.comm.Split_type = lambda kind: whole.Split(group.rank // 2)
    group.comm.Split = whole.Split
    group.tell = lambda text: [text] * 4  # type: ignore[method-assign]
    two = group.by_machine()
    x = torch.ones(3)
    two.all_reduce(x)
    return type(one).__name__, one.per_machine, type(two).__name__, two.per_machine, x.tolist(), two.rank
