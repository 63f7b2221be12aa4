"""Programs that start without waiting for imports: a process that has imported torch forks, and the fork becomes the program.

In tests, `python`, `torchrun`, `commopt` and `accelerate` on the PATH are commands that pass their arguments, environment, folder
and open files to that process. The fork runs in their namespaces; each ends when the other does, with the same status.
A test that needs a real Python process uses `sys.executable`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import io
import json
import os
import pkgutil
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from warm_call import FORWARDED, NAMESPACES, namespaces

ROOM = 1 << 14  # bytes for a fork's command line, as ps shows it, and for its environment
FRAMEWORKS = {  # by a word in a program's text: what to import first
    "accelerate": ["accelerate"],
    "deepspeed": ["deepspeed"],
    "fsdp": ["torch.distributed.fsdp"],
    "huggingface": ["accelerate", "transformers.trainer"],
    "lightning": ["lightning.pytorch"],
    "sys.stdin.readline": ["torch.distributed.fsdp"],  # workers of xdist, which collect all tests
    "transformers": ["transformers.trainer", "transformers.models.gpt2.modeling_gpt2"],
}


def start(folder: Path) -> Callable[[], None]:
    """Start the process, which imports nothing before its first call, and put the commands on the PATH. Returns a function that ends it."""
    address, commands, real = str(folder / "warm"), folder / "bin", Path(sys.executable).parent
    commands.mkdir()
    for name in ("python", "torchrun", "commopt", "accelerate"):
        program = [] if name == "python" else [str(real / name)]
        lines = [
            f"#!{sys.executable} -IS",
            "import sys",
            f"sys.path.insert(0, {str(Path(__file__).parent)!r})",
            "from warm_call import call",
            f"call({address!r}, {str(commands / 'python')!r}, {program} + sys.argv[1:])",
        ]
        (commands / name).write_text("\n".join(lines) + "\n")
        (commands / name).chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        process = subprocess.Popen(
            [sys.executable, __file__, str(listener.fileno()), " " * ROOM],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ROOM": " " * ROOM},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
        )
    os.environ["PATH"] = os.pathsep.join([str(commands), str(real), os.environ.get("PATH", os.defpath)])
    os.environ["PYTHON_EXEC"] = str(commands / "python")  # by which torchrun starts its ranks

    def end() -> None:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()

    return end


class Server:
    """Forks for callers, reports how each fork ended, and kills forks whose callers are gone."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.callers: dict[int, socket.socket | None] = {}  # by the fork's pid; None once the caller is gone
        self.namespaces = namespaces()
        self.is_warm = False

    def serve(self) -> None:
        woken, waker = os.pipe()
        os.set_blocking(waker, False)
        signal.set_wakeup_fd(waker)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            waiting: list[Any] = [0, woken, self.listener, *filter(None, self.callers.values())]
            ready, *_ = select.select(waiting, [], [])
            if 0 in ready:  # the tests are over
                break
            if woken in ready:
                os.read(woken, 4096)
                self._reap()
            for pid, caller in list(self.callers.items()):
                if caller is not None and caller in ready:
                    self._forward(pid, caller)
            if self.listener in ready:
                self._answer(self.listener.accept()[0])
        for pid in self.callers:
            os.killpg(pid, signal.SIGKILL)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if caller := self.callers.pop(pid):
                    with caller, contextlib.suppress(OSError):
                        caller.sendall(status.to_bytes(8, "big"))

    def _forward(self, pid: int, caller: socket.socket) -> None:
        numbers = caller.recv(16)
        for number in numbers:
            os.kill(pid, number)
        if not numbers:
            with contextlib.suppress(ProcessLookupError):  # not a group's leader yet
                os.killpg(pid, signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)
            caller.close()
            self.callers[pid] = None

    def _answer(self, caller: socket.socket) -> None:
        try:
            length, files, *_ = socket.recv_fds(caller, 8, 250)
            with caller.makefile("rb") as stream:
                request = json.loads(stream.read(int.from_bytes(length, "big")))
        except (OSError, ValueError):
            caller.close()
            return
        self._warm_up(request["words"], Path(request["folder"]))
        pid = os.fork()
        if pid == 0:
            self._become(request, files, caller)
        self.callers[pid] = caller
        for file in files:
            os.close(file)

    def _warm_up(self, words: list[str], folder: Path) -> None:
        """Import what such a program imports first."""
        if not self.is_warm:
            self.is_warm = True
            import torch
            import torch._dynamo
            import torch.distributed.run

            import commopt

            for found in pkgutil.walk_packages(commopt.__path__, "commopt."):
                if not found.name.startswith(("commopt.frameworks.", "commopt.groups.mpi")):  # no fork of MPI lives
                    with contextlib.suppress(ImportError):
                        importlib.import_module(found.name)
            importlib.import_module("commopt.frameworks.ddp")
            importlib.import_module("commopt.run.prepare").prepare_all(lambda _: None)
            rendezvous: Any = importlib.import_module("torch.distributed.elastic.rendezvous.dynamic_rendezvous")
            # for its log: else it looks through the sources of all modules, dozens of times
            rendezvous.get_method_name = lambda depth=2: sys._getframe(depth).f_code.co_name
            torch.set_num_threads(1)
        program = next((word for word in words if not word.startswith("-")), "")
        with contextlib.suppress(OSError):
            program += (folder / program).read_text(encoding="utf-8")
        for name, modules in FRAMEWORKS.items():
            if name in program.lower():
                for module in modules:
                    with contextlib.suppress(ImportError):
                        importlib.import_module(module)
        gc.freeze()  # a collection in a fork would write to, and so copy, all of this

    def _become(self, request: dict[str, Any], files: list[int], caller: socket.socket) -> None:
        for number in (signal.SIGCHLD, *FORWARDED):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        for open_one in (self.listener, caller, *filter(None, self.callers.values())):
            open_one.close()
        files = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 1000) for file in files]
        spaces, given = files[: len(NAMESPACES)], files[len(NAMESPACES) :]
        for file, number in zip(given, request["files"], strict=True):
            os.dup2(file, number)
        os.setsid()
        pairs = zip(spaces, request["namespaces"], self.namespaces, strict=True)
        enter([space for space, theirs, own in pairs if theirs != own])
        for file in files:
            os.close(file)
        os.environ.clear()
        os.environ.update(request["environment"])
        words = [word for word in request["words"] if word != "-u"]
        run_as_program(words, Path(request["folder"]), request["python"])


