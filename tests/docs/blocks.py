"""The fenced blocks of a Markdown page, and a folder in which they run one after another, as a reader would run them."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from checks import check_file
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("launch", "configs", "scripts", "commopt")
STOOD_IN_FOR = ("pip", "sbatch", "kubectl", "docker", "ssh")
PAGE_LIMIT_S = 300.0  # on the busiest of machines; a page should take less than 10
REASONS = ("needs a GPU", "needs a second machine", "takes minutes", "needs peft")
_NOT_EXECUTED = re.compile(r"<!--\s*not executed:\s*(.*?)\s*-->", re.DOTALL)
_TABS = re.compile(r"(!!!|\?\?\?\+?|===) .*")


class BlockError(AssertionError):
    """A block of a page does not do what its reader expects."""


@dataclass(frozen=True)
class Block:
    """One fenced block. line: of its fence in the page, from 1. reason: why it is not executed, or None."""

    page: Path
    line: int
    language: str
    title: str | None
    code: str
    reason: str | None = None

    def fail(self, why: str) -> BlockError:
        """The error that names this block's place."""
        return BlockError(f"{self.page}:{self.line}: {why}")


def read_blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order. Raises BlockError for one that is not closed, indented or of no known kind."""
    text = _without_tabs(page.read_text(encoding="utf-8"))
    lines = text.splitlines()
    blocks: list[Block] = []
    reason: str | None = None
    for token in MarkdownIt("commonmark").parse(text):
        line = (token.map or [0])[0] + 1
        if token.type == "html_block":
            found = _NOT_EXECUTED.search(token.content)
            reason = found[1] if found else None
            continue
        if token.type == "code_block":
            raise BlockError(f"{page}:{line}: code by indentation has no language; put it between fences")
        if token.type != "fence":
            continue
        language, _, rest = token.info.strip().partition(" ")
        attributes = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        block = Block(page, line, language, attributes.get("title"), token.content, reason)
        reason = None
        if token.map is None or not lines[token.map[1] - 1].strip().startswith(token.markup):
            raise block.fail("this block is never closed")
        _check_kind(block)
        blocks.append(block)
    return blocks


GENERATED = ("methods.md", "refusals.md")  # written when the site is built


def links(page: Path) -> list[str]:
    """Where the links and pictures of a page lead to."""
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        for child in token.children or []:
            target = child.attrs.get("href") or child.attrs.get("src")
            found += [str(target)] if target else []
    return found


def run_page(page: Path, folder: Path, limit_s: float = PAGE_LIMIT_S) -> int:
    """Run a page's blocks in an empty folder; returns how many ran. Raises BlockError at the first that fails."""
    blocks = read_blocks(page)
    _check_titles_are_used(blocks)
    with Reader(folder, limit_s) as reader:
        return sum(reader.take(block) for block in blocks)


