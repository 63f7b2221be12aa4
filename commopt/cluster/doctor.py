"""Checks what this machine can do by trying it, and says how to fix each problem."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from commopt.cluster.machine import tool_path, tried, usable_cores
from commopt.errors import EmulationError

_LIMIT_S = 30.0  # for one attempt
State = Literal["ok", "limited", "missing"]


@dataclass(frozen=True)
class Check:
    """One row of the table: what was checked, its state, what was found, and what to do about it ("" if nothing)."""

    check: str
    state: State
    found: str
    cure: str = ""


def examine() -> Iterator[Check]:
    """Check everything that commopt can use on this machine. Starts a few short processes; changes nothing."""
    machine = f"{platform.system()} {platform.release()}, {platform.machine()}, {usable_cores()} cores"
    yield Check("machine", "ok", machine)
    yield Check("python", "ok", platform.python_version())
    for some in (_emulation, _torch, _kernels):  # the slow ones last
        yield from some()


def levels(gpus: int) -> str:
    """The machines of the job that this process is part of, and the ranks of each."""
    ranks, here = (
        int(text) if (text := os.environ.get(key, "")).isdigit() else 0 for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    )
    if here and ranks > here and ranks % here == 0:
        how = "exchange between machines" if here > 1 else "exchange with each other"
        return f"this job has {ranks // here} machines of {here} ranks, which {how}"
    return "not inside a job" + (f"; a rank for each GPU makes a machine of {gpus} ranks" if gpus > 1 else "")


def as_json(checks: list[Check]) -> str:
    """The table as a JSON list of objects with check, state, found and cure."""
    return json.dumps([asdict(check) for check in checks], indent=2) + "\n"


def _torch() -> Iterator[Check]:
    if importlib.util.find_spec("torch") is None:
        yield Check("torch", "missing", "not installed", "pip install torch")
        return
    import torch
    import torch.distributed as dist

    yield Check("torch", "ok", torch.__version__)
    if not dist.is_available():
        yield Check("torch.distributed", "missing", "not built in", "install another build of torch")
        return
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        names = sorted({torch.cuda.get_device_name(index) for index in range(gpus)})
        yield Check("GPUs", "ok", f"{gpus}: {', '.join(names)}")
    else:
        yield Check("GPUs", "limited", "none", "ranks run on the CPU")
    yield Check("levels", "ok", levels(gpus))
    yield Check("gloo", "ok", "built in") if dist.is_gloo_available() else Check("gloo", "missing", "not built in")
    nccl = dist.is_nccl_available()
    if nccl and gpus:
        yield Check("nccl", "ok", ".".join(map(str, torch.cuda.nccl.version())))  # type: ignore[no-untyped-call]
    else:
        why = "built in, but no GPU" if nccl else "not built in"
        yield Check("nccl", "limited", why, "backend: gloo" if not gpus else "install a CUDA build of torch")
    yield _mpi()


def _mpi() -> Check:
    if importlib.util.find_spec("mpi4py") is None:
        return Check("mpi", "limited", "no mpi4py", "pip install mpi4py mpich, for mpirun only")
    words = [sys.executable, "-c", "from mpi4py import MPI; print(MPI.Get_library_version().splitlines()[0])"]
    done = tried(words, timeout_s=_LIMIT_S)
    if done.returncode != 0:
        return Check("mpi", "limited", "mpi4py, but no MPI library", "pip install mpich")
    if not ((Path(sys.executable).parent / "mpiexec").exists() or shutil.which("mpiexec")):
        return Check("mpi", "limited", "mpi4py, but no mpiexec", "pip install mpich")
    return Check("mpi", "ok", f"mpi4py {_version('mpi4py')}, {' '.join(done.stdout.split())}")


def _emulation() -> Iterator[Check]:
    from commopt.cluster.emulate import TOOLS, unshare_words

    for tool, package in TOOLS.items():
        place = shutil.which(tool, path=tool_path())
        yield Check(tool, "ok", place) if place else Check(tool, "missing", "not found", f"install {package}")
    try:
        words = unshare_words()
    except EmulationError as error:
        reason, _, cure = str(error).partition("; ")
        yield Check("namespaces", "missing", reason, cure or "links are paced instead (emulate: paced)")
        return
    yield Check("namespaces", "ok", "as root" if os.geteuid() == 0 else "as an ordinary user")
    if "--mount-proc" not in words:
        yield Check("/proc", "limited", "masked, as in a container", "works anyway; ps shows outer processes")
    yield named_namespace(words)
    shaped = [*words, "tc", "qdisc", "add", "dev", "lo", "root"]
    tbf = [*shaped, "tbf", "rate", "1mbit", "burst", "16kb", "limit", "32kb"]
    yield _attempt("tbf", "missing", tbf, "modprobe sch_tbf; until then links are paced")
    cure = "modprobe sch_netem (linux-modules-extra); until then delay is paced, jitter and loss left out"
    yield _attempt("netem", "limited", [*shaped, "netem", "delay", "1ms"], cure)


def named_namespace(words: list[str]) -> Check:
    script = f"mount -t tmpfs none {os.path.realpath('/var/run')} && ip netns add try && ip netns exec try true"
    cure = "links are paced instead (emulate: paced)"
    return _attempt("ip netns exec", "missing", [*words, "sh", "-c", script], cure)


def _attempt(check: str, otherwise: State, words: list[str], cure: str) -> Check:
    """The row of what a command shows; its state if that fails."""
    done = tried(words, timeout_s=_LIMIT_S)
    if done.returncode == 0:
        return Check(check, "ok", "works")
    answer = done.stderr.strip().lower().removeprefix("error: ").rstrip(".")
    return Check(check, otherwise, answer[:80] or "could not be tried", cure)


def _kernels() -> Iterator[Check]:
    numba = _package("numba", "pip install numba; until then kernels are plain torch")
    yield numba
    if numba.state == "ok":
        from commopt.kernels.cpu import signs

        kernel: Any = signs._sum_abs
        if place := kernel.stats.cache_path:
            yield Check("numba cache", "ok", place)
        else:
            yield Check("numba cache", "limited", "no folder can be written", "set NUMBA_CACHE_DIR to a folder")
    yield _package("triton", "pip install triton, for GPUs only")


def _package(name: str, cure: str) -> Check:
    if importlib.util.find_spec(name) is None:
        return Check(name, "limited", "not installed", cure)
    return Check(name, "ok", _version(name))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "installed"