def enter(spaces: list[int]) -> None:
    """Enter these namespaces. A process namespace applies to children only, so a fork goes on, and this process forwards signals to it."""
    if not spaces:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    for space in spaces:
        if libc.setns(space, 0) != 0:
            print(f"warm: setns: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
            os._exit(71)
    pid = os.fork()
    if pid == 0:
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        return
    for number in FORWARDED:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    os._exit(status)


def show(words: list[str]) -> None:
    """Make ps and /proc show these words and this environment instead of those of the first process."""
    places = list(map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:49]))
    variables = [f"{key}={value}" for key, value in os.environ.items()]
    for (start, end), found in zip((places[:2], places[2:]), (words, variables), strict=True):
        text = "\0".join(found).encode()[: end - start - 1]
        ctypes.memset(start, 0, end - start)
        ctypes.memmove(start, text, len(text))


def run_as_program(words: list[str], folder: Path, executable: str) -> None:
    """Run `python words` in this folder, and exit."""
    os.chdir(folder)
    sys.path[:1] = ["", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    show([executable, *words])
    random.seed()
    tempfile.tempdir = None  # to look at TMPDIR again
    sys.executable, sys.orig_argv = executable, [executable, *words]
    for file, name in enumerate(("stdout", "stderr"), start=1):
        raw = io.BufferedWriter(io.FileIO(file, "wb", closefd=False))
        setattr(sys, name, io.TextIOWrapper(raw, "utf-8", "backslashreplace", line_buffering=True))
    status = 0
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            sys.path[0] = ""
            main = types.ModuleType("__main__")
            sys.modules["__main__"] = main
            exec(compile(words[1], "<string>", "exec"), main.__dict__)
        elif words[0] == "-m":
            sys.argv = words[1:]
            sys.path[0] = str(folder)
            for name in (words[1], f"{words[1]}.__main__"):
                sys.modules.pop(name, None)
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path[0] = str(Path(words[0]).resolve().parent)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        status = 1
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        if mpi := sys.modules.get("mpi4py.MPI"):  # which says goodbye to mpiexec below Python's atexit
            if not mpi.Is_finalized():
                mpi.Finalize()
            ctypes.CDLL(None).exit(status)
        os._exit(status)


if __name__ == "__main__":
    Server(socket.socket(fileno=int(sys.argv[1]))).serve()
