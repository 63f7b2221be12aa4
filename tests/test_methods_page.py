"""docs/methods.md says what the methods say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_page_is_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "scripts/write_methods_page.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_page_that_is_out_of_date_is_noticed(tmp_path: Path) -> None:
    """The script reads the page beside its own folder: a copy of it finds none."""
    (tmp_path / "scripts").mkdir()
    copy = tmp_path / "scripts" / "write_methods_page.py"
    copy.write_text((ROOT / "scripts/write_methods_page.py").read_text(encoding="utf-8"), encoding="utf-8")
    done = subprocess.run([sys.executable, copy, "--check"], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "is out of date; run scripts/write_methods_page.py" in done.stderr