class Reader:
    """A reader with a shell and a Python in a fresh folder, who runs block after block."""

    def __init__(self, folder: Path, limit_s: float) -> None:
        self.folder, self._end = folder, time.monotonic() + limit_s
        self._late = f"no end after {limit_s:.0f} s for the page"
        self._python: tuple[subprocess.Popen[bytes], Connection] | None = None
        self._output = folder.parent / f"{folder.name}.output"  # of all blocks
        folder.mkdir(parents=True, exist_ok=True)
        for name in LINKED:
            (folder / name).symlink_to(ROOT / name)
        bin_folder = folder.parent / f"{folder.name}.bin"
        bin_folder.mkdir()
        stand_ins = Path(__file__).with_name("stand_ins.py")
        for name in STOOD_IN_FOR:
            script = bin_folder / name
            script.write_text(f'#!/bin/sh\nexec python {shlex.quote(str(stand_ins))} {name} "$@"\n')
            script.chmod(0o755)
        temporary = folder.parent / f"{folder.name}.tmp"
        temporary.mkdir()
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PIP_NO_INDEX": "1"}
        path = os.pathsep.join([str(bin_folder), os.environ["PATH"]])
        given = {"PATH": path, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", **offline}
        self._mark = f"COMMOPT_PAGE={uuid.uuid4().hex}"
        given |= dict([self._mark.split("=")])
        self._environment = {**os.environ, **given}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._python is not None:
            self._python[1].close()
        _end_all(self._mark)
        if self._python is not None:
            self._python[0].wait()

    def take(self, block: Block) -> bool:
        """Run, write or check the block; returns whether it was executed."""
        if block.language == "text":
            return False
        if block.reason is not None:
            self._only_read(block)
            return False
        if block.title is not None:
            self._write(block)
        elif block.language == "python":
            self._run_python(block)
        else:
            self._run_bash(block)
        return True

    def _only_read(self, block: Block) -> None:
        """Check the syntax of a block that cannot run here."""
        if block.language == "python":
            _check_syntax(block)
        elif block.language == "bash":
            read = subprocess.run(["bash", "-n", "-c", block.code], capture_output=True, text=True, check=False)
            if read.returncode != 0:
                raise block.fail(read.stderr)

    def _write(self, block: Block) -> None:
        assert block.title is not None
        path = self.folder / block.title
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise block.fail(f"title: {block.title!r} lies outside of the reader's folder; write a plain file name")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.code, encoding="utf-8")
        if block.language == "python":
            _check_syntax(block)
            return
        try:
            check_file(path)
        except Exception as error:
            raise block.fail(f"{block.title}: {error}") from error

    def _run_bash(self, block: Block) -> None:
        process = self._start(["bash", "-euo", "pipefail", "-c", block.code])
        status = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(self._left_s())
        if status is None:
            _end_all(self._mark)
            process.wait()
        if status != 0:
            raise self._failed(block, self._late if status is None else f"exit status {status}")

    def _run_python(self, block: Block) -> None:
        _check_syntax(block)
        if self._python is None:
            self._python = self._start_python()
        process, connection = self._python
        connection.send((str(block.page), block.line, block.code))
        error = self._late
        if connection.poll(self._left_s()):
            try:
                error = connection.recv()
            except EOFError:
                process.wait(10)
                error = f"the process ended with {process.returncode}"
        if error is not None:
            raise self._failed(block, error)

    def _start_python(self) -> tuple[subprocess.Popen[bytes], Connection]:
        ours, theirs = Pipe()
        script = Path(__file__).with_name("interpreter.py")
        process = self._start(["python", str(script), str(theirs.fileno())], pass_fds=[theirs.fileno()])
        theirs.close()
        return process, ours

    def _start(self, words: Sequence[str], pass_fds: Sequence[int] = ()) -> subprocess.Popen[bytes]:
        with self._output.open("ab") as output:
            return subprocess.Popen(
                words,
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=pass_fds,
            )

    def _left_s(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def _failed(self, block: Block, why: str) -> BlockError:
        """The block's error, with the end of what the page printed."""
        return block.fail(f"{why}\n{self._output.read_text(encoding='utf-8', errors='replace')[-4000:]}")


def _without_tabs(text: str) -> str:
    """The page with what stands indented under `!!! note` and `=== "Tab"` moved to the left; lines keep their numbers."""
    out, is_inside = [], False
    for line in text.splitlines():
        if _TABS.fullmatch(line):
            is_inside = True
            out.append("")
        elif is_inside and (line.startswith("    ") or not line.strip()):
            out.append(line[4:])
        else:
            is_inside = False
            out.append(line)
    return "\n".join(out) + "\n"


def _check_kind(block: Block) -> None:
    wants_title = {"python": None, "bash": False, "text": False, "yaml": True, "json": True}
    if block.language not in wants_title:
        raise block.fail(f"{block.language!r} is no kind of block; write {', '.join(wants_title)}")
    wanted = wants_title[block.language]
    if wanted is not None and wanted != (block.title is not None):
        form = (
            f'```{block.language} title="name.{block.language}"' if wanted else f"```{block.language} without a title"
        )
        raise block.fail(f"write {form}")
    if block.reason is not None and not block.reason.startswith(REASONS):
        raise block.fail(f"not executed: {block.reason!r} is no reason; it begins with {', '.join(map(repr, REASONS))}")


def _check_titles_are_used(blocks: list[Block]) -> None:
    """A program that a page shows must be run by it."""
    for index, block in enumerate(blocks):
        if block.language != "python" or block.title is None or block.reason is not None:
            continue
        name = Path(block.title).stem
        if not any(re.search(rf"\b{re.escape(name)}\b", later.code) for later in blocks[index + 1 :]):
            raise block.fail(f"{block.title} is never run; add a bash block that does")


def _check_syntax(block: Block) -> None:
    try:
        ast.parse(block.code, block.title or str(block.page))
    except SyntaxError as error:
        raise block.fail(f"{error}") from None


def _end_all(mark: str) -> None:
    """End every process that a page has started, by the mark in its environment; torchrun's ranks have sessions of their own."""
    is_left = True
    while is_left:  # what was being started while the others were ended is seen the next time
        is_left = False
        for entry in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark.encode() in entry.read_bytes():
                    is_left = True
                    os.kill(int(entry.parent.name), signal.SIGKILL)
