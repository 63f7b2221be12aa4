"""Sorts what a node's agent and ranks print: lines for the user, tracebacks, and torchrun's own reports."""

import re
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

_LOGGED = re.compile(
    r"^(?:\[\w+\]:)?[WEI]\d{4} \d\d:\d\d:\d\d\.\d+ \d+ (?:\S*/)?torch/distributed/(?:run|elastic|launcher)"
)
_NOISE = re.compile(r"^NOTE: Redirects|.*\[c10d\] The hostname of the client socket cannot be retrieved")
# printed by an agent that outlives the one with the store
_STORE_CLOSED = re.compile(r"^\[[WE]\d{4} .*TCPStore\.cpp:\d+\] \[c10d\]")
_STACK = re.compile(r"^(?:Exception raised from|frame #\d+:|<omitting python frames>|$)")
_ENDED = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+) \(pid: \d+\)")
_RANK = re.compile(r"^\s*rank\s*: (\d+) \(local_rank: (\d+)\)")
_OF_RANK = re.compile(r"^\[rank(\d+)\]: ?")
_TRACEBACK = "Traceback (most recent call last):"
_CHAINED = ("During handling of the above exception", "The above exception was the direct cause")
_HELD_S, _HELD_LAST_S = 2.0, 30.0  # a traceback after which its process went on; one that may be its last output
_CREDENTIALS = struct.Struct("3i")  # process, user, group
_KEPT_BYTES = 1 << 20


@dataclass(frozen=True)
class Ended:
    """A rank that failed, as its agent reports; exit_code is minus the signal's number if one killed it."""

    at_s: float
    local_rank: int
    exit_code: int


@dataclass
class Traceback:
    """One traceback; rank is None if the program had no process group yet."""

    at_s: float
    rank: int | None
    lines: list[str] = field(default_factory=list)
    went_on: bool = False  # its process has printed something since
    is_shown: bool = False  # the user has seen it

    @property
    def text(self) -> str:
        return "\n".join(self.lines).rstrip()


def exception_in(lines: Sequence[str]) -> str:
    """The exception itself: what follows a traceback's last frame, with the next line if its message begins there."""
    starts = [k for k, line in enumerate(lines) if line.startswith(_TRACEBACK)]
    last = [line for line in lines[starts[-1] + 1 if starts else 0 :] if line.strip()]
    found = next((k for k, line in enumerate(last) if not line[0].isspace()), None)
    if found is None:
        return _TRACEBACK if starts else ""
    text, *message = map(str.strip, last[found : found + 2])
    return " ".join([text, *message] if text.endswith(":") else [text])


class Lines:
    """Assembles whole lines from what several processes write to one place."""

    def __init__(self) -> None:
        self._rests: dict[int, bytes] = {}

    def whole(self, data: bytes, writer: int = 0) -> bytes:
        """Add what one process wrote; return the lines that are now complete, very long ones in pieces."""
        data = self._rests.pop(writer, b"") + data
        end = data.rfind(b"\n") + 1
        if len(data) - end > 1 << 16:
            return data
        if end < len(data):
            self._rests[writer] = data[end:]
        return data[:end]

    def last(self) -> list[tuple[bytes, int]]:
        """The unfinished last line of each process, with a line feed added, and its writer."""
        return [(rest + b"\n", writer) for writer, rest in self._rests.items()]


