"""What this machine can do: every answer comes from trying it, and every problem comes with what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from commopt.cluster.machine import tried
from commopt.errors import EmulationError

_LIMIT_S = 30.0  # for one attempt


class State(str, Enum):
    """What a check found."""

    OK = "ok"
    LIMITED = "limited"
    MISSING = "missing"


@dataclass(frozen=True)
class Check:
    """One line of the table: what was looked at, how it is, and what to do about it ("" if nothing)."""

    check: str
    state: State
    found: str
    cure: str = ""


# Run by the Python of this process inside namespaces of its own; prints one line for each queueing discipline.
_TRY_QDISCS = """
import sys
from pyroute2 import IPRoute, NetlinkError
options = {"tbf": dict(rate=1000000, burst=16384, limit=32768), "htb": dict(default=0x10), "netem": dict(delay=1000)}
with IPRoute() as route:
    for kind, option in options.items():
        try:
            route.tc("add", kind, 1, handle="1:", **option)
            route.tc("del", index=1, root=True)
            print(kind, "ok")
        except NetlinkError as error:
            print(kind, error.args[1] if len(error.args) > 1 else error)
"""


def examine() -> list[Check]:
    """Look at everything that commopt can use on this machine. Starts a few short processes; changes nothing."""
    return [*_python(), *_torch(), *_emulation(), *_kernels()]


def as_json(checks: list[Check]) -> str:
    """The table as a JSON list of objects with check, state, found and cure."""
    return json.dumps([asdict(check) for check in checks], indent=2) + "\n"


def _python() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Check("machine", State.OK, f"{platform.system()} {platform.release()}, {platform.machine()}, {cores} cores")
    yield Check("python", State.OK, platform.python_version())


def _torch() -> Iterator[Check]:
    if importlib.util.find_spec("torch") is None:
        yield Check("torch", State.MISSING, "not installed", "pip install torch")
        return
    import torch
    import torch.distributed as dist

    yield Check("torch", State.OK, torch.__version__)
    if not dist.is_available():
        yield Check("torch.distributed", State.MISSING, "not built in", "install another build of torch")
        return
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        names = sorted({torch.cuda.get_device_name(index) for index in range(gpus)})
        yield Check("GPUs", State.OK, f"{gpus}: {', '.join(names)}")
    else:
        yield Check("GPUs", State.LIMITED, "none", "ranks run on the CPU")
    gloo = dist.is_gloo_available()
    yield Check("gloo", State.OK if gloo else State.MISSING, "built in" if gloo else "not built in")
    nccl = dist.is_nccl_available()
    if nccl and gpus:
        yield Check("nccl", State.OK, ".".join(map(str, torch.cuda.nccl.version())))  # type: ignore[no-untyped-call]
    else:
        why = "built in, but no GPU" if nccl else "not built in"
        yield Check("nccl", State.LIMITED, why, "backend: gloo" if not gpus else "install a CUDA build of torch")
    yield _mpi()


def _mpi() -> Check:
    if importlib.util.find_spec("mpi4py") is None:
        return Check("mpi", State.LIMITED, "no mpi4py", "pip install 'commopt[mpi]' mpich, for mpirun only")
    words = [sys.executable, "-c", "from mpi4py import MPI; print(MPI.Get_library_version().splitlines()[0])"]
    done = tried(words, timeout_s=_LIMIT_S)
    if done.returncode != 0:
        return Check("mpi", State.LIMITED, "mpi4py, but no MPI library", "pip install mpich")
    if not ((Path(sys.executable).parent / "mpiexec").exists() or shutil.which("mpiexec")):
        return Check("mpi", State.LIMITED, "mpi4py, but no mpiexec", "pip install mpich")
    return Check("mpi", State.OK, f"mpi4py {_version('mpi4py')}, {' '.join(done.stdout.split())}")


def _emulation() -> Iterator[Check]:
    from commopt.cluster.emulate import unshare_words

    for tool, package in (("unshare", "util-linux"), ("ip", "iproute2")):
        place = shutil.which(tool)
        yield Check(tool, State.OK, place) if place else Check(tool, State.MISSING, "not found", f"install {package}")
    try:
        words = unshare_words()
    except EmulationError as error:
        reason, _, cure = str(error).partition("; ")
        yield Check("namespaces", State.MISSING, reason, cure or "links are paced instead (emulate: paced)")
        return
    yield Check("namespaces", State.OK, "as root" if os.geteuid() == 0 else "as an ordinary user")
    if "--mount-proc" not in words:
        yield Check("/proc", State.LIMITED, "masked, as in a container", "works without; ps shows outer processes")
    yield _named_namespace(words)
    if importlib.util.find_spec("pyroute2") is None:
        yield Check("pyroute2", State.MISSING, "not installed", "pip install pyroute2")
        return
    done = tried([*words, sys.executable, "-c", _TRY_QDISCS], timeout_s=_LIMIT_S)
    answers = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    cures = {
        "tbf": "modprobe sch_tbf; until then links are paced",
        "htb": "not needed: tbf does the shaping",
        "netem": "modprobe sch_netem (linux-modules-extra); until then delay is paced, jitter and loss left out",
    }
    for kind, cure in cures.items():
        answer = answers.get(kind, done.stderr.strip().rsplit("\n", 1)[-1] or "could not be tried")
        works = answer == "ok"
        state = State.OK if works else State.MISSING if kind == "tbf" else State.LIMITED
        yield Check(kind, state, "works" if works else answer.lower(), "" if works else cure)


def _named_namespace(words: list[str]) -> Check:
    place = os.path.realpath("/var/run")
    script = f"mount -t tmpfs none {place} && ip netns add try && ip netns exec try true"
    done = tried([*words, "sh", "-c", script], timeout_s=_LIMIT_S)
    if done.returncode == 0:
        return Check("ip netns exec", State.OK, "works")
    return Check("ip netns exec", State.MISSING, done.stderr.strip()[:80], "links are paced instead (emulate: paced)")


def _kernels() -> Iterator[Check]:
    numba = _package("numba", "pip install numba; until then kernels are plain torch")
    yield numba
    if numba.state is State.OK:
        place = _numba_cache()
        if place is not None:
            yield Check("numba cache", State.OK, str(place))
        else:
            yield Check("numba cache", State.LIMITED, "no folder can be written", "set NUMBA_CACHE_DIR to a folder")
    yield _package("triton", "pip install triton, for GPUs only")


def _package(name: str, cure: str) -> Check:
    if importlib.util.find_spec(name) is None:
        return Check(name, State.LIMITED, "not installed", cure)
    return Check(name, State.OK, _version(name))


def _numba_cache() -> Path | None:
    """Where numba can keep compiled kernels: the folder that was set, beside the package, or the user's cache."""
    import commopt

    given = os.environ.get("NUMBA_CACHE_DIR")
    package = Path(commopt.__file__).parent / "kernels"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    for place in [Path(given)] if given else [package, home]:
        nearest = next((folder for folder in (place, *place.parents) if folder.is_dir()), None)
        if nearest is not None:
            try:
                with tempfile.TemporaryFile(dir=nearest):
                    return place
            except OSError:
                continue
    return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "installed"
