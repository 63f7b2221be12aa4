"""Scripts as modules, for their tests."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent.parent / "scripts"
BENCH = SCRIPTS / "bench"


def module(name: str, folder: Path = BENCH) -> Any:
    """Import a script by its name."""
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