class Reader:
    """Sorts the lines of one agent; holds tracebacks back, since the report of the job's end, which may come late, shows the last."""

    def __init__(self) -> None:
        self.ended: list[Ended] = []
        self.tracebacks: list[Traceback] = []
        self.rank_of_local: dict[int, int] = {}
        self._open: dict[tuple[int, int | None], Traceback] = {}
        self._rank_of_writer: dict[int, int | None] = {}
        self._is_in_stack = False

    def feed(self, data: bytes, at_s: float, writer: int = 0) -> list[str]:
        """Take whole lines of one process; return those that a user should see now."""
        lines = [line.rstrip("\r") for line in data.decode("utf-8", "replace").split("\n")]
        if not lines[-1]:  # after the last line feed
            lines.pop()
        return [line for line in lines if self._is_for_users(line, at_s, writer)]

    def release(self, at_s: float) -> list[str]:
        """Held-back tracebacks that are due: no rank has ended since."""
        if self.ended:
            return []
        old = [
            block
            for block in self.tracebacks
            if not block.is_shown
            and at_s - block.at_s > (_HELD_S if block.went_on else _HELD_LAST_S)
            and not ("torch/distributed/run.py" in block.text and "elastic_launch(" in block.text)  # torchrun's own
        ]
        for block in old:
            block.is_shown = True
        self.tracebacks = [block for block in self.tracebacks if not (block.is_shown and block.went_on)]
        return [line for block in old for line in block.lines]

    def _is_for_users(self, line: str, at_s: float, writer: int) -> bool:
        if match := _ENDED.search(line):
            self.ended.append(Ended(at_s, int(match[2]), int(match[1])))
            return False
        if self.ended:  # what follows is the agent's own report
            if match := _RANK.match(line):
                self.rank_of_local[int(match[2])] = int(match[1])
            return False
        self._is_in_stack = bool(_STORE_CLOSED.match(line) or (self._is_in_stack and _STACK.match(line)))
        if self._is_in_stack or _LOGGED.match(line) or _NOISE.match(line):
            return False
        block = self._traceback_of(line, at_s, writer)
        return block is None or block.is_shown

    def _traceback_of(self, line: str, at_s: float, writer: int) -> Traceback | None:
        """Add a line to the traceback that it belongs to, and return that; None if there is none."""
        match = _OF_RANK.match(line)
        rank = int(match[1]) if match else None
        if match:
            self._rank_of_writer[writer] = rank
        elif not line:  # torch puts no rank before the empty lines of its tracebacks
            rank = self._rank_of_writer.get(writer)
        text = line[match.end() :] if match else line
        continues = not text or text[0].isspace() or text.startswith(_CHAINED)
        place = (writer, rank)
        block = self._open.get(place)
        is_chained = block is not None and any(before.startswith(_CHAINED) for before in block.lines[-3:])
        if text.startswith(_TRACEBACK) and not is_chained:
            if block is not None:
                block.went_on = True
            block = self._open[place] = Traceback(at_s, rank)
            self.tracebacks.append(block)
        elif block is None:
            return None
        elif rank is None and exception_in(block.lines) != _TRACEBACK and not (continues or is_chained):
            block.went_on = True
            del self._open[place]
            return None
        block.lines.append(text)
        return block


def output_pair() -> tuple[socket.socket, socket.socket]:
    """The socket to read a node's output from, and the one that its processes inherit.

    In a pipe lines would get mixed: `python -u` writes a line and its line feed separately, and ranks of one node
    print at the same time. A socket identifies the process that wrote.
    """
    output, inherited = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    output.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    output.setblocking(False)
    return output, inherited


def read_from(output: socket.socket) -> tuple[bytes, int]:
    """What one process wrote, and its process id (0 if unknown)."""
    data, ancillary, _, _ = output.recvmsg(1 << 16, socket.CMSG_SPACE(_CREDENTIALS.size))
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            return data, _CREDENTIALS.unpack(content[: _CREDENTIALS.size])[0]
    return data, 0


class Logs:
    """Everything that the agents printed: a file per node, or without a folder the last MiB of each in memory.

    If the folder cannot be written (a full disk), the job continues without the logs, and `problem` says why.
    """

    def __init__(self, folder: Path | None, names: list[str]) -> None:
        self.problem: str | None = None
        self._folder = folder
        self._kept = {name: bytearray() for name in names}
        self._files: dict[str, BinaryIO] = {}
        if folder is not None:
            with self._stopped_by_errors():
                folder.mkdir(parents=True, exist_ok=True)
                self._files = {name: (folder / f"{name}.log").open("wb", buffering=0) for name in names}

    def write(self, name: str, data: bytes) -> None:
        kept = self._kept[name]
        kept += data
        if len(kept) > 2 * _KEPT_BYTES:
            del kept[:-_KEPT_BYTES]
        if file := self._files.get(name):
            with self._stopped_by_errors():
                rest = memoryview(data)
                while rest:
                    rest = rest[file.write(rest) :]

    def tail(self, name: str, lines: int) -> str:
        return "\n".join(self._kept[name].decode("utf-8", "replace").rstrip().split("\n")[-lines:])

    def keep(self, folder: Path) -> None:
        """Write what is in memory to a folder."""
        with self._stopped_by_errors():
            folder.mkdir(parents=True, exist_ok=True)
            for name, kept in self._kept.items():
                (folder / f"{name}.log").write_bytes(kept)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}

    @contextmanager
    def _stopped_by_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.close()
            self.problem = f"{self._folder}: the logs are incomplete: {(error.strerror or str(error)).lower()}"
