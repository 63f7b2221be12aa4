"""The pool of ranks itself."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest


def size(process_group: Any) -> int:
    return int(process_group.size())


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_no_process_outlives_the_pool() -> None:
    mark = uuid.uuid4().hex
    script = "import pool, test_pool; p = pool.Pool(); assert p.run(2, test_pool.size) == [2, 2]; p.close()"
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path, "MARK": mark}, check=True)
    left = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and f"MARK={mark}".encode() in (entry / "environ").read_bytes():
                left.append((entry / "cmdline").read_bytes())
    assert left == []
